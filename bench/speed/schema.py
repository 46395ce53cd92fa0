"""What ``kv-bench.json`` holds: typed results, apart from the code that measures them. ``None`` is never zero."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bench.schema import KVCache

SCHEMA = "vllm-pareto/kv-bench/1"


@dataclass(frozen=True)
class Spread:
    """Repeats of one measurement: their median, extremes and number."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Point:
    """One batch size and context length.

    Attributes:
        batch: sequences decoded together.
        context: prompt tokens of each.
        step_ms: time of one decode step of the whole batch, milliseconds.
        step_ratio: baseline's median step time divided by this one: above 1 is faster than bf16. Compare only within
            one file, where rounds alternate between the dtypes.
        prefill_tokens_per_s: prompt tokens of the batch divided by the time until all have their first token.
        prefill_ratio: this divided by the baseline's: above 1 is faster.
        context_ms: the step's time less that of the same batch at a context of 16 tokens: what reading the context
            costs, which is attention and little else. Can be slightly negative by noise at short contexts.
        context_ratio: baseline's ``context_ms`` divided by this one; None where either is not above 0.
        prefix_tokens_per_s: as prefill_tokens_per_s, of the second half of prompts whose first half is in the prefix
            cache; None where not measured.
        prefix_ratio: this divided by the baseline's.
        context_bytes_per_s: the context's bytes in the cache divided by context_ms; the attention kernels and all that
            comes with them, so less than the kernels' own rate. None where context_ms is not above 0.
        copy_bytes_per_s: bytes read plus written per second by a copy within the same GPU: the ceiling; None on CPU.

    """

    batch: int
    context: int
    step_ms: Spread
    step_ratio: float | None
    prefill_tokens_per_s: Spread
    prefill_ratio: float | None
    context_ms: Spread
    context_ratio: float | None
    prefix_tokens_per_s: Spread | None = None
    prefix_ratio: float | None = None
    context_bytes_per_s: float | None = None
    copy_bytes_per_s: float | None = None


@dataclass(frozen=True)
class DtypeResult:
    """One KV-cache dtype.

    Attributes:
        kv_cache_dtype: as given to vLLM.
        error: one line why it could not be measured; then nothing else is set.
        kv_cache: memory and capacity.
        capacity_ratio: tokens that fit divided by the baseline's, at the same memory.
        points: by batch and context, those measured so far.
        model: the folder of compressed weights; None for the run's own model.
        fingerprint: SHA-256 over the model's configuration, tokenizer and weights, as in eval.json; None for a
            shape without weights, and in results of earlier versions.

    """

    kv_cache_dtype: str
    error: str | None
    kv_cache: KVCache | None
    capacity_ratio: float | None
    points: list[Point]
    model: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class KVBenchReport:
    """A whole run. ``baseline`` names the dtype that ratios refer to; ``status`` is ``complete`` or ``partial``."""

    status: str
    created_at: str
    model: str
    baseline: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    dtypes: list[DtypeResult]
    schema: str = field(default=SCHEMA)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document, its ``schema`` first."""
        document = asdict(self)
        return {"schema": document.pop("schema"), **document}
