"""What the board shows: the panels and their PromQL, from which board, preview and tests are made.

Queries pick servers by ``$instance`` and load tests by ``$run``, and take rates over ``$__rate_interval``; Grafana puts
values in their places, and :func:`filled` does so without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

WINDOW = "$__rate_interval"
_SERVER = 'instance=~"$instance"'
_CLIENT = 'run=~"$run"'
_QUANTILES = ("0.5", "0.95")


class Needs(StrEnum):
    """What must have happened for a query to find something."""

    LOAD = "a load test"
    GOODPUT = "a load test with --goodput"
    SERVER = "requests to a server"
    TWO_TOKENS = "requests to a server for two tokens or more"
    FULL_CACHE = "evictions from a server's cache, with --kv-cache-metrics"
    OUR_CACHE = "a server with a KV-cache dtype of vllm-pareto"


@dataclass(frozen=True)
class Query:
    """One line, or family of lines, of a panel: PromQL, its legend in Grafana's form, and what it needs."""

    expr: str
    legend: str
    needs: Needs


class Kind(StrEnum):
    """How a panel shows its queries."""

    LINES = "lines over time"
    NUMBERS = "the present values"
    NAMES = "the legends of what is there"


@dataclass(frozen=True)
class Panel:
    """One panel: its title, Grafana's name of its unit, and what a reader should know of it."""

    title: str
    unit: str
    text: str
    queries: tuple[Query, ...]
    kind: Kind = Kind.LINES


def filled(expr: str, window: str, instance: str = ".*", run: str = ".*") -> str:
    """Return PromQL without Grafana's variables.

    Args:
        expr: of a query.
        window: of rates, such as ``30s``; at least four times as long as Prometheus waits between scrapes.
        instance: regular expression of the servers, as ``host:port``.
        run: regular expression of the names of load tests.

    """
    return expr.replace(WINDOW, window).replace("$instance", instance).replace("$run", run)


def _quantiles(side: str, metric: str, needs: Needs, levels: tuple[str, ...] = _QUANTILES) -> tuple[Query, ...]:
    by, chosen = ("label", _CLIENT) if metric.startswith("pareto_loadtest_") else ("instance", _SERVER)
    return tuple(
        Query(
            f"histogram_quantile({level}, sum by (le, {by}) (rate({metric}_bucket{{{chosen}}}[{WINDOW}])))",
            f"{side} P{float(level) * 100:g} {{{{{by}}}}}",
            needs,
        )
        for level in levels
    )


def _rate(metric: str, legend: str, needs: Needs, by: str = "", extra: str = "") -> Query:
    own, chosen = ("label", _CLIENT) if metric.startswith("pareto_loadtest_") else ("instance", _SERVER)
    labels = ", ".join(filter(None, (own, by)))
    return Query(f"sum by ({labels}) (rate({metric}{{{chosen}{extra}}}[{WINDOW}]))", legend, needs)


def _gauge(metric: str, legend: str, needs: Needs, by: str = "") -> Query:
    own, chosen = ("label", _CLIENT) if metric.startswith("pareto_loadtest_") else ("instance", _SERVER)
    return Query(f"sum by ({', '.join(filter(None, (own, by)))}) ({metric}{{{chosen}}})", legend, needs)


def _share(part: str, whole: str, legend: str, needs: Needs) -> Query:
    own, chosen = ("label", _CLIENT) if part.startswith("pareto_loadtest_") else ("instance", _SERVER)
    rates = (f"sum by ({own}) (rate({name}{{{chosen}}}[{WINDOW}]))" for name in (part, whole))
    return Query(" / ".join(rates), legend, needs)


def _mean(name: str, legend: str) -> Query:
    return _share(f"vllm:request_{name}_seconds_sum", f"vllm:request_{name}_seconds_count", legend, Needs.SERVER)


_COARSE = "The server's quantiles are as exact as its buckets: server.yaml of this deployment makes them fine."

