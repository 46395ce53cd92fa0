"""What ``serve-bench.json`` holds: typed results, apart from the code that measures them. ``None`` is never zero."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bench.schema import KVCache
from bench.speed.schema import Spread
from loadtest.results.schema import Distribution

SCHEMA = "vllm-pareto/serve-bench/1"


@dataclass(frozen=True)
class EnergySource:
    """Which counter was read.

    Attributes:
        name: the counter, in words; None without one.
        devices: whose energy it is, in the order of every list of joules.
        resolution_s: usual time between two of its steps as seen here, not finer than the 0.02 s between readings; a
            window is off by at most one step at each end. None if unknown.
        missing: why there is none; None if there is one.

    """

    name: str | None
    devices: list[str]
    resolution_s: float | None
    missing: str | None


@dataclass(frozen=True)
class Memory:
    """Bytes of all ranks together, at the end of a round's load.

    Attributes:
        weights: vLLM's own figure of what loading the model took; on CPU, where it takes none, the checkpoint's
            tensors, None for a shape without any.
        kv_cache: of the cache's tensors.
        activations: most that PyTorch held on the GPUs during the load, less what it holds at rest; None on CPU.
        other: what it holds at rest beside weights and cache: CUDA graphs, buffers of the engine; None on CPU.
        peak: most that PyTorch held on the GPUs during the load; on CPU the workers' largest resident set since they
            started, of which the cache is a part as far as it was ever used.
        profiled_activations: vLLM's own forecast, which it makes only where it sizes the cache itself; None else.

    """

    weights: int | None
    kv_cache: int
    activations: int | None
    other: int | None
    peak: int | None
    profiled_activations: int | None


@dataclass(frozen=True)
class Idle:
    """The power of the devices while the server is up and has nothing to do, before a round's load.

    Attributes:
        watts: of all devices; None if it cannot be measured.
        seconds: for how long it was watched.
        missing: why there is no figure.

    """

    watts: float | None
    seconds: float
    missing: str | None = None


@dataclass(frozen=True)
class Load:
    """One stage of ``pareto loadtest``, a closed loop.

    Attributes:
        ok: requests that succeeded.
        failed: requests that did not.
        window_s: first start to last end, the window of the rates and of the energy.
        prompt_tokens: of all successful requests.
        output_tokens: of all successful requests.
        preemptions: how often the server took a running request's cache away; None if it does not say.
        ttft_ms: time to the first token.
        tpot_ms: time per token after the first; None where each answer has one token.
        e2e_ms: start to end.
        generator_lag_ms: by how much the load generator's own loop ran late (P99 of all its stages); latencies include
            it; None if unknown.
        joules: of each device in the window; None if it cannot be measured.
        missing: why there are no joules.

    """

    ok: int
    failed: int
    window_s: float
    prompt_tokens: int
    output_tokens: int
    preemptions: int | None
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    e2e_ms: Distribution | None
    generator_lag_ms: float | None
    joules: list[float] | None
    missing: str | None = None


@dataclass(frozen=True)
class PointRound:
    """The two loads of a batch size and context: one token each (prefill), and ``output_tokens`` each (generation)."""

    batch: int
    context: int
    prefill: Load
    generation: Load


@dataclass(frozen=True)
class Round:
    """One turn of a dtype, as it was measured.

    Attributes:
        index: of the round.
        at: seconds since the Unix epoch.
        idle: power before the load.
        energy_step_s: see :attr:`EnergySource.resolution_s`.
        memory: at the end.
        kv_cache: as vLLM allocated it.
        points: each context with every batch size.

    """

    index: int
    at: float
    idle: Idle
    energy_step_s: float | None
    memory: Memory
    kv_cache: KVCache
    points: list[PointRound]


@dataclass(frozen=True)
class Energy:
    """Joules a token, each over rounds; ``net`` is less the idle power for as long as the window was.

    Attributes:
        prefill: of the prefill load, a prompt token.
        prefill_net: the same, idle power taken off.
        decode: of the generation load less what its prompts cost by ``prefill``, a token after each answer's first.
        decode_net: the same, idle power taken off.
        output: of the whole generation load, prompts included, a token of the answers: what a user's token costs.
        output_net: the same, idle power taken off.
        prefill_share: of the generation load's energy, what was taken off for its prompts: the larger, the more
            ``decode`` depends on that subtraction.

    """

    prefill: Spread
    prefill_net: Spread | None
    decode: Spread | None
    decode_net: Spread | None
    output: Spread
    output_net: Spread | None
    prefill_share: Spread


@dataclass(frozen=True)
class ServedPoint:
    """One batch size and context, over the rounds. Percentiles are a round's own; their median over rounds counts.

    Attributes:
        batch: requests in flight (users of a closed loop).
        context: prompt tokens of each.
        output_tokens_per_s: of the generation load.
        output_ratio: this divided by the baseline's, within rounds: above 1 is faster.
        prefill_tokens_per_s: prompt tokens of the prefill load a second.
        prefill_ratio: this divided by the baseline's.
        ttft_p50_ms: of the generation load, as all latencies.
        ttft_p95_ms: so too.
        tpot_p50_ms: None if every answer has one token.
        tpot_p95_ms: so too.
        e2e_p50_ms: so too.
        e2e_p95_ms: so too.
        requests: successful ones of the generation load, all rounds.
        failed: requests of both loads that failed.
        energy: None if it cannot be measured.
        decode_energy_ratio: joules a decoded token (``decode``) divided by the baseline's: below 1 is less.
        notes: what to know before the figures are trusted, why there is no energy among it.

    """

    batch: int
    context: int
    output_tokens_per_s: Spread
    output_ratio: float | None
    prefill_tokens_per_s: Spread
    prefill_ratio: float | None
    ttft_p50_ms: Spread
    ttft_p95_ms: Spread
    tpot_p50_ms: Spread | None
    tpot_p95_ms: Spread | None
    e2e_p50_ms: Spread
    e2e_p95_ms: Spread
    requests: int
    failed: int
    energy: Energy | None
    decode_energy_ratio: float | None
    notes: list[str]


@dataclass(frozen=True)
class ServedDtype:
    """One KV-cache dtype.

    Attributes:
        kv_cache_dtype: as given to vLLM.
        error: one line why it could not be measured; then nothing else is set.
        kv_cache: memory and capacity.
        capacity_ratio: tokens that fit divided by the baseline's, at the same memory.
        memory: of the round with the highest peak.
        idle_watts: None if it cannot be measured.
        points: over the rounds so far.
        rounds: as measured.

    """

    kv_cache_dtype: str
    error: str | None
    kv_cache: KVCache | None = None
    capacity_ratio: float | None = None
    memory: Memory | None = None
    idle_watts: Spread | None = None
    points: list[ServedPoint] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)


@dataclass(frozen=True)
class ServeBenchReport:
    """A whole run. ``baseline`` names the dtype that ratios refer to; ``status`` is ``complete`` or ``partial``.

    ``fingerprint`` is the model's, as in eval.json; None for a shape without weights.
    """

    status: str
    created_at: str
    model: str
    fingerprint: str | None
    baseline: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    energy: EnergySource
    dtypes: list[ServedDtype]
    schema: str = field(default=SCHEMA)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document, its ``schema`` first."""
        document = asdict(self)
        return {"schema": document.pop("schema"), **document}
