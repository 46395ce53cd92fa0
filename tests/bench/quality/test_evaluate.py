"""What an evaluation keeps, reuses and refuses, on an engine whose logits are known."""

import contextlib
import functools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from bench import engine
from bench.quality import evaluate as evaluate_module
from bench.quality import plan
from bench.quality.evaluate import Evaluation
from bench.quality.measure import MARGIN_STEPS, chunked
from bench.quality.plan import Settings, make_plan
from bench.quality.recording import Block, Recording, add
from bench.quality.schema import EvalReport
from bench.quality.tasks.choices import Choice
from bench.quality.tasks.run import Chosen, Scores, TaskSettings
from bench.report.documents import parse
from bench.schema import KVCache
from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import load_tokenizer
from quant_methods.embedded import MODELS

VOCABULARY = 8192
NOISE = {"auto": 0.0, "fp8": 0.2, "int4_per_head": 0.6}


@functools.cache
def tokenizer():
    return load_tokenizer(MODELS / "ref-7m")


class FakeLLM:
    """Logits are a fixed function of the token plus noise that grows with the KV dtype's coarseness."""

    log: list = []  # noqa: RUF012 - what all engines of a test did
    interrupt_after: int | None = None
    chunk: int | None = None  # of an engine that does not do as it is told

    def __init__(self, settings):
        self.settings, self.recording = settings, None
        self.table = torch.randn(64, VOCABULARY, generator=torch.Generator().manual_seed(0)).bfloat16()

    def collective_rpc(self, method, args=()):
        if method == "pareto_tap_begin":
            self.recording = [Recording(t, store, tuple(c) if c else None) for t, store, c in args[0]]
            return [None]
        recordings, self.recording = self.recording, None
        return [None, [recording.finish() for recording in recordings]]  # the first rank records nothing

    def generate(self, prompts, params, use_tqdm):
        if FakeLLM.interrupt_after is not None and len(FakeLLM.log) >= FakeLLM.interrupt_after:
            raise KeyboardInterrupt
        dtype = self.settings.kv_cache_dtype
        FakeLLM.log.append((dtype, "window" if self.recording else "needle"))
        if self.recording is None:
            return [
                SimpleNamespace(outputs=[SimpleNamespace(text=self.answer(p["prompt_token_ids"]))]) for p in prompts
            ]
        for prompt, recording in zip(prompts[-len(self.recording) :], self.recording, strict=True):
            tokens = torch.tensor(prompt["prompt_token_ids"])
            generator = torch.Generator().manual_seed(len(tokens))
            noise = torch.randn(len(tokens), VOCABULARY, generator=generator) * NOISE[dtype]
            logits = self.table[tokens % 64] + noise.bfloat16()
            chunk = FakeLLM.chunk or self.settings.extra.get("long_prefill_token_threshold", 64)
            for start in range(0, len(tokens), chunk):
                count = min(chunk, recording.rows - start)
                if count > 0:
                    add([Block(recording, start, count, chunk)], logits[start : start + count])
        return []

    def answer(self, prompt):
        """Find the number by reading the prompt; the coarsest dtype finds nothing."""
        if self.settings.kv_cache_dtype == "int4_per_head":
            return " 0."
        text = tokenizer().decode(prompt)
        return text.partition("is: ")[2][:5]


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Return a function that runs an evaluation; and reset what the engines log."""
    (tmp_path / "words.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(FakeLLM, "log", [])
    monkeypatch.setattr(FakeLLM, "interrupt_after", None)
    monkeypatch.setattr(FakeLLM, "chunk", None)
    # Piece by piece, so that a run can be interrupted between them.
    monkeypatch.setattr(plan, "WINDOW_TOKENS", 64)
    monkeypatch.setattr(plan, "PROMPT_TOKENS", 128)
    monkeypatch.setattr(engine, "running", lambda settings: contextlib.nullcontext(FakeLLM(settings)))
    monkeypatch.setattr(engine, "kv_cache", lambda llm, s: KVCache(s.kv_cache_dtype, 100, 10, 100, 10.0, 16.0, 16))

    def run(out="out", **changes):
        settings = {
            "model": "ref-7m", "kv_cache_dtypes": ("fp8", "int4_per_head"), "texts": (str(tmp_path / "words.txt"),),
            "num_windows": 3, "window_tokens": 150, "needle_lengths": (200,), "needle_depths": (0.0, 1.0),
            "needles_per_cell": 2,
        }  # fmt: skip
        return Evaluation(make_plan(Settings(**(settings | changes))), tmp_path / out).run()

    return run


def test_figures_of_all_configurations(evaluate, tmp_path):
    report = evaluate()
    base, fp8, int4 = report.configurations
    assert (base.overall.kl, base.overall.top1_agreement, base.overall.perplexity_change) == (None, None, None)
    assert base.overall.tokens == 3 * 149
    assert 0 < fp8.overall.kl.value < int4.overall.kl.value
    assert 1 > fp8.overall.top1_agreement.value > int4.overall.top1_agreement.value
    # The mean over tokens of two normal vectors' divergence is half the noise's variance.
    assert fp8.overall.kl.value == pytest.approx(0.2**2 / 2, rel=0.1)
    assert [c.needle.accuracy.value for c in report.configurations] == [1.0, 1.0, 0.0]
    document = json.loads((tmp_path / "out/eval.json").read_text())
    assert (document["schema"], document["status"]) == ("vllm-pareto/eval/1", "complete")
    assert document["configurations"][1]["overall"]["kl"]["value"] == fp8.overall.kl.value
    assert document["settings"]["chunk_tokens"] == 64


def test_tasks_are_judged_over_the_whole_table(evaluate, tmp_path, monkeypatch):
    """A made-up task on which fp8 loses 9 of 200 answers, alone in a group; one table, whichever comes first."""
    asked = []

    def ask(llm, task, settings, warm, capacity, note):
        asked.append(task)
        lost = 9 if len(asked) == 2 else 0
        right = {f"{task}/{i}": float(i >= lost) for i in range(200)}
        choices = {key: Choice([0.2, 0.8] if value else [0.6, 0.4], int(value), 1) for key, value in right.items()}
        return [Scores(task, "acc", "more", 0.0, right, 1.0), Scores(task, "ece", "less", 0.0, {}, 1.0, {}, choices)]

    monkeypatch.setattr(engine, "on_gpu", lambda llm: False)
    monkeypatch.setattr(evaluate_module, "ask", ask)
    monkeypatch.setattr(
        evaluate_module, "choose", lambda settings, *others: Chosen({"t": "t"}, {"g": ["t"]}, {"t": settings})
    )
    tasks = TaskSettings(tasks=("g",), max_model_len=64)
    evaluate("out", tasks=tasks, margin=0.1)
    report = parse(EvalReport, (tmp_path / "out" / "eval.json").read_text())
    base, fp8, int4 = ({(one.task, one.metric): one for one in row.tasks} for row in report.configurations)
    assert report.settings["margin"] == 0.1
    assert (fp8["g", "acc"].lost, fp8["g", "acc"].judged) == (9, "non-inferior (10 pt)")
    # McNemar's 2 / 2^9; with int4's 1 there are two in the table, and two in that of the group's parts.
    assert fp8["g", "acc"].p_holm == fp8["t", "acc"].p_holm == pytest.approx(2 * 2 / 2**9)
    assert (int4["g", "acc"].p_holm, int4["g", "flips"].value.value) == (1.0, 0.0)
    assert fp8["g", "flips"].flips.right_to_wrong == 9
    assert {metric for _, metric in base} == {"acc", "ece", "brier"}
    evaluate("out", tasks=tasks, margin=0.03)
    again = parse(EvalReport, (tmp_path / "out" / "eval.json").read_text())
    assert again.configurations[1].tasks[-4].judged == "undecided (3 pt)"
    assert len(asked) == 3  # Another margin asks nothing again.


def test_windows_advance_together_where_chunks_are_short(evaluate):
    whole = evaluate(needle_lengths=())
    FakeLLM.log.clear()
    short = evaluate("short", needle_lengths=(), chunk_tokens=1)
    assert FakeLLM.log == [(dtype, "window") for dtype in ("auto", "fp8", "int4_per_head")]
    assert [c.max_chunk_tokens for c in short.configurations] == [1, 1, 1]
    for one, other in zip(whole.configurations, short.configurations, strict=True):
        assert one.overall == other.overall
    along = short.configurations[1].overall.kl_by_position
    assert len(along) == 16
    assert sum(along) / 16 == pytest.approx(short.configurations[1].overall.kl.value, rel=0.05)


def test_windows_and_prompts_share_steps(evaluate, monkeypatch):
    alone = evaluate("alone")
    monkeypatch.setattr(plan, "WINDOW_TOKENS", 512)
    monkeypatch.setattr(plan, "PROMPT_TOKENS", 2048)
    FakeLLM.log.clear()
    shared = evaluate("shared")
    assert FakeLLM.log == [(dtype, kind) for dtype in ("auto", "fp8", "int4_per_head") for kind in ("window", "needle")]
    for one, other in zip(alone.configurations, shared.configurations, strict=True):
        assert (one.overall, one.needle) == (other.overall, other.needle)


def test_as_many_go_together_as_the_memory_holds(tmp_path):
    (tmp_path / "words.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4000)

    def made(**changes):
        settings = {"texts": (str(tmp_path / "words.txt"),), "window_tokens": 1023, "needle_lengths": (1024,)}
        return make_plan(Settings("ref-7m", **(settings | changes)))

    whole = made()
    assert (whole.windows_at_once, whole.prompts_at_once) == (8, 20)
    settings = whole.engine_settings(whole.configurations[0])
    assert (settings.max_num_seqs, settings.max_num_batched_tokens) == (21, 21 * 64)
    assert settings.extra["long_prefill_token_threshold"] == 64
    # 3 KiB a token: 12 MiB hold four contexts of 1,024 tokens, one of them that of the request beside.
    small = made(kv_cache_memory_bytes=12 << 20)
    assert (small.windows_at_once, small.prompts_at_once) == (3, 3)
    least = made(kv_cache_memory_bytes=4 << 20)
    settings = least.engine_settings(least.configurations[0])
    assert (settings.max_num_seqs, settings.max_num_batched_tokens, settings.extra) == (1, 64, {})
    assert made(chunk_tokens=1024).windows_at_once == 1


def test_a_request_goes_beside_what_has_to_be_cut():
    params = [SimpleNamespace(max_tokens=1), SimpleNamespace(max_tokens=10)]
    prompts, settings, before = chunked([[5] * 640, [6] * 64], params, 64)
    assert [len(one["prompt_token_ids"]) for one in prompts] == [1, 640, 64]
    # As long as the longest takes, and some more, for the last may come late.
    assert settings[0].max_tokens == 10 + 10 + MARGIN_STEPS
    assert (settings[1:], before) == (params, 1)
    assert chunked([[5] * 640], params[:1], None) == ([{"prompt_token_ids": [5] * 640}], params[:1], 0)


def test_an_interrupted_run_goes_on(evaluate, tmp_path):
    FakeLLM.interrupt_after = 7  # five pieces of the baseline, two of fp8
    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert json.loads((tmp_path / "out/eval.json").read_text())["status"] == "partial"
    FakeLLM.interrupt_after = None
    FakeLLM.log.clear()
    resumed = evaluate()
    assert FakeLLM.log == [("fp8", "window")] + [("fp8", "needle")] * 2 + [
        *[("int4_per_head", "window")] * 3, *[("int4_per_head", "needle")] * 2,
    ]  # fmt: skip
    FakeLLM.log.clear()
    fresh = evaluate("elsewhere")
    assert resumed.configurations == fresh.configurations


def test_the_baseline_is_measured_once_for_all_runs(evaluate):
    evaluate()
    FakeLLM.log.clear()
    evaluate("other", kv_cache_dtypes=("fp8",))
    assert {dtype for dtype, _ in FakeLLM.log} == {"fp8"}
    FakeLLM.log.clear()
    evaluate("other", kv_cache_dtypes=("fp8",))
    assert FakeLLM.log == []
    evaluate("third", kv_cache_dtypes=("fp8",), window_tokens=100)
    assert {dtype for dtype, _ in FakeLLM.log} == {"auto", "fp8"}


def test_damaged_pieces_are_measured_again(evaluate, tmp_path):
    evaluate()
    FakeLLM.log.clear()
    store = next((tmp_path / "out/.work").iterdir())
    window = store / "window-0001.npz"
    window.write_bytes(window.read_bytes()[:50])
    next((tmp_path / "cache/baselines").glob("*/logits-0002.bin")).unlink()
    evaluate()
    assert sorted(kind for _, kind in FakeLLM.log) == ["window"] * 2


def test_an_engine_that_does_not_chunk_is_refused(evaluate, tmp_path):
    FakeLLM.chunk = 128
    with pytest.raises(ParetoError, match="prefilled 128 tokens at once"):
        evaluate()
    assert not (tmp_path / "out/eval.json").exists()


@pytest.fixture
def breakable(monkeypatch):
    """Return a dict of what happens to a KV dtype: an error at the engine's start, or one in the worker."""
    broken = {}
    running, generate = engine.running, FakeLLM.generate

    def start(settings):
        if isinstance(broken.get(settings.kv_cache_dtype), ParetoError):
            raise broken[settings.kv_cache_dtype]
        return running(settings)

    def fail(self, *args, **kwargs):
        # Not the first window: what was finished before is to be kept.
        if self.settings.kv_cache_dtype in broken and (self.settings.kv_cache_dtype, "window") in FakeLLM.log:
            raise broken[self.settings.kv_cache_dtype]
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(engine, "running", start)
    monkeypatch.setattr(FakeLLM, "generate", fail)
    return broken


