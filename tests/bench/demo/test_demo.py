import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.demo.demo import ANSWER, CONTEXT, PRETRAINED, Demo, Size, cache_memory
from bench.report.documents import collect
from bench.report.rows import make_rows
from kv_cache.errors import ParetoError

RESULTS = {"compress": "config.json", "eval": "eval.json", "serve-bench": "serve-bench.json"}


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """A demo whose commands only write their results; returns it and the commands that ran."""
    ran = []

    def run(self, name, words):
        ran.append(words)
        if words[0] in RESULTS:
            folder = Path(words[words.index("--out") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RESULTS[words[0]]).write_text("{}")

    monkeypatch.setattr(Demo, "_run", run)
    lines = []
    return Demo("ref-7m", tmp_path, Size(), lines.append), ran, lines


def value(words, flag):
    return words[words.index(flag) + 1]


def dtypes(words):
    start = words.index("--kv-cache-dtype") + 1
    return words[start : words.index("--out")]


def test_the_chain_serves_original_and_compressed_weights_with_one_small_memory(chain, tmp_path):
    demo, ran, _ = chain
    assert demo.run() == tmp_path / "report.html"
    w4 = str(tmp_path / "ref-7m-w4")
    assert [w[0] for w in ran] == ["compress", "eval", "eval", "serve-bench", "serve-bench", "report"]
    assert [(w[1], dtypes(w)) for w in ran[1:5]] == [
        ("ref-7m", ["int8_per_head", "int4_per_head"]), (w4, ["auto", "int4_per_head"]),
        ("ref-7m", ["auto", "int8_per_head", "int4_per_head"]), (w4, ["auto", "int4_per_head"]),
    ]  # fmt: skip
    assert len({value(w, "--kv-cache-memory-bytes") for w in ran[3:5]}) == 1


def test_the_weights_stay_as_they_are_where_nothing_is_said_of_compression(chain, tmp_path):
    _, ran, lines = chain
    Demo("ref-7m", tmp_path, PRETRAINED, lines.append).run()
    assert [w[0] for w in ran] == ["eval", "serve-bench", "report"]
    assert not any("w4" in word for words in ran for word in words)
    assert [line.split("]")[0] for line in lines] == ["[1/3", "[2/3", "[3/3"]


def test_the_cache_holds_two_requests_in_bf16_and_int4_holds_all_users(tmp_path):
    shape = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    request = 30 * 2 * 3 * 64 * 2 * (CONTEXT + ANSWER)
    assert cache_memory(tmp_path) == 104 << 20
    assert 2 <= cache_memory(tmp_path) / request < 3
    for size in (Size(), PRETRAINED):
        assert 3 < int(value(size.speed, "--batch")) <= 4 * 2.17


def test_finished_steps_are_not_repeated_and_changed_ones_are(chain):
    demo, ran, lines = chain
    demo.run()
    ran.clear()
    demo.run()
    assert [w[0] for w in ran] == ["report"]
    assert sum("done already" in line for line in lines) == 5
    (demo.out / "speed-ref-7m" / "serve-bench.json").unlink()
    ran.clear()
    demo.run()
    assert [w[0] for w in ran] == ["serve-bench", "report"]
    other = Demo("ref-7m", demo.out, replace(demo.size, evaluate=("--num-windows", "1")), lines.append)
    ran.clear()
    other.run()
    assert [w[0] for w in ran] == ["eval", "eval", "report"]


def test_a_failing_command_names_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    demo = Demo("ref-7m", tmp_path, Size(), lambda line: None)
    with pytest.raises(ParetoError, match=r"pareto compress failed with status 1.*compress\.log"):
        demo.run()
    assert not (tmp_path / "state.json").exists()


@pytest.mark.engine
def test_the_whole_chain_on_the_embedded_model(tmp_path, monkeypatch):
    # The evaluation's engines in its own process, so that vLLM is imported once; the smoke study's are apart.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    size = Size(
        kv_cache_dtypes=("int4_per_head",),
        compress=None,
        evaluate=("--num-windows", "1", "--window-tokens", "256", "--no-needle"),
        speed=(
            "--batch", "4", "--context", "512", "--output-tokens", "8", "--duration", "1.5", "--rounds", "1",
            "--idle-seconds", "0", "--kv-cache-memory-bytes", str(4 << 20), "--side-by-side",
        ),
    )  # fmt: skip
    demo = Demo("ref-7m", tmp_path, size, print)
    assert "ref-7m" in demo.run().read_text()
    rows, _ = make_rows(collect(demo.results()), context_tokens=0)
    base, int4 = rows
    assert int4.get("kv_tokens") > 3 * base.get("kv_tokens")
    for key in ("ttft_p95_ms", "output_tokens_per_s", "perplexity", "kl"):
        assert int4.get(key) > 0, key
