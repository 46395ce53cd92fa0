"""The bench of the endpoint: its arithmetic by hand, its loads against a mock server, and one real one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from bench.server import Server
from bench.speed import serve_bench, serve_command
from bench.speed.endpoint import ask, memory_of, word_tokenizer
from bench.speed.energy import CannotMeasure
from bench.speed.serve_bench import ServeBench, Settings
from bench.speed.served_schema import Idle, Memory, ServeBenchReport
from bench.speed.served_summary import decode_joules, prefill_share, summarize
from bench.speed.served_table import HEADINGS, cells, markdown, notes
from bench.speed.worker_memory import peak_rss
from kv_cache.errors import ParetoError
from loadtest.mock_server import MockConfig, MockServer
from tests.bench.result_files import load, point_round, served_round, turns
from vllm_ext.cli import build_parser

SETTINGS = Settings(
    model="ref-7m", kv_cache_dtypes=("auto", "int4_per_head"), batches=(2,), contexts=(64,), output_tokens=8,
    duration_s=1.5, rounds=1, idle_s=1.0, side_by_side=False,
    max_num_batched_tokens=2048, dtype="auto", kv_cache_memory_bytes=1 << 28, enforce_eager=True,
    tensor_parallel_size=1, seed=0,
)  # fmt: skip
RANK = {
    "weights": None, "kv_cache": 1 << 28, "allocated": None, "peak_allocated": None, "profiled_activations": None,
    "peak_rss": 5 << 28, "token_cost": [816.0, 1536],
}  # fmt: skip


def test_joules_are_told_apart_by_hand():
    # 50 W at rest. Prefill: 2 s, 300 J, 1,000 prompt tokens: 0.3 J a token, 0.2 without the idle power.
    # Generation: 4 s, 700 J, 500 prompt tokens (150 J, 100 net), 10 answers of 21 tokens: 550 J for 200 tokens; net
    # 700 - 200 - 100 = 400 J.
    point = point_round(load(2.0, 1000, 10, 10, [300.0]), load(4.0, 500, 210, 10, [400.0, 300.0]))
    (base,) = summarize(turns(auto=[served_round(point, idle=Idle(50.0, 5.0))]))
    (found,) = base.points
    energy = found.energy
    assert energy.prefill.median == pytest.approx(0.3)
    assert energy.prefill_net.median == pytest.approx(0.2)
    assert energy.decode.median == pytest.approx(550 / 200)
    assert energy.decode_net.median == pytest.approx(2.0)
    assert energy.output.median == pytest.approx(700 / 210)
    assert energy.output_net.median == pytest.approx(500 / 210)
    assert energy.prefill_share.median == pytest.approx(150 / 700)
    assert found.prefill_tokens_per_s.median == 500
    assert found.output_tokens_per_s.median == pytest.approx(52.5)
    assert found.notes == []


def test_ratios_are_taken_within_rounds_and_rounds_are_kept_raw():
    def turn(index, slow, factor):
        generation = load(4.0 * slow, 500, 210, 10, [700.0 * factor])
        return replace(served_round(point_round(load(2.0, 1000, 10, 10, [300.0 * factor]), generation)), index=index)

    drift = (1, 2, 3)
    auto = [turn(i, slow, 1) for i, slow in enumerate(drift)]
    int4 = [turn(i, slow / 2, 0.5) for i, slow in enumerate(drift)]
    base, ours = summarize(turns(auto=auto, int4_per_head=int4))
    point = ours.points[0]
    assert point.output_ratio == pytest.approx(2)
    assert point.decode_energy_ratio == pytest.approx(0.5)
    rates = point.output_tokens_per_s
    assert (rates.low, rates.median, rates.high, rates.n) == pytest.approx((35, 52.5, 105, 3))
    assert base.points[0].decode_energy_ratio == 1
    assert ours.rounds == int4


@pytest.mark.parametrize(
    ("prefill", "generation", "note"),
    [
        (load(2.0, 1000, 10, 10, None, "no board"), load(4.0, 500, 210, 10, None, "no board"), "no energy: no board"),
        (load(2.0, 1000, 10, 10, [300.0], failed=1), load(4.0, 500, 210, 10, [700.0]), "1 requests failed"),
        (load(2.0, 1000, 10, 10, None, lag_ms=25.0), load(4.0, 500, 210, 10, None), "ran late (P99 25 ms)"),
        (load(2.0, 1000, 10, 10, [300.0]), load(0.6, 500, 210, 10, None, "too short"), "no energy: too short"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_none_with_its_reason(prefill, generation, note):
    (point,) = summarize(turns(auto=[served_round(point_round(prefill, generation))]))[0].points
    assert point.energy is None
    assert point.decode_energy_ratio is None
    assert any(note in each for each in point.notes)
    assert point.output_tokens_per_s.median > 0


def test_few_failed_requests_leave_energy_as_a_bound():
    point = point_round(load(2.0, 1000, 99, 99, [300.0], failed=1), load(4.0, 500, 210, 10, [700.0]))
    (found,) = summarize(turns(auto=[served_round(point)]))[0].points
    assert found.energy.prefill.median == pytest.approx(0.3)
    assert found.notes[-1] == (
        "1 requests failed, and what they took brought no token, so energy a token is up to 1.0% too high"
    )


def test_without_idle_power_nothing_is_net_but_the_rest_stands():
    point = point_round(load(2.0, 1000, 10, 10, [300.0]), load(4.0, 500, 210, 10, [700.0]))
    (found,) = summarize(turns(auto=[served_round(point, idle=Idle(None, 0.0, "--idle-seconds 0"))]))[0].points
    assert found.energy.decode.median == pytest.approx(2.75)
    assert (found.energy.prefill_net, found.energy.decode_net, found.energy.output_net) == (None, None, None)
    assert found.notes == ["no idle power: --idle-seconds 0"]


def test_decoding_that_seems_to_have_cost_nothing_is_not_told():
    point = point_round(load(2.0, 1000, 10, 10, [900.0]), load(4.0, 1000, 210, 10, [700.0]))
    assert decode_joules(point, Idle(None, 0.0)) is None
    assert prefill_share(point, Idle(None, 0.0)) > 1
    assert any(
        "raise --output-tokens" in note for note in summarize(turns(auto=[served_round(point)]))[0].points[0].notes
    )


def test_memory_of_ranks_is_added_and_what_is_unknown_stays_so():
    gpu = {"weights": 100, "kv_cache": 50, "allocated": 170, "peak_allocated": 200, "profiled_activations": None}
    assert memory_of([gpu, gpu], 7) == Memory(200, 100, 60, 40, 400, None)
    assert memory_of([RANK], 7) == Memory(7, 1 << 28, None, None, 5 << 28, None)
    assert memory_of([RANK | {"peak_rss": None}], None) == Memory(None, 1 << 28, None, None, None, None)


def test_the_largest_resident_set_is_read(tmp_path):
    (tmp_path / "status").write_text("VmPeak:\t  9 kB\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n")
    assert peak_rss(tmp_path / "status") == 2 << 20
    assert peak_rss(tmp_path / "none") is None


def test_every_id_of_a_shapes_tokenizer_is_a_word(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(word_tokenizer(tmp_path / "t", 50))
    assert [tokenizer.decode([i]) for i in (0, 16, 49)] == ["w0", "w16", "w49"]
    assert tokenizer("w3 w49")["input_ids"] == [3, 49]


class Board:
    """A counter of 100 W, and of 300 while the server has requests."""

    name, devices = "made up", ("board",)

    def __init__(self, mock):
        self.mock, self.joules, self.at = mock, 0.0, time.time()

    def read(self):
        now = time.time()
        self.joules += (300 if self.mock._running else 100) * (now - self.at)
        self.at = now
        return [self.joules]


@pytest.fixture
def endpoint(monkeypatch):
    """A mock server in place of vLLM's; returns it and the words with which servers were started."""
    started = []
    with MockServer(MockConfig(models=("ref-7m",), ttft_ms=20, itl_ms=20)) as mock:

        @contextlib.contextmanager
        def starting(words, log, *, variables):
            dtype = words[words.index("--kv-cache-dtype") + 1]
            started.append(dtype)
            assert variables["VLLM_SERVER_DEV_MODE"] == "1"

            def wait():
                if dtype == "bogus":
                    raise ParetoError("the server ended with status 2 before it answered; unknown dtype")
                return Server(mock.url, log, 0)

            try:
                yield SimpleNamespace(wait=wait)
            finally:
                started.append("stopped")

        monkeypatch.setattr(serve_bench, "starting", starting)
        monkeypatch.setattr(serve_bench, "ask", lambda server, method: [RANK])
        yield mock, started


