"""What the report says of a configuration: one entry a metric, from which rows, tables, page and console follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.quality.schema import ConfigurationResult, TextQuality
from bench.report.figures import Figure, milliseconds, number, percent
from bench.schema import Estimate, KVCache
from bench.speed.schema import DtypeResult, Point, Spread
from bench.speed.served_schema import Energy, ServedDtype, ServedPoint
from kv_cache.sizes import readable
from loadtest.results.schema import Distribution, StageResult

if TYPE_CHECKING:
    from bench.report.rows import Row

MORE, LESS, NEITHER = "more", "less", ""


@dataclass(frozen=True)
class Metric:
    """A figure of a configuration.

    Attributes:
        key: its name in the report's JSON.
        column: the heading under which it stands; metrics of one heading share a column, and empty shows it nowhere.
        unit: of its value.
        better: whether more or less of it is better, or neither.
        show: text of a value.
        quality: its value in an evaluation.
        load: its value in a stage of a load test.
        speed: its value in a kv-bench, of the point with the most context in flight.
        served: its value in a serve-bench, of a load; what has ``cache`` is the same under every load.
        cache: its value from the KV cache that a kv-bench or a serve-bench found.
        derived: its value from the row's other figures and the tokens of context that count as memory.
        of_baseline: its value for the baseline, which is compared with itself.
        console: whether the console's table has it.

    """

    key: str
    column: str
    unit: str
    better: str
    show: Callable[[float], str]
    quality: Callable[[ConfigurationResult], Figure | None] | None = None
    load: Callable[[StageResult], Figure | None] | None = None
    speed: Callable[[DtypeResult, Point], Figure | None] | None = None
    served: Callable[[ServedDtype, ServedPoint], Figure | None] | None = None
    cache: Callable[[KVCache], Figure | None] | None = None
    derived: Callable[[Row, int], Figure | None] | None = None
    of_baseline: float | None = None
    console: bool = True


def _text(read: Callable[[TextQuality], Estimate | None]) -> Callable[[ConfigurationResult], Figure | None]:
    return lambda result: Figure.of(read(result.overall)) if result.overall else None


def _perplexity(result: ConfigurationResult) -> Figure | None:
    if not result.overall:
        return None
    change = result.overall.perplexity_change
    return Figure.of(result.overall.perplexity, f"{change.value:+.2%}" if change else None)


def _latency(read: Callable[[Distribution], float], kind: str) -> Callable[[StageResult], Figure | None]:
    def value(stage: StageResult) -> Figure | None:
        found = getattr(stage.latency, kind)
        return Figure(read(found)) if found else None

    return value


def _throughput(stage: StageResult) -> Figure | None:
    failed = stage.requests.failed
    if stage.throughput is None or stage.throughput.output_tokens_per_s is None:
        return None
    return Figure(stage.throughput.output_tokens_per_s, f"{failed} failed" if failed else "")


def _memory(row: Row, context_tokens: int) -> Figure | None:
    weights, token = row.get("weight_bytes"), row.get("kv_bytes_per_token")
    return None if weights is None or token is None else Figure(weights + context_tokens * token)


def _step(_: DtypeResult, point: Point) -> Figure | None:
    return None if point.step_ratio is None else Figure(point.step_ratio, f"at {point.batch}x{point.context}")


def _bits(cache: KVCache) -> Figure | None:
    return (
        None
        if cache.bits_per_element is None
        else Figure(cache.bits_per_element, f"{cache.bytes_per_token:,.0f} B/token")
    )


def _spread(values: Spread | None) -> Figure | None:
    return None if values is None else Figure(values.median, "", None, values.low, values.high, values.n)


def _served(name: str) -> Callable[[ServedDtype, ServedPoint], Figure | None]:
    return lambda _, point: _spread(getattr(point, name))


def _energy(read: Callable[[Energy], Spread | None]) -> Callable[[ServedDtype, ServedPoint], Figure | None]:
    return lambda _, point: _spread(read(point.energy)) if point.energy else None


METRICS = (
    Metric("weight_bits", "weight bits", "bits a parameter, everything counted", LESS, number(".2f"),
           quality=lambda r: Figure.maybe(r.model.bits_per_weight)),
    Metric("kv_bits", "KV bits", "bits an element of keys and values", LESS, number(".2f"),
           quality=lambda r: _bits(r.kv_cache), cache=_bits),
    Metric("weight_bytes", "weights", "bytes of the checkpoint's tensors", LESS, readable,
           quality=lambda r: Figure(r.model.weight_bytes), console=False),
    Metric("kv_tokens", "KV tokens", "tokens that fit in the cache's memory", MORE, number(",.0f"),
           quality=lambda r: Figure(r.kv_cache.tokens), cache=lambda c: Figure(c.tokens)),
    Metric("kv_bytes_per_token", "", "bytes of all layers", LESS, number(",.0f"),
           quality=lambda r: Figure(r.kv_cache.bytes_per_token), cache=lambda c: Figure(c.bytes_per_token)),
    Metric("kv_budget_bytes", "", "bytes given to the cache", NEITHER, readable,
           quality=lambda r: Figure(r.kv_cache.budget_bytes), cache=lambda c: Figure(c.budget_bytes)),
    Metric("memory_bytes", "", "bytes of weights and of the context that counts as memory", LESS, readable,
           derived=_memory),
    Metric("perplexity", "perplexity", "exp(nats a token)", LESS, number(".3f"), quality=_perplexity),
    Metric("kl", "KL, nats", "nats a token, from the baseline", LESS, number(".5f"), quality=_text(lambda t: t.kl),
           of_baseline=0),
    Metric("top1", "top-1", "share of positions where the baseline's first token is first", MORE, number(".4f"),
           quality=_text(lambda t: t.top1_agreement), of_baseline=1, console=False),
    Metric("needle", "needle", "share of planted numbers found", MORE, percent,
           quality=lambda r: Figure.interval(r.needle.accuracy) if r.needle else None),
    Metric("ttft_p50_ms", "TTFT P50 / P95, ms", "ms", LESS, milliseconds,
           load=_latency(lambda d: d.p50, "ttft_ms"), served=_served("ttft_p50_ms")),
    Metric("ttft_p95_ms", "TTFT P50 / P95, ms", "ms", LESS, milliseconds,
           load=_latency(lambda d: d.p95, "ttft_ms"), served=_served("ttft_p95_ms")),
    Metric("tpot_p50_ms", "TPOT P50 / P95, ms", "ms", LESS, milliseconds,
           load=_latency(lambda d: d.p50, "tpot_ms"), served=_served("tpot_p50_ms")),
    Metric("tpot_p95_ms", "TPOT P50 / P95, ms", "ms", LESS, milliseconds,
           load=_latency(lambda d: d.p95, "tpot_ms"), served=_served("tpot_p95_ms")),
    Metric("e2e_p50_ms", "end to end P50 / P95, ms", "ms", LESS, milliseconds,
           load=_latency(lambda d: d.p50, "e2e_ms"), served=_served("e2e_p50_ms"), console=False),
    Metric("e2e_p95_ms", "end to end P50 / P95, ms", "ms", LESS, milliseconds,
           load=_latency(lambda d: d.p95, "e2e_ms"), served=_served("e2e_p95_ms"), console=False),
    Metric("output_tokens_per_s", "output tokens/s", "tokens a second under load", MORE, number(",.0f"),
           load=_throughput, served=_served("output_tokens_per_s")),
    Metric("peak_memory_bytes", "peak memory", "bytes of weights, cache and activations", LESS, readable,
           served=lambda d, _: Figure.maybe(d.memory.peak if d.memory else None), console=False),
    Metric("prefill_joules", "J/token prefill, net", "joules a prompt token", LESS, number(".3g"),
           served=_energy(lambda e: e.prefill), console=False),
    Metric("prefill_net_joules", "J/token prefill, net", "joules a prompt token, less idle power", LESS, number(".3g"),
           served=_energy(lambda e: e.prefill_net), console=False),
    Metric("decode_joules", "J/token decode, net", "joules a token after the first", LESS, number(".3g"),
           served=_energy(lambda e: e.decode), console=False),
    Metric("decode_net_joules", "J/token decode, net", "joules a token after the first, less idle power", LESS,
           number(".3g"), served=_energy(lambda e: e.decode_net), console=False),
    Metric("output_joules", "", "joules a token of the answers, prompts included", LESS, number(".3g"),
           served=_energy(lambda e: e.output)),
    Metric("step_ratio", "decode speed", "bf16's time of a step divided by this one", MORE, number(".2f", "x"),
           speed=_step, console=False),
)  # fmt: skip
BY_KEY = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True)
class TradeOff:
    """Two metrics whose frontier is drawn; the second is always the loss of quality, ``kl``.

    Attributes:
        key: its name in the report's JSON.
        title: of the picture.
        metric: the other metric.
        label: of its axis; ``{context}`` and ``{load}`` stand for the report's.
        per: what its values are divided by on the axis.

    """

    key: str
    title: str
    metric: str
    label: str
    per: float = 1


LOSS, LOSS_LABEL = "kl", "KL divergence from bf16, nats per token"
TRADE_OFFS = (
    TradeOff(
        "memory", "Quality against memory", "memory_bytes", "weights + {context:,} tokens of KV cache, MiB", 2**20
    ),
    TradeOff("throughput", "Quality against throughput", "output_tokens_per_s", "output tokens per second at {load}"),
    TradeOff("energy", "Quality against energy", "decode_joules", "joules a decoded token at {load}"),
    TradeOff("decode", "Quality against decode speed", "step_ratio", "decode speed relative to bf16 KV"),
)
