"""What ``summary.json`` holds: typed results, apart from the code that computes them.

Every time is in milliseconds where its name ends in ``_ms`` and in seconds where it ends in ``_s``. ``None`` means that
the value is undefined for this run, never zero. ``dataclasses.asdict`` of a :class:`Summary` is the JSON document.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = "vllm-pareto/loadtest/1"


@dataclass(frozen=True)
class Distribution:
    """Exact statistics of one quantity over the measured, successful requests of a stage.

    Percentiles are computed from all values with linear interpolation between the two nearest ranks (numpy's
    default), not from histogram buckets. ``std`` is the population standard deviation.
    """

    count: int
    mean: float
    std: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True)
class RequestCounts:
    """How the requests of a stage ended.

    ``sent = ok + failed + cancelled`` counts measured requests; ``warmup`` requests are in no other number of the
    stage. ``cancelled`` requests were in flight when the run was interrupted: neither successes nor failures.
    """

    sent: int
    ok: int
    failed: int
    cancelled: int
    warmup: int
    warmup_failed: int


@dataclass(frozen=True)
class Latency:
    """Client-side latencies of the successful measured requests, in milliseconds.

    All but ``itl_ms`` and ``tpot_ms`` count from the request's *intended* start, so in an open loop the time a request
    waited for the generator or for ``--max-concurrency`` is part of it (no coordinated omission). In a closed loop the
    intended start is the actual one.

    Attributes:
        ttft_ms: first chunk with non-empty content, or the end of an answer whose tokens have no text.
        tpot_ms: time per output token after the first: (last token - first token) / (output tokens - 1). Undefined for
            requests of one output token, and where neither the server's usage nor a tokenizer counted the tokens: those
            are left out, and the stage's ``notes`` say so.
        itl_ms: gaps between consecutive content chunks, pooled over all requests. Equals the inter-token latency only
            when the server sends one token a chunk: see ``StageResult.tokens_per_chunk``. A server that coalesces
            tokens has larger gaps and fewer of them; then use ``tpot_ms``.
        e2e_ms: end of the stream.
        schedule_lag_ms: actual start minus intended start: what the generator or ``--max-concurrency`` added.
        ttft_from_send_ms: first chunk with non-empty content, from the actual start: the server's share of ``ttft_ms``.
        send_lateness_ms: what the generator alone added before the start, of all requests that ended; for sound numbers
            near 0 (``StageResult.invalid``).

    """

    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution | None
    schedule_lag_ms: Distribution | None
    ttft_from_send_ms: Distribution | None = None
    send_lateness_ms: Distribution | None = None


@dataclass(frozen=True)
class Throughput:
    """Rates over the stage's window: first intended start to last end of a measured request.

    Tokens are those of successful requests, as counted by the server's usage field, or else by tokenizing the text
    again; None where some answers were not counted. The window includes the drain after the last request was sent, so
    short stages understate a saturated server; give the stage more requests.
    """

    window_s: float
    requests_per_s: float
    output_tokens_per_s: float | None
    total_tokens_per_s: float | None
    offered_requests_per_s: float
    mean_in_flight: float


@dataclass(frozen=True)
class Goodput:
    """Requests that met every limit of the SLO. Failed requests never do; an undefined TPOT counts as met.

    ``fraction`` is of the measured requests that ended (ok and failed); ``requests_per_s`` is over the stage's window.
    """

    slo_ms: dict[str, float]
    good: int
    fraction: float
    requests_per_s: float


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of the successful requests as the server counted them; ``requested_mean`` is what was asked for."""

    total: int
    mean: float
    min: int
    max: int
    requested_mean: float | None


@dataclass(frozen=True)
class MetricSeries:
    """One of the server's own metrics while the stage ran, sampled once an interval.

    Label sets of the same name are added up (``*_perc`` gauges: their maximum). ``delta`` is last minus first sample:
    the amount counted during the stage, for counters and for a histogram's ``_sum`` and ``_count``.
    """

    samples: int
    mean: float
    peak: float
    first: float
    last: float
    delta: float


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% confidence interval, by batches of neighbouring requests within this run.

    It holds what chance did to the requests of this run, not what differs from run to run: that needs ``--repeat``. A
    bound is None where the stage is too short to have it.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SteadyState:
    """The figures of a stage without its ramp and its drain (:mod:`loadtest.statistics.steady`).

    ``from_s`` and ``to_s`` are the first and the last intended start of what is kept, in seconds after the first one of
    the stage; ``requests`` is the number of its requests.
    """

    from_s: float
    to_s: float
    requests: int
    figures: dict[str, Interval]