def test_energy_and_latencies_are_of_the_same_requests(endpoint, tmp_path):
    mock, started = endpoint
    lines = []
    settings = replace(SETTINGS, kv_cache_dtypes=("auto", "bogus"))
    bench = ServeBench(settings, tmp_path, lines.append, lambda gpus: Board(mock))
    report = bench.run()
    assert started == ["auto", "stopped", "bogus", "stopped"]
    base, bogus = report.dtypes
    assert bogus.error == "the server ended with status 2 before it answered; unknown dtype"
    assert lines[:2] == ["2 turns of at least 4 s each, and the servers' starts", "round 1 of 1: auto"]
    assert base.kv_cache.tokens == 16_000
    assert base.kv_cache.bits_per_element == 4.25
    (turn,) = base.rounds
    assert turn.idle.watts == pytest.approx(100, rel=0.05)
    (point,) = turn.points
    assert {body["max_tokens"] for body in mock.requests} == {1, 8}
    assert all(len(body["prompt"]) == 64 for body in mock.requests)
    for each in (point.prefill, point.generation):
        assert each.window_s > 1
        # The board takes 100 W while nothing is asked, which a slow machine does to it between requests, and else 300.
        assert 100 < sum(each.joules) / each.window_s < 310
    assert point.generation.output_tokens == 8 * point.generation.ok
    # Eight tokens 20 ms apart.
    assert point.generation.e2e_ms.p50 > 140
    (figures,) = base.points
    joules, tokens = sum(point.generation.joules), point.generation.output_tokens
    assert figures.energy.output.median == pytest.approx(joules / tokens)
    net = joules - turn.idle.watts * point.generation.window_s
    assert figures.energy.output_net.median == pytest.approx(net / tokens)
    text = json.loads((tmp_path / "serve-bench.json").read_text())
    assert text["schema"] == "vllm-pareto/serve-bench/1"
    assert text["status"] == "complete"
    assert text["energy"]["name"] == "made up"
    page = markdown(report)
    assert "not measured: the server ended" in page
    assert "Energy: made up (board), which moves every" in page