@pytest.mark.parametrize(
    "error",
    [
        ParetoError("vLLM did not start ref-7m with --kv-cache-dtype fp8: no such dtype"),
        # What vLLM raises for an error in a worker.
        Exception("Call to collective_rpc method failed: 3 of 149 positions have undefined logits (NaN)"),
        RuntimeError("EngineCore encountered an issue"),
        ParetoError("a reason that names all that is valid: " + ", ".join(f"dtype_{i}" for i in range(100))),
    ],
)
def test_a_configuration_that_fails_does_not_stop_the_others(evaluate, breakable, tmp_path, error):
    breakable["fp8"] = error
    report = evaluate()
    assert [c.kv_cache.dtype for c in report.configurations] == ["auto", "int4_per_head"]
    document = json.loads((tmp_path / "out/eval.json").read_text())
    assert document["status"] == "complete"
    (failure,) = document["failed"]
    assert (failure["name"], failure["kv_cache_dtype"]) == ("ref-7m, fp8 KV", "fp8")
    assert failure["error"] == str(error)
    # The next run measures what failed, and of it only what is missing.
    breakable.clear()
    started = ("fp8", "window") in FakeLLM.log
    FakeLLM.log.clear()
    whole = evaluate()
    assert FakeLLM.log == [("fp8", "window")] * (2 if started else 3) + [("fp8", "needle")] * 2
    assert whole.failed == []
    assert [c.kv_cache.dtype for c in whole.configurations] == ["auto", "fp8", "int4_per_head"]


