"""Taps the logits of every prompt position inside vLLM's worker.

vLLM's own ``prompt_logprobs`` builds Python objects for each position, which is far too slow for full vocabularies. But
both of its model runners call one function in every step with the final hidden states of all scheduled tokens and
exact bookkeeping of which row is which position: ``GPUModelRunner._get_prompt_logprobs_dict`` (V1 runner, CPU) and
``PromptLogprobsWorker.compute_prompt_logprobs`` (Model Runner V2, GPU). The tap wraps that function, computes logits
with the model's own head and hands them to a :class:`bench.recording.Recording`. It works under compilation and CUDA
graphs, since both end before that call.

The class is given to vLLM as ``worker_extension_cls``; its methods are called with ``LLM.collective_rpc``.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.gpu_timer import copy_rate
from bench.recording import Recording


class LogitsTap:
    """Methods that vLLM mixes into its worker. ``self.model_runner`` is the worker's."""

    model_runner: Any

    def pareto_tap_begin(self, tokens: list[int], store: str | None, compare: list[str] | None) -> None:
        """Record the next request, whose prompt must be ``tokens``, until ``pareto_tap_end``."""
        _install(self)
        pair = (compare[0], compare[1]) if compare else None
        _STATE[id(self)] = Recording(tokens, store if _records() else None, pair)

    def pareto_tap_end(self) -> dict[str, Any] | None:
        """Return the figures of the recorded request; None on ranks that record nothing."""
        recording = _STATE.pop(id(self), None)
        if recording is None:
            raise RuntimeError("no recording was begun")
        return recording.finish() if _records() else None

    def pareto_kv_bytes(self) -> int:
        """Return the bytes of this rank's KV-cache tensors."""
        storages = {}
        for cache in _flatten(self.model_runner.kv_caches):
            storage = cache.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def pareto_copy_rate(self) -> float | None:
        """Return the bytes read plus written per second by a copy within the GPU; None on CPU."""
        if not torch.cuda.is_available():
            return None
        rate = copy_rate()
        torch.cuda.empty_cache()
        return rate


# Recordings by worker. Not an attribute of the worker: vLLM's class must not be able to collide with it.
_STATE: dict[int, Recording] = {}


def _records() -> bool:
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    return get_pp_group().is_last_rank and get_tensor_model_parallel_rank() == 0


def _flatten(caches: Any) -> list[torch.Tensor]:
    if isinstance(caches, torch.Tensor):
        return [caches]
    return [tensor for cache in caches for tensor in _flatten(cache)]


def _install(worker: Any) -> None:
    """Wrap the runner's function once."""
    runner = worker.model_runner
    if getattr(runner, "pareto_tapped", False):
        return
    v2 = getattr(runner, "prompt_logprobs_worker", None)
    if v2 is not None:
        _wrap_v2(worker, v2)
    elif hasattr(runner, "_get_prompt_logprobs_dict"):
        _wrap_v1(worker, runner)
    elif hasattr(runner, "prompt_logprobs_worker"):
        pass  # Model Runner V2 on a pipeline rank that computes no logits.
    else:
        raise RuntimeError(f"{type(runner).__name__} of this vLLM version has no known place to read logits from")
    runner.pareto_tapped = True


def _wrap_v1(worker: Any, runner: Any) -> None:
    original = runner._get_prompt_logprobs_dict

    def tapped(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        recording = _STATE.get(id(worker))
        if recording is not None:
            for request_id, scheduled in num_scheduled_tokens.items():
                row = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
                start = int(runner.requests[request_id].num_computed_tokens)
                _record(
                    recording,
                    runner.model.compute_logits,
                    hidden_states,
                    row=row,
                    start=start,
                    scheduled=scheduled,
                )
        return original(hidden_states, num_scheduled_tokens)

    runner._get_prompt_logprobs_dict = tapped


def _wrap_v2(worker: Any, logprobs_worker: Any) -> None:
    original = logprobs_worker.compute_prompt_logprobs

    def tapped(logits_fn: Any, hidden_states: torch.Tensor, input_batch: Any, *rest: Any, **named: Any) -> Any:
        recording = _STATE.get(id(worker))
        if recording is not None:
            for index in range(len(input_batch.req_ids)):
                row = int(input_batch.query_start_loc_np[index])
                start = int(input_batch.num_computed_prefill_tokens_np[index])
                scheduled = int(input_batch.num_scheduled_tokens[index])
                _record(recording, logits_fn, hidden_states, row=row, start=start, scheduled=scheduled)
        return original(logits_fn, hidden_states, input_batch, *rest, **named)

    logprobs_worker.compute_prompt_logprobs = tapped


def _record(
    recording: Recording, logits_fn: Any, hidden_states: torch.Tensor, *, row: int, start: int, scheduled: int
) -> None:
    """Pass on the logits of one request's scheduled tokens, less the position that predicts past the prompt.

    Args:
        recording: where to.
        logits_fn: the model's head: hidden states [n, hidden] to logits [n, vocabulary].
        hidden_states: [tokens of the step, hidden].
        row: the request's first row in the step.
        start: that row's position in the prompt.
        scheduled: the request's tokens in the step.

    """
    count = min(scheduled, recording.rows - start)
    if count <= 0:
        return
    # Every tensor-parallel rank must take part in the head's gather, also those that record nothing.
    logits = logits_fn(hidden_states[row : row + count])
    if logits is not None and _records():
        recording.add(start, scheduled, logits)