def test_a_run_resumes_after_an_interruption_and_raises_its_rounds(endpoint, tmp_path, monkeypatch):
    _, started = endpoint
    done = []

    def turn(self, name, index, server_of):
        with server_of(name):
            done.append((name, index))
            if len(done) == 3:
                raise KeyboardInterrupt
            return asdict(served_round(point_round(load(2.0, 10, 10, 10, [3.0]), load(4.0, 10, 210, 10, [7.0]))))

    monkeypatch.setattr(ServeBench, "_turn", turn)
    monkeypatch.setattr(ServeBench, "_warm_up", lambda *_: None)
    settings = replace(SETTINGS, rounds=2, side_by_side=True)

    def bench(rounds):
        return ServeBench(replace(settings, rounds=rounds), tmp_path, lambda line: None, lambda gpus: Board(None))

    with pytest.raises(KeyboardInterrupt):
        bench(2).run()
    # Side by side: both started once, and stopped.
    assert started == ["auto", "int4_per_head", "stopped", "stopped"]
    assert json.loads((tmp_path / "serve-bench.json").read_text())["status"] == "partial"
    report = bench(2).run()
    assert done[3:] == [("auto", 1), ("int4_per_head", 1)]
    assert [len(dtype.rounds) for dtype in report.dtypes] == [2, 2]
    started.clear()
    assert bench(2).run().status == "complete"
    assert started == []
    assert len(bench(3).run().dtypes[0].rounds) == 3


