"""Taps the logits of every prompt position inside vLLM's worker.

vLLM's own ``prompt_logprobs`` builds Python objects for each position, which is far too slow for full vocabularies. But
both of its model runners call one function in every step with the final hidden states of all scheduled tokens and
exact bookkeeping of which row is which position: ``GPUModelRunner._get_prompt_logprobs_dict`` (V1 runner, CPU) and
``PromptLogprobsWorker.compute_prompt_logprobs`` (Model Runner V2, GPU). The tap wraps that function, computes logits
with the model's own head and hands them to a :class:`bench.quality.recording.Recording`. It works under compilation and
CUDA graphs, since both end before that call.

The class is given to vLLM as ``worker_extension_cls``; its methods are called with ``LLM.collective_rpc``.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.gpu_timer import copy_rate
from bench.quality.recording import Block, Recording, add


class LogitsTap:
    """Methods that vLLM mixes into its worker. ``self.model_runner`` is the worker's."""

    model_runner: Any

    def pareto_tap_begin(
        self, windows: list[tuple[list[int], str | None, list[str] | None]], passed_over: int = 0
    ) -> None:
        """Record the next requests until ``pareto_tap_end``; the n-th request's prompt must be the n-th window.

        Args:
            windows: tokens, file to write the logits to, and the baseline's file and its dtype's name, of each.
            passed_over: requests that come before those of the windows.

        """
        _install(self)
        _STATE[id(self)] = _Requests(
            [
                Recording(tokens, store if _records() else None, (compare[0], compare[1]) if compare else None)
                for tokens, store, compare in windows
            ],
            passed_over,
        )

    def pareto_tap_end(self) -> list[dict[str, Any]] | None:
        """Return the figures of the recorded requests; None on ranks that record nothing."""
        requests = _STATE.pop(id(self), None)
        if requests is None:
            raise RuntimeError("no recording was begun")
        return [recording.finish() for recording in requests.recordings] if _records() else None

    def pareto_kv_bytes(self) -> int:
        """Return the bytes of this rank's KV-cache tensors."""
        storages = {}
        for cache in _flatten(self.model_runner.kv_caches):
            storage = cache.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def pareto_token_cost(self) -> tuple[float, float | None]:
        """Return what one token takes of this rank's pages, all layers; see :func:`token_cost`."""
        return token_cost(self.model_runner.kv_cache_config.kv_cache_groups)

    def pareto_copy_rate(self) -> float | None:
        """Return the bytes read plus written per second by a copy within the GPU; None on CPU."""
        if not torch.cuda.is_available():
            return None
        rate = copy_rate()
        torch.cuda.empty_cache()
        return rate


def token_cost(groups: list[Any]) -> tuple[float, float | None]:
    """Return the bytes of one token in the pages of all layers, and for how many elements of keys and values.

    By the pages' own shape: the tokens that vLLM says fit into the memory are whole windows, and so fewer than its
    pages hold.

    Args:
        groups: vLLM's groups of layers whose pages are alike.

    Returns:
        The bytes, padding excluded, and the elements; None for these where a layer keeps something else than keys and
        values, such as a latent or a state.

    """
    total, elements, plain = 0.0, 0, True
    for group in groups:
        for name in group.layer_names:
            spec = group.kv_cache_spec
            spec = getattr(spec, "kv_cache_specs", {}).get(name, spec)
            total += getattr(spec, "real_page_size_bytes", spec.page_size_bytes) / spec.block_size
            kind = type(spec).__name__
            plain = plain and hasattr(spec, "num_kv_heads") and "MLA" not in kind and "Mamba" not in kind
            if plain:
                elements += spec.num_kv_heads * (spec.head_size + (getattr(spec, "head_size_v", 0) or spec.head_size))
    return total, elements if plain and elements else None


class _Requests:
    """Which recording belongs to which of vLLM's requests: they come in the order in which they were asked."""

    def __init__(self, recordings: list[Recording], passed_over: int = 0) -> None:
        self.recordings = recordings
        self._order: list[Recording | None] = [*([None] * passed_over), *recordings]
        self._known: dict[str, Recording | None] = {}

    def of(self, request_ids: list[str]) -> list[Recording | None]:
        """Return the recordings of a step's requests; None for one beyond the windows."""
        # vLLM counts requests; what follows the number makes it unique. A batch may be in any order.
        new = sorted((name for name in request_ids if name not in self._known), key=_number)
        for name in new:
            if len(self._known) < len(self._order):
                self._known[name] = self._order[len(self._known)]
        return [self._known.get(name) for name in request_ids]


def _number(request_id: str) -> int:
    digits = request_id.partition("-")[0]
    return int(digits) if digits.isdigit() else 0


# Recordings by worker. Not an attribute of the worker: vLLM's class must not be able to collide with it.
_STATE: dict[int, _Requests] = {}


def _records() -> bool:
    from vllm_ext.compat import get_pp_group, get_tensor_model_parallel_rank

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
        requests = _STATE.get(id(worker))
        if requests is not None:
            names = list(num_scheduled_tokens)
            places = [
                (
                    int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]]),
                    int(runner.requests[name].num_computed_tokens),
                    num_scheduled_tokens[name],
                )
                for name in names
            ]
            _record(requests.of(names), places, runner.model.compute_logits, hidden_states)
        return original(hidden_states, num_scheduled_tokens)

    runner._get_prompt_logprobs_dict = tapped


def _wrap_v2(worker: Any, logprobs_worker: Any) -> None:
    original = logprobs_worker.compute_prompt_logprobs

    def tapped(logits_fn: Any, hidden_states: torch.Tensor, input_batch: Any, *rest: Any, **named: Any) -> Any:
        requests = _STATE.get(id(worker))
        if requests is not None:
            names = list(input_batch.req_ids)
            rows, starts = input_batch.query_start_loc_np, input_batch.num_computed_prefill_tokens_np
            counts = input_batch.num_scheduled_tokens
            places = [(int(rows[index]), int(starts[index]), int(counts[index])) for index in range(len(names))]
            _record(requests.of(names), places, logits_fn, hidden_states)
        return original(logits_fn, hidden_states, input_batch, *rest, **named)

    logprobs_worker.compute_prompt_logprobs = tapped


def _record(
    recordings: list[Recording | None], places: list[tuple[int, int, int]], logits_fn: Any, hidden_states: torch.Tensor
) -> None:
    """Pass on the logits of a step's requests, less the position of each that predicts past its prompt.

    Args:
        recordings: of each request, None for one that is not recorded.
        places: of each request: its first row in the step, that row's position in the prompt, its tokens in the step.
        logits_fn: the model's head: hidden states [n, hidden] to logits [n, vocabulary].
        hidden_states: [tokens of the step, hidden].

    """
    blocks, rows = [], []
    for recording, (row, start, scheduled) in zip(recordings, places, strict=True):
        count = 0 if recording is None else min(scheduled, recording.rows - start)
        if recording is not None and count > 0:
            blocks.append(Block(recording, start, count, scheduled))
            rows.append(hidden_states[row : row + count])
    if not blocks:
        return
    # Every tensor-parallel rank must take part in the head's gather, also those that record nothing.
    logits = logits_fn(torch.cat(rows))
    if logits is not None and _records():
        add(blocks, logits)
