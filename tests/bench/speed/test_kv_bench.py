from dataclasses import replace
from types import SimpleNamespace

import pytest

from bench import engine
from bench.speed import kv_bench, step_timer
from bench.speed.command import markdown
from bench.speed.kv_bench import KVBench, Settings, summarize
from bench.speed.schema import KVBenchReport
from bench.speed.step_timer import prompts, time_batch
from kv_cache.errors import ParetoError
from quant_methods.model_source import fingerprint, resolve_model
from tests.bench.result_files import MACHINE, kv_cache

SETTINGS = Settings(
    model="ref-7m", kv_cache_dtypes=("auto", "int4_per_head"), shapes=((8, 1024),), rounds=3, steps=16,
    max_num_batched_tokens=2048, dtype="auto", kv_cache_memory_bytes=1 << 30, enforce_eager=True,
    tensor_parallel_size=1, seed=0,
)  # fmt: skip


def sample(step_ms, floor_ms=1.0, bits=16):
    return {
        "kv_cache": vars(kv_cache("auto", bits)),
        "points": {
            "8x16": {"step_s": floor_ms / 1000, "prefill_s": 0.01},
            "8x1024": {"step_s": step_ms / 1000, "prefill_s": step_ms / 10},
        },
    }


def test_ratios_are_taken_within_rounds_so_that_drift_cancels():
    # The machine is twice as slow in round 1 and three times in round 2; the ratio is 2 in every round.
    samples = {}
    for i, drift in enumerate((1, 2, 3)):
        samples[f"{i} auto"] = sample(20.0 * drift, 2.0 * drift)
        samples[f"{i} int4_per_head"] = sample(10.0 * drift, 2.0 * drift, bits=4)
    base, int4 = summarize(SETTINGS, samples, {}, {})
    assert base.points[0].step_ratio == 1
    assert int4.points[0].step_ratio == pytest.approx(2)
    assert int4.points[0].prefill_ratio == pytest.approx(2)
    assert int4.points[0].context_ratio == pytest.approx(18 / 8)
    assert (int4.points[0].step_ms.low, int4.points[0].step_ms.median, int4.points[0].step_ms.high) == pytest.approx(
        (10, 20, 30)
    )
    assert int4.capacity_ratio == pytest.approx(4, rel=1e-4)


def test_unfinished_rounds_pair_only_what_both_have():
    samples = {"0 auto": sample(20.0), "0 int4_per_head": sample(10.0), "1 auto": sample(90.0)}
    base, int4 = summarize(SETTINGS, samples, {}, {})
    assert base.points[0].step_ms.n == 2
    assert int4.points[0].step_ratio == pytest.approx(2)


def test_noise_gives_no_context_ratio():
    samples = {"0 auto": sample(20.0), "0 int4_per_head": sample(0.9, floor_ms=1.0)}
    point = summarize(SETTINGS, samples, {}, {})[1].points[0]
    assert point.context_ms.median == pytest.approx(-0.1)
    assert point.context_ratio is None


class FakeEngine:
    """An engine on a clock of its own: prefill and decode take known times."""

    def __init__(self, clock, chunk=100, prefill_s=0.5, step_s=0.01, capacity=8):
        self.clock, self.chunk, self.prefill_s, self.step_s, self.capacity = clock, chunk, prefill_s, step_s, capacity
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=chunk))
        self.requests = {}

    def add_request(self, name, prompt, params):
        self.requests[name] = [len(prompt["prompt_token_ids"]), 0, params.max_tokens]

    def has_unfinished_requests(self):
        return bool(self.requests)

    def abort_request(self, names):
        for name in names:
            self.requests.pop(name, None)

    def step(self):
        outputs, budget, prefilling = [], self.chunk, False
        for name, state in list(self.requests.items())[: self.capacity]:
            if state[0] > 0:
                taken = min(state[0], budget)
                budget -= taken
                state[0] -= taken
                prefilling = True
                if state[0] > 0:
                    continue
            state[1] += 1
            outputs.append(SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=[0] * state[1])]))
            if state[1] == state[2]:
                del self.requests[name]
        self.clock[0] += self.prefill_s if prefilling else self.step_s
        return outputs


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: now[0])
    return now


def test_steps_and_prefill_are_told_apart(clock):
    fake = FakeEngine(clock)
    timing = time_batch(SimpleNamespace(llm_engine=fake), prompts(4, 250, 1000, 0), 16)
    assert timing.prefill_s == pytest.approx(10 * 0.5)
    assert timing.step_s == pytest.approx(0.01)
    assert fake.requests == {}


def test_a_batch_that_never_runs_together_is_an_error(clock):
    with pytest.raises(RuntimeError, match="never decoded together"):
        time_batch(SimpleNamespace(llm_engine=FakeEngine(clock, capacity=2)), prompts(4, 50, 1000, 0), 16)


def test_prompts_repeat():
    assert prompts(2, 30, 1000, 0) == prompts(2, 30, 1000, 0)
    assert prompts(2, 30, 1000, 0) != prompts(2, 30, 1000, 1)
    assert all(16 <= token < 1000 for p in prompts(2, 300, 1000, 0) for token in p)