@dataclass(frozen=True)
class Energy:
    """Energy of all GPUs that ``--gpu-metrics`` watches, from the begin of the measured requests to their end.

    Attributes:
        joules: of the whole boards, idle power included.
        mean_watts: by samples of power; None where the exporter has none.
        joules_per_output_token: None where not all tokens were counted.

    """

    joules: float
    mean_watts: float | None
    joules_per_output_token: float | None


@dataclass(frozen=True)
class StageResult:
    """One stage: one concurrency (closed loop) or one arrival rate (open loop).

    ``shape`` says how the load went over time, ``profile`` with which numbers; then ``concurrency`` or ``rate`` is the
    highest level (of a trace the mean). ``invalid`` says why the numbers tell more of the load generator than of the
    server; None where they are sound.
    """

    index: int
    mode: str
    concurrency: int | None
    rate: float | None
    arrival: str | None
    burstiness: float | None
    max_concurrency: int | None
    started_unix_s: float | None
    finished: bool
    requests: RequestCounts
    failures: dict[str, int]
    failure_examples: dict[str, str]
    latency: Latency
    throughput: Throughput | None
    goodput: Goodput | None
    prompt_tokens: TokenCounts | None
    output_tokens: TokenCounts | None
    tokens_per_chunk: float | None
    finish_reasons: dict[str, int]
    server_metrics: dict[str, MetricSeries]
    notes: list[str]
    intervals: dict[str, Interval] = field(default_factory=dict)
    steady: SteadyState | None = None
    invalid: str | None = None
    shape: str = "hold"
    profile: str = ""
    energy: Energy | None = None


@dataclass(frozen=True)
class SearchResult:
    """What ``--find`` found, in requests per second.

    Attributes:
        goal: ``knee``, ``max-rate`` or ``sweep``.
        sustained: the highest rate that the server sustained; None when it sustained none of those tried.
        refused: the lowest that it did not; None when it sustained all.
        stages: how many were used.
        converged: whether the two are as near to each other as was asked for; of a sweep whether it came to its end.
        invalid_stages: how many stages were believed though the load generator was late in them, in a search twice.
        estimate: the answer of ``max-rate`` by a line through all stages; None where they do not say, and for ``knee``.

    """

    goal: str
    sustained: float | None
    refused: float | None
    stages: int
    converged: bool
    invalid_stages: int = 0
    estimate: float | None = None


@dataclass(frozen=True)
class Generator:
    """Health of the load generator itself: a late event loop makes every latency look larger than it was.

    ``loop_lag_ms`` is by how much a 20 ms sleep overslept, in every process that sends; ``cpu_percent`` is what all
    processes used, of one core; both are None where a killed run was summarized afterwards.
    """

    loop_lag_ms: Distribution | None
    cpu_percent: float | None


@dataclass(frozen=True)
class Server:
    """What was found out about the endpoint before the run."""

    base_url: str
    model: str
    served_models: list[str]
    version: str | None
    is_vllm: bool
    cache_config: dict[str, str]


@dataclass(frozen=True)
class Summary:
    """A whole run. ``status``: ``complete``, or ``interrupted`` or ``stopped`` (then stages are partial or missing).

    ``error`` says what broke the load generator itself; None where nothing did.
    """

    label: str
    status: str
    started_at: str
    duration_s: float
    settings: dict[str, Any]
    environment: dict[str, Any]
    server: Server
    calibration: dict[str, Any]
    stages: list[StageResult]
    generator: Generator
    files: dict[str, str]
    search: SearchResult | None = None
    error: str | None = None
    schema: str = field(default=SCHEMA)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document, its ``schema`` first."""
        document = asdict(self)
        return {"schema": document.pop("schema"), **document}
