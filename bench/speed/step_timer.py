"""Times the engine's own steps: no subtraction of whole runs, no HTTP, no tokenizer.

A batch of equal prompts is added at once and the engine is stepped by hand. Prefill lasts until every sequence has its
first token. After that each step gives every sequence one token, and the time between the outputs of two such steps is
one decode step, also where scheduling runs ahead of the GPU.
"""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Timing:
    """One measurement: seconds of prefill, and the median seconds of a decode step."""

    prefill_s: float
    step_s: float


_ids = itertools.count()


def prompts(batch: int, context: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Return random prompts of ``context`` tokens, the same for the same arguments."""
    draw = random.Random(f"{seed} {batch} {context}")
    # The first few ids are special tokens in most vocabularies.
    return [[draw.randrange(16, vocabulary) for _ in range(context)] for _ in range(batch)]


def ahead(batch: int, context: int, limit: int) -> int:
    """Return how many tokens the first sequence may have produced when the last one of a batch is prefilled.

    Args:
        batch: sequences.
        context: prompt tokens of each.
        limit: most tokens of a step.

    """
    return -(-batch * context // limit) + batch


def time_batch(llm: Any, batch_prompts: list[list[int]], steps: int) -> Timing:
    """Time one batch.

    Args:
        llm: an idle engine whose KV cache and ``max_num_seqs`` hold the whole batch.
        batch_prompts: token ids of each sequence.
        steps: decode steps to time, at least 2.

    Raises:
        RuntimeError: the batch never decoded together, e.g. because the KV cache is too small for it.

    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    limit = engine.vllm_config.scheduler_config.max_num_batched_tokens
    # Sequences prefilled first already decode while the last ones are prefilled.
    early = ahead(len(batch_prompts), max(map(len, batch_prompts)), limit)
    params = SamplingParams(max_tokens=steps + early + 3, temperature=0.0, ignore_eos=True, detokenize=False)
    names = [f"time-{next(_ids)}" for _ in batch_prompts]
    started = time.perf_counter()
    for name, tokens in zip(names, batch_prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": tokens}, params)
    counts: dict[str, int] = {}
    prefill = 0.0
    stamps: list[float] = []
    try:
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            advanced = 0
            for output in outputs:
                produced = len(output.outputs[0].token_ids)
                advanced += produced > counts.get(output.request_id, 0)
                counts[output.request_id] = produced
            if not prefill:
                if len(counts) == len(names) and min(counts.values()) > 0:
                    prefill = now - started
            elif advanced == len(names):
                stamps.append(now)
            if len(stamps) > steps:
                break
    finally:
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
    if len(stamps) < 2:
        raise RuntimeError(
            f"{len(names)} sequences of {len(batch_prompts[0])} tokens never decoded together: the KV cache or "
            "max_num_seqs is too small for them"
        )
    return Timing(prefill, median(b - a for a, b in itertools.pairwise(stamps)))
