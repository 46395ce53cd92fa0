"""The bookkeeping of rows and positions in both of vLLM's model runners, on stand-ins that hold what they hold."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.quality import worker_tap

HIDDEN, VOCABULARY = 8, 30
HEAD = torch.randn(HIDDEN, VOCABULARY, generator=torch.Generator().manual_seed(0))


def head(hidden):
    return hidden @ HEAD


class V1Runner:
    def __init__(self):
        self.model = SimpleNamespace(compute_logits=head)
        self.calls = 0

    def _get_prompt_logprobs_dict(self, hidden_states, num_scheduled_tokens):
        self.calls += 1
        return {"passed": num_scheduled_tokens}

    def step(self, hidden, start, ahead):
        """Compute one request's tokens, which lie behind ``ahead`` rows of padding."""
        self.input_batch = SimpleNamespace(req_id_to_index={"r": 1})
        self.query_start_loc = SimpleNamespace(np=np.array([0, ahead, ahead + len(hidden)]))
        self.requests = {"r": SimpleNamespace(num_computed_tokens=start)}
        rows = torch.cat([torch.full((ahead, HIDDEN), torch.nan), hidden])
        return self._get_prompt_logprobs_dict(rows, {"r": len(hidden)})


class V2Runner:
    def __init__(self):
        self.prompt_logprobs_worker = SimpleNamespace(compute_prompt_logprobs=self.original)
        self.calls = 0

    def original(self, logits_fn, hidden_states, input_batch, *rest):
        self.calls += 1
        return {"passed": {"r": int(input_batch.num_scheduled_tokens[0])}}

    def step(self, hidden, start, ahead):
        batch = SimpleNamespace(
            req_ids=["r"],
            query_start_loc_np=np.array([ahead, ahead + len(hidden)]),
            num_computed_prefill_tokens_np=np.array([start]),
            num_scheduled_tokens=np.array([len(hidden)]),
        )
        rows = torch.cat([torch.full((ahead, HIDDEN), torch.nan), hidden])
        return self.prompt_logprobs_worker.compute_prompt_logprobs(head, rows, batch, "ids", "computed", "lengths")


@pytest.fixture(params=[V1Runner, V2Runner])
def worker(request, monkeypatch):
    monkeypatch.setattr(worker_tap, "_records", lambda: True)

    class Worker(worker_tap.LogitsTap):
        model_runner = request.param()

    return Worker()


def test_each_row_is_scored_at_its_position(worker):
    tokens = list(range(20))
    hidden = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1))
    worker.pareto_tap_begin([(tokens, None, None)])
    for start in (0, 8, 16):
        passed = worker.model_runner.step(hidden[start : start + 8], start, ahead=3)
        assert passed == {"passed": {"r": min(8, 20 - start)}}
    worker.model_runner.step(torch.randn(1, HIDDEN), 20, ahead=0)  # a decode step
    (figures,) = worker.pareto_tap_end()
    expected = torch.nn.functional.cross_entropy(head(hidden)[:-1], torch.tensor(tokens[1:]), reduction="none")
    np.testing.assert_allclose(figures["nll"], expected.numpy(), rtol=1e-5)
    assert figures["max_chunk"] == 8
    assert worker.model_runner.calls == 4


def test_nothing_is_recorded_between_recordings(worker):
    worker.pareto_tap_begin([([1, 2, 3], None, None)])
    worker.model_runner.step(torch.randn(3, HIDDEN), 0, ahead=0)
    worker.pareto_tap_end()
    worker.model_runner.step(torch.randn(3, HIDDEN), 0, ahead=0)
    with pytest.raises(RuntimeError, match="no recording"):
        worker.pareto_tap_end()


def test_a_second_recording_wraps_no_second_time(worker):
    for _ in range(3):
        worker.pareto_tap_begin([([1, 2, 3], None, None)])
        worker.model_runner.step(torch.randn(3, HIDDEN), 0, ahead=0)
        assert len(worker.pareto_tap_end()[0]["nll"]) == 2
    assert worker.model_runner.calls == 3


def test_an_unknown_runner_is_refused():
    class Worker(worker_tap.LogitsTap):
        model_runner = SimpleNamespace()

    with pytest.raises(RuntimeError, match="no known place"):
        Worker().pareto_tap_begin([([1, 2], None, None)])


def test_cache_bytes_count_shared_storage_once():
    storage = torch.zeros(4, 100, dtype=torch.uint8)

    class Worker(worker_tap.LogitsTap):
        model_runner = SimpleNamespace(kv_caches=[storage[0], storage[1], [torch.zeros(10, dtype=torch.bfloat16)]])

    assert Worker().pareto_kv_bytes() == 400 + 20


def test_requests_are_told_apart_by_their_number_in_any_order():
    recordings = [worker_tap.Recording([1, 2, 3]) for _ in range(3)]
    requests = worker_tap._Requests(recordings)
    assert requests.of(["10-ab", "9-cd"]) == [recordings[1], recordings[0]]
    assert requests.of(["11-x", "10-ab", "12-y"]) == [recordings[2], recordings[1], None]
    requests = worker_tap._Requests(recordings, passed_over=1)
    assert requests.of(["10-ab", "9-cd"]) == [recordings[0], None]