def command(*words):
    return serve_command.run(build_parser("serve-bench", serve_command).parse_args([str(word) for word in words]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", 0], "--batch must be at least 1"),
        (["--output-tokens", 1], "--output-tokens must be at least 2"),
        (["--duration", 1], "--duration must be at least 1.5 s"),
        (["--idle-seconds", 0.5], "--idle-seconds must be at least 1, or 0"),
        (["--context", 9000], "use a --context of at most 8056"),
        (["--compilation-config", "{"], "is not JSON"),
    ],
)
def test_bad_flags_are_refused_in_one_line(words, message, tmp_path):
    with pytest.raises(ParetoError, match=message) as caught:
        command("ref-7m", "--out", tmp_path, *words)
    assert "\n" not in str(caught.value)


def test_a_server_without_the_door_is_named(tmp_path):
    with MockServer() as mock, pytest.raises(ParetoError, match="/collective_rpc answered 404"):
        ask(Server(mock.url, tmp_path, 0), "pareto_memory")


def test_columns_that_nobody_has_are_left_out():
    def document(joules, missing=None):
        point = point_round(load(2.0, 1000, 10, 10, joules, missing), load(4.0, 500, 210, 10, joules, missing))
        dtypes = summarize(turns(auto=[served_round(point)]))
        return ServeBenchReport("complete", "", "m", None, "auto", {}, {}, None, dtypes)

    assert cells(document([300.0]))[0] == list(HEADINGS)
    without = document(None, "no counter")
    assert not [heading for heading in cells(without)[0] if "J/token" in heading or heading == "energy"]
    assert notes(without) == ["no energy: no counter"]


@pytest.mark.long  # The demo's test serves and loads in every run.
@pytest.mark.engine
def test_a_real_endpoint_is_measured_and_leaves_no_server_behind(tmp_path):
    """Two dtypes side by side, on ref-7m; then Ctrl-C while they start."""
    counter = SimpleNamespace(name="made up", devices=("a",), read=lambda: [100 * time.time()])
    settings = replace(SETTINGS, side_by_side=True, batches=(1, 2), contexts=(200,))
    report = ServeBench(settings, tmp_path / "out", lambda line: None, lambda gpus: counter).run()
    base, ours = report.dtypes
    assert (base.error, ours.error) == (None, None)
    assert base.memory.weights == pytest.approx(13.6e6, rel=0.02)
    assert base.memory.kv_cache <= 1 << 28 < base.memory.peak
    assert (base.memory.activations, base.memory.profiled_activations) == (None, None)
    assert ours.kv_cache.bits_per_element == 4.25
    assert ours.capacity_ratio == pytest.approx(16 / 4.25, rel=0.01)
    for point in (*base.points, *ours.points):
        assert point.failed == 0
        assert point.requests > 0
        assert point.tpot_p50_ms.median > 0
        assert point.energy is None or point.energy.output.median > 0
    assert [(p.batch, p.context) for p in ours.points] == [(1, 200), (2, 200)]

    words = ["serve-bench", "ref-7m", "--kv-cache-dtype", "auto", "--out", tmp_path / "second", "--context", "64"]
    # Ctrl-C is ignored in what is started in the background.
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from vllm_ext.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, words)], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "round 1 of 3" in line:
            break
    time.sleep(3)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    assert children
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not any(
        subprocess.run(["pgrep", "-g", child], capture_output=True, check=False).stdout for child in children
    )


def test_a_counter_that_is_missing_says_why_and_the_rest_is_measured(tmp_path):
    def none(gpus):
        raise CannotMeasure("no counter here")

    lines = []
    bench = ServeBench(SETTINGS, tmp_path, lines.append, none)
    assert lines == ["energy cannot be measured: no counter here"]
    assert bench._idle(None) == Idle(None, 0.0, "no counter here")
    assert bench.report("partial").energy.missing == "no counter here"