def test_the_command_says_what_failed_and_ends_with_1(evaluate, breakable, tmp_path, capfd):
    from vllm_ext.cli import main

    breakable |= {"fp8": Exception("worker died in [/usr/lib]"), "int4_per_head": KeyError("layer")}
    words = ["eval", "ref-7m", "--kv-cache-dtype", "fp8", "int4_per_head", "--text", str(tmp_path / "words.txt")]
    words += ["--num-windows", "2", "--window-tokens", "150", "--no-needle", "--out", str(tmp_path / "command")]
    assert main(words) == 1
    shown = capfd.readouterr()
    assert shown.err.splitlines()[-2:] == [
        "pareto eval: failed: ref-7m, fp8 KV: worker died in [/usr/lib]",
        "pareto eval: failed: ref-7m, int4_per_head KV: KeyError: 'layer'",
    ]
    assert "failed: worker died in [/usr/lib]" in " ".join(shown.out.split())
    breakable.clear()
    assert main(words) == 0


def test_a_baseline_that_fails_ends_the_run(evaluate, breakable, tmp_path):
    breakable["auto"] = Exception("worker died")
    with pytest.raises(ParetoError, match="worker died"):
        evaluate()
    assert not (tmp_path / "out/eval.json").exists()


def test_a_full_disk_is_noticed_first(evaluate, monkeypatch):
    monkeypatch.setattr("bench.quality.evaluate.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ParetoError, match="lower --num-windows or point PARETO_CACHE"):
        evaluate()
    assert FakeLLM.log == []


def test_evaluations_at_the_same_time_share_a_baseline(evaluate, monkeypatch):
    """Each once wrote over the answers of the other, and one of them ended with a KeyError."""
    generate = FakeLLM.generate

    def slowly(self, *args, **kwargs):
        time.sleep(0.05)
        return generate(self, *args, **kwargs)

    tokenizer()  # What it imports does not stand being imported by two threads at once.
    monkeypatch.setattr(FakeLLM, "generate", slowly)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(evaluate, dtype, kv_cache_dtypes=(dtype,)) for dtype in ("fp8", "int4_per_head")]
        one, other = (run.result() for run in runs)
    assert one.configurations[0] == other.configurations[0]
    assert [dtype for dtype, _ in FakeLLM.log].count("auto") == 5
    assert one.configurations[1].needle.accuracy.value == 1.0


def test_answers_that_are_gone_are_no_bug(evaluate, monkeypatch):
    monkeypatch.setattr("bench.quality.store.Store.add_answers", lambda self, answers: None)
    with pytest.raises(ParetoError, match="was changed while the evaluation ran; run again"):
        evaluate()


def test_the_cache_keeps_within_its_limit(evaluate, monkeypatch, tmp_path):
    baselines = tmp_path / "cache/baselines"
    evaluate(kv_cache_dtypes=("fp8",))
    (old,) = baselines.iterdir()
    monkeypatch.setenv("PARETO_CACHE_LIMIT_GB", "0.001")
    evaluate("other", kv_cache_dtypes=("fp8",), window_tokens=100)
    # The one in use stays, although it is above the limit by itself.
    (left,) = baselines.iterdir()
    assert left != old
