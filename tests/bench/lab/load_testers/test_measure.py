"""The truth of a log, the processor time of a command, and one real run against the mock server."""

import json
import sys

import pytest

from bench.lab.load_testers.load import Load
from bench.lab.load_testers.measure import assess, measure
from bench.lab.load_testers.process import Ran, run
from bench.lab.load_testers.tokenizer import WORDS, write_tokenizer
from bench.lab.load_testers.tools.pareto import Pareto
from bench.lab.load_testers.tools.tool import Said, Tool, read_results
from bench.lab.load_testers.truth import read_truth
from kv_cache.errors import ParetoError


def served(number, received, tokens, started=True):
    times = [received + 0.2 + 0.02 * i for i in range(len(tokens))]
    return {
        "number": number, "received_unix_s": received, "started_unix_s": received if started else None,
        "token_unix_s": times, "tokens": tokens, "ended_unix_s": times[-1] if times else received + 0.1,
    }  # fmt: skip


def write_log(path, records, torn=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + torn)


def test_the_truth_of_a_log(tmp_path):
    log = tmp_path / "log"
    records = [served(i, 100 + 0.1 * i, [1] * 8) for i in range(10)]
    # In the order of their ends, as the server writes them.
    records += [served(12, 101.2, [], started=False), served(11, 101.1, []), served(10, 101.0, [1, 1, 1])]
    write_log(log, records, torn='{"number": 13')
    truth = read_truth(log, 8)
    assert (truth.requests, truth.complete, truth.cut, truth.empty, truth.refused) == (13, 10, 1, 1, 1)
    assert (truth.chunks, truth.output_tokens) == (83, 80)
    assert truth.ttft_p50_ms == pytest.approx(200, abs=0.01)
    assert truth.tpot_ms == pytest.approx(20, abs=0.01)
    assert truth.e2e_p50_ms == pytest.approx(340, abs=0.01)
    assert truth.rate == pytest.approx(10, abs=0.01)
    assert truth.uneven_p95_ms == pytest.approx(0, abs=0.01)
    assert truth.first_unix_s == 100
    assert truth.last_unix_s == pytest.approx(101.3)


def test_tokens_are_counted_not_chunks_and_uneven_arrivals_show(tmp_path):
    log = tmp_path / "log"
    write_log(log, [served(0, 100, [4, 4]), served(1, 100.5, [4, 4]), served(2, 102, [4, 4])])
    truth = read_truth(log, 8)
    assert truth.tpot_ms == pytest.approx(20 / 7, abs=0.01)
    assert truth.uneven_p95_ms == pytest.approx(450, abs=1)


def test_a_log_without_requests_is_refused(tmp_path):
    log = tmp_path / "log"
    log.touch()
    with pytest.raises(ParetoError, match="no request reached"):
        read_truth(log, 8)


BURN = "import time\nwhile time.process_time() < {}: pass\n"


def test_processor_time_of_a_whole_tree_is_counted(tmp_path):
    # The child burns more than its parent, and is gone before the parent ends.
    code = (
        f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {BURN.format(0.6)!r}])\ntime.sleep(0.3)"
    )
    ran = run([sys.executable, "-c", code], tmp_path / "log", {}, 60)
    assert (ran.exit_status, ran.stopped) == (0, False)
    # What a sample misses at the end of a process is little; processor time does not depend on what else runs.
    assert 0.5 < ran.cpu_at(ran.ended_unix_s) < 1.5
    assert ran.cpu_at(ran.started_unix_s) < 0.5
    assert ran.started_unix_s <= ran.times[0] <= ran.ended_unix_s


def test_a_command_that_hangs_is_stopped(tmp_path):
    ran = run([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log", {}, 1)
    assert ran.stopped
    assert ran.exit_status != 0


def test_costs_are_those_between_first_request_and_last_answer(tmp_path):
    log = tmp_path / "log"
    write_log(log, [served(i, 100 + i, [1] * 5) for i in range(3)])
    # Two seconds of processor time before the first request, one while they run, four after.
    ran = Ran(0, False, 97.0, 110.0, [97.0, 100.0, 102.28, 110.0], [0.0, 2.0, 3.0, 7.0])
    said = Said(3, 0, 201.5, 202.0, 20.0, None, 1.0, 15)
    record = assess(ran, said, read_truth(log, 5))
    assert (record["startup_s"], record["cpu_startup_s"], record["cpu_windup_s"]) == (3.0, 2.0, 4.0)
    assert record["cpu_load_s"] == pytest.approx(1.0, abs=1e-3)
    assert record["per_request_ms"] == pytest.approx(333.3, abs=0.1)
    assert record["per_chunk_us"] == pytest.approx(66667, abs=1)
    assert record["error"] == {"ttft_p50_ms": 1.5, "ttft_p95_ms": 2.0, "tpot_ms": 0.0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    write_tokenizer(folder)
    return folder


def test_the_mocks_words_are_one_token_each(tokenizer):
    from tokenizers import Tokenizer

    text = "".join(f" {word}" for word in WORDS * 2)
    assert len(Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode(text, add_special_tokens=False).ids) == 16
    import loadtest.mock_server.server as mock

    assert mock._WORDS == WORDS


def test_a_real_run_of_our_own(tmp_path, tokenizer):
    record = measure(Pareto(), Load(6, users=2, output_tokens=4, mock=("--fault", "empty:3")), tmp_path, tokenizer)
    assert record["exit_status"] == 1
    assert "max-error-rate" in record["problem"]
    said, truth = record["said"], record["truth"]
    assert (said["ok"], said["failed"], truth["complete"], truth["empty"]) == (4, 2, 4, 2)
    assert said["output_tokens"] == truth["output_tokens"] == 16
    # The client cannot see a token before it left.
    assert record["error"]["ttft_p50_ms"] > 0
    assert record["startup_s"] > 0
    assert record["cpu_startup_s"] > record["cpu_load_s"] > 0
    assert record["command"].startswith("pareto loadtest --base-url URL --model mock-model --concurrency 2")
    assert record["command"].endswith("--out OUT/run")


class Silent(Tool):
    """A tool that fails before its first request."""

    name, requirement, package = "silent", None, "vllm"

    def program(self, folder):
        return sys.executable

    def words(self, load, target):
        return ["-c", "raise SystemExit('error: wrong weather')"]

    def read(self, load, out):
        return read_results(out / "nothing.json")


def test_a_tool_that_cannot_is_reported_with_its_reason(tmp_path, tokenizer):
    record = measure(Silent(), Load(1, users=1), tmp_path, tokenizer)
    assert (record["exit_status"], record["said"], record["truth"], record["error"]) == (1, None, None, {})
    assert "no request reached the server" in record["problem"]
    assert "wrong weather" in record["problem"]