def test_a_run_resumes_and_names_what_cannot_run(tmp_path, monkeypatch):
    started = []

    def measure(self, row):
        dtype = row.kv_cache_dtype
        started.append(dtype)
        if dtype == "bogus":
            raise ParetoError("no such dtype")
        if len(started) == 5:
            raise KeyboardInterrupt
        return sample(20.0 if dtype == "auto" else 10.0)

    monkeypatch.setattr(KVBench, "_measure", measure)
    settings = replace(SETTINGS, kv_cache_dtypes=("auto", "int4_per_head", "bogus"))
    with pytest.raises(KeyboardInterrupt):
        KVBench(settings, tmp_path, lambda line: None).run()
    assert started == ["auto", "int4_per_head", "bogus", "auto", "int4_per_head"]
    started.clear()
    report = KVBench(settings, tmp_path, lambda line: None).run()
    assert started[:2] == ["bogus", "int4_per_head"]
    assert report.status == "complete"
    assert [(d.kv_cache_dtype, d.error) for d in report.dtypes] == [
        ("auto", None), ("int4_per_head", None), ("bogus", "no such dtype"),
    ]  # fmt: skip
    assert report.dtypes[1].points[0].step_ms.n == 3
    assert {d.fingerprint for d in report.dtypes} == {fingerprint(resolve_model("ref-7m"))}
    text = markdown(report)
    assert "not measured: no such dtype" in text
    assert "| int4_per_head | 8 x 1,024 | 10.00 (10.00-10.00) | 2.00x |" in text


@pytest.mark.parametrize("dtypes", [["auto", "fp8", "int4_per_head"], None])
def test_the_command_says_what_failed(tmp_path, monkeypatch, capsys, dtypes):
    """vLLM raises a bare Exception for what happens in a worker: it once ended the run with a traceback."""
    from vllm_ext.cli import main

    def measure(self, row):
        if row.kv_cache_dtype == "fp8":
            raise Exception("Call to collective_rpc method failed: no [/kernel]")
        made = sample(20.0)
        return made | {"points": made["points"] | {"8x64": made["points"]["8x1024"]}}

    monkeypatch.setattr(KVBench, "_measure", measure)
    words = ["kv-bench", "ref-7m", "--shape", "8x64", "--rounds", "1", "--out", str(tmp_path)]
    code = main([*words, *(["--kv-cache-dtype", *dtypes] if dtypes else [])])
    failure = "pareto kv-bench: failed: fp8: Call to collective_rpc method failed: no [/kernel]"
    assert capsys.readouterr().err.splitlines()[-1] == failure
    # Without names it measures what runs here.
    assert code == (1 if dtypes else 0)


def test_a_baseline_that_does_not_start_ends_the_run(tmp_path, monkeypatch):
    def fail(settings):
        raise ParetoError("no memory")

    monkeypatch.setattr(engine, "build_llm", fail)
    with pytest.raises(ParetoError, match="no memory"):
        KVBench(SETTINGS, tmp_path, lambda line: None).run()
    assert not (tmp_path / kv_bench.RESULT).exists()


def test_contexts_beyond_the_model_are_refused(tmp_path):
    with pytest.raises(ParetoError, match="the model's context is 8192; use at most"):
        KVBench(replace(SETTINGS, shapes=((8, 8192),)), tmp_path)


def test_rows_of_compressed_weights_and_their_own_shapes():
    settings = replace(
        SETTINGS, shapes=((8, 1024), (1, 64)), rounds=1, compressed=("models/w4",),
        compressed_kv_cache_dtypes=("auto",),
        shapes_of=(("int4_per_head", ((8, 1024),)),),
    )  # fmt: skip
    assert [row.name for row in settings.rows()] == ["auto", "int4_per_head", "w4 auto"]

    def both(step_ms):
        made = sample(step_ms)
        made["points"]["8x1024"]["prefix_prefill_s"] = step_ms / 20
        made["points"] |= {"1x16": {"step_s": 0.001, "prefill_s": 0.01}, "1x64": {"step_s": 0.002, "prefill_s": 0.1}}
        made["copy_bytes_per_s"] = 3e12
        return made

    base, int4, w4 = summarize(
        settings, {"0 auto": both(20), "0 int4_per_head": both(10), "0 w4 auto": both(5)}, {}, {}
    )
    assert [(p.batch, p.context) for p in base.points] == [(8, 1024), (1, 64)]
    assert [(p.batch, p.context) for p in int4.points] == [(8, 1024)]
    assert (base.model, w4.model) == (None, "models/w4")
    assert w4.points[0].step_ratio == pytest.approx(4)
    assert int4.points[0].prefix_ratio == pytest.approx(2)
    assert int4.points[0].prefix_tokens_per_s.median == pytest.approx(8 * 512 / 0.5)
    assert int4.points[0].context_bytes_per_s == pytest.approx(8 * 1024 * int4.kv_cache.bytes_per_token / 0.009)
    report = KVBenchReport("complete", "now", "m", "auto", {"rounds": 1, "steps": 8}, MACHINE, [base, int4, w4])
    text = markdown(report)
    assert "| w4, bf16 | 8 x 1,024 | 5.00 | 4.00x |" in text
    assert "A copy within the GPU moves 3,000 GB/s." in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "8"], "32x8192 would be"),
        (["--shape", "8x64", "--prefix-hits", "8x128"], "shapes that are not measured: 8x128"),
        (["--shape", "8x64", "--only", "fp8=8x64", "--kv-cache-dtype", "auto"], "rows that are not measured: fp8"),
        (["--only", "fp8"], "fp8=32x8192"),
        (["--compressed-kv-cache-dtype", "auto"], "--compressed-kv-cache-dtype is of the models of --compressed"),
        (["--shape", "8x64", "--context", "64"], "--shape is instead of --batch and --context"),
        (["--context", "0"], "--context must be at least 1, got 0"),
        (["--compilation-config", "{mode"], "not JSON"),
        (["--load-format", "dummy"], "has no config.json"),
    ],
)
def test_wrong_flags_get_one_line(words, message, capsys):
    from vllm_ext.cli import main

    try:
        code = main(["kv-bench", "ref-7m", *words])
    except SystemExit as stop:
        code = stop.code
    assert code not in (0, None)
    assert message in capsys.readouterr().err