# A server that never failed has no series of failures, and the board is to say 0 then.
_ANSWERED = f'sum by (instance) (rate(http_requests_total{{{_SERVER},handler=~"/v1/.*"}}[{WINDOW}]))'
_FAILED = _ANSWERED.replace('"/v1/.*"', '"/v1/.*",status=~"4xx|5xx"')

ROWS: dict[str, tuple[Panel, ...]] = {
    "Latency": (
        Panel(
            "Time to first token",
            "s",
            f"Client: from the intended start. Server: from the arrival of the request. {_COARSE}",
            _quantiles("client", "pareto_loadtest_time_to_first_token_seconds", Needs.LOAD)
            + _quantiles("server", "vllm:time_to_first_token_seconds", Needs.SERVER),
        ),
        Panel(
            "Time per output token",
            "s",
            f"Mean of a request after its first token. {_COARSE}",
            _quantiles("client", "pareto_loadtest_time_per_output_token_seconds", Needs.LOAD)
            + _quantiles("server", "vllm:request_time_per_output_token_seconds", Needs.TWO_TOKENS),
        ),
        Panel(
            "End to end",
            "s",
            f"Client: from the intended start to the end of the stream. {_COARSE}",
            _quantiles("client", "pareto_loadtest_e2e_request_latency_seconds", Needs.LOAD)
            + _quantiles("server", "vllm:e2e_request_latency_seconds", Needs.SERVER),
        ),
        Panel(
            "Where the server's time goes",
            "s",
            "Means of a request. A cache that holds more shortens the queue, a faster kernel the rest.",
            (
                _mean("queue_time", "queue {{instance}}"),
                _mean("prefill_time", "prefill {{instance}}"),
                _mean("decode_time", "decode {{instance}}"),
            ),
        ),
    ),
    "Throughput": (
        Panel(
            "Tokens per second",
            "short",
            "What the server generated and what the client received; prompts that the cache answered count in full.",
            (
                _rate("vllm:generation_tokens_total", "generated {{instance}}", Needs.SERVER),
                _rate("vllm:prompt_tokens_total", "prompt {{instance}}", Needs.SERVER),
                _rate("pareto_loadtest_output_tokens_total", "client output {{label}}", Needs.LOAD),
            ),
        ),
        Panel(
            "Requests per second, offered and done",
            "reqps",
            "Offered is the rate of an open loop; 0 in a closed one.",
            (
                _gauge("pareto_loadtest_target_rate", "offered {{label}}", Needs.LOAD),
                _rate("pareto_loadtest_requests_total", "client done {{label}}", Needs.LOAD, extra=',outcome="ok"'),
                _rate(
                    "vllm:request_success_total",
                    "server {{finished_reason}} {{instance}}",
                    Needs.SERVER,
                    "finished_reason",
                ),
            ),
        ),
        Panel(
            "Goodput",
            "reqps",
            "Requests per second that met every limit of --goodput.",
            (_rate("pareto_loadtest_good_requests_total", "good {{label}}", Needs.GOODPUT),),
        ),
        Panel(
            "Errors by class",
            "reqps",
            "The client's classes (docs/loadtest.md), and answers of the server with a status that says so.",
            (
                _rate(
                    "pareto_loadtest_requests_total",
                    "client {{error}} {{label}}",
                    Needs.LOAD,
                    "error",
                    ',outcome="error"',
                ),
                Query(
                    f"{_FAILED} or 0 * {_ANSWERED}",
                    "server 4xx and 5xx {{instance}}",
                    Needs.SERVER,
                ),
            ),
        ),
    ),
    "Queue": (
        Panel(
            "Requests on their way",
            "short",
            "In the server's batch, in its queue, and due but not ended as the client sees it.",
            (
                _gauge("vllm:num_requests_running", "running {{instance}}", Needs.SERVER),
                _gauge("vllm:num_requests_waiting", "waiting {{instance}}", Needs.SERVER),
                _gauge("pareto_loadtest_requests_in_flight", "client in flight {{label}}", Needs.LOAD),
            ),
        ),
        Panel(
            "Waiting by reason",
            "short",
            "capacity: no room in the batch or in the cache. deferred: waits for an adapter or a transfer.",
            (_gauge("vllm:num_requests_waiting_by_reason", "{{reason}} {{instance}}", Needs.SERVER, "reason"),),
        ),
        Panel(
            "Preemptions per second",
            "short",
            "Requests thrown out of the full cache, whose tokens are computed again.",
            (_rate("vllm:num_preemptions_total", "{{instance}}", Needs.SERVER),),
        ),
        Panel(
            "How late the load generator is",
            "s",
            "Sending after the intended start (--max-concurrency delays it on purpose), and the event loop's own lag. "
            "If these are not small against the latencies, the generator is what was measured.",
            _quantiles("sending", "pareto_loadtest_schedule_lag_seconds", Needs.LOAD, ("0.95",))
            + _quantiles("event loop", "pareto_loadtest_loop_lag_seconds", Needs.LOAD, ("0.95",)),
        ),
    ),
    "KV cache": (
        Panel(
            "Cache use",
            "percentunit",
            "Part of the cache's blocks that running requests hold.",
            (Query(f"max by (instance) (vllm:kv_cache_usage_perc{{{_SERVER}}})", "{{instance}}", Needs.SERVER),),
        ),
        Panel(
            "Prefix hits",
            "percentunit",
            "Part of the prompts' tokens that the cache answered: a bigger cache keeps prefixes for longer.",
            (_share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", "{{instance}}", Needs.SERVER),),
        ),
        Panel(
            "Life of a block",
            "s",
            "From allocation to eviction, of a sample of blocks (--kv-cache-metrics); empty while the cache has room.",
            _quantiles("lifetime", "vllm:kv_block_lifetime_seconds", Needs.FULL_CACHE)
            + _quantiles("idle at its end", "vllm:kv_block_idle_before_evict_seconds", Needs.FULL_CACHE, ("0.5",)),
        ),
        Panel(
            "Gap between uses of a block",
            "s",
            "Noted when a block is evicted. A prefix that comes back after more than a block's life is computed again.",
            _quantiles("reuse gap", "vllm:kv_block_reuse_gap_seconds", Needs.FULL_CACHE),
        ),
        Panel(
            "Bytes of a token in the cache",
            "bytes",
            "Over all layers and heads: memory divided by this is how many tokens fit.",
            (
                _gauge(
                    "pareto_kv_cache_bytes_per_token",
                    "{{kv_cache_dtype}} {{instance}}",
                    Needs.OUR_CACHE,
                    "kv_cache_dtype",
                ),
            ),
            Kind.NUMBERS,
        ),
        Panel(
            "How much more fits",
            "none",
            "Bytes of an unquantized cache over the bytes of this one.",
            (
                _gauge(
                    "pareto_kv_cache_compression_ratio",
                    "{{kv_cache_dtype}} {{instance}}",
                    Needs.OUR_CACHE,
                    "kv_cache_dtype",
                ),
            ),
            Kind.NUMBERS,
        ),
        Panel(
            "Bits of an element",
            "none",
            "Of quantized layers, scales in the page included.",
            (
                _gauge(
                    "pareto_kv_cache_bits_per_element",
                    "{{kv_cache_dtype}} {{instance}}",
                    Needs.OUR_CACHE,
                    "kv_cache_dtype",
                ),
            ),
            Kind.NUMBERS,
        ),
        Panel(
            "Blocks in the cache",
            "short",
            "For each server its dtype, the number of blocks and the tokens of one.",
            (
                Query(
                    f"max by (instance, cache_dtype, num_gpu_blocks, block_size) (vllm:cache_config_info{{{_SERVER}}})",
                    "{{cache_dtype}}: {{num_gpu_blocks}} blocks of {{block_size}} {{instance}}",
                    Needs.SERVER,
                ),
            ),
            Kind.NAMES,
        ),
    ),
}
PANELS = tuple(panel for panels in ROWS.values() for panel in panels)
