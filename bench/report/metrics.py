"""What the report says of a configuration: one entry a metric, from which rows, tables, page and console follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.quality.schema import ConfigurationResult, TextQuality
from bench.report.figures import Figure, milliseconds, number, percent
from bench.schema import Estimate
from bench.speed.schema import DtypeResult, Point
from kv_cache.sizes import readable
from loadtest.schema import Distribution, StageResult

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
    return (
        Figure(stage.throughput.output_tokens_per_s, f"{failed} failed" if failed else "") if stage.throughput else None
    )


def _memory(row: Row, context_tokens: int) -> Figure | None:
    weights, token = row.get("weight_bytes"), row.get("kv_bytes_per_token")
    return None if weights is None or token is None else Figure(weights + context_tokens * token)


def _step(_: DtypeResult, point: Point) -> Figure | None:
    return None if point.step_ratio is None else Figure(point.step_ratio, f"at {point.batch}x{point.context}")


def _bits(value: float | None, per_token: float) -> Figure | None:
    return None if value is None else Figure(value, f"{per_token:,.0f} B/token")


METRICS = (
    Metric("weight_bits", "weight bits", "bits a parameter, everything counted", LESS, number(".2f"),
           quality=lambda r: Figure.maybe(r.model.bits_per_weight)),
    Metric("kv_bits", "KV bits", "bits an element of keys and values", LESS, number(".2f"),
           quality=lambda r: _bits(r.kv_cache.bits_per_element, r.kv_cache.bytes_per_token),
           speed=lambda d, _: _bits(d.kv_cache.bits_per_element, d.kv_cache.bytes_per_token) if d.kv_cache else None),
    Metric("weight_bytes", "weights", "bytes of the checkpoint's tensors", LESS, readable,
           quality=lambda r: Figure(r.model.weight_bytes), console=False),
    Metric("kv_tokens", "KV tokens", "tokens that fit in the cache's memory", MORE, number(",.0f"),
           quality=lambda r: Figure(r.kv_cache.tokens),
           speed=lambda d, _: Figure(d.kv_cache.tokens) if d.kv_cache else None),
    Metric("kv_bytes_per_token", "", "bytes of all layers", LESS, number(",.0f"),
           quality=lambda r: Figure(r.kv_cache.bytes_per_token),
           speed=lambda d, _: Figure(d.kv_cache.bytes_per_token) if d.kv_cache else None),
    Metric("kv_budget_bytes", "", "bytes given to the cache", NEITHER, readable,
           quality=lambda r: Figure(r.kv_cache.budget_bytes),
           speed=lambda d, _: Figure(d.kv_cache.budget_bytes) if d.kv_cache else None),
    Metric("memory_bytes", "", "bytes of weights and of the context that counts as memory", LESS, readable,
           derived=_memory),
    Metric("perplexity", "perplexity", "exp(nats a token)", LESS, number(".3f"), quality=_perplexity),
    Metric("kl", "KL, nats", "nats a token, from the baseline", LESS, number(".5f"), quality=_text(lambda t: t.kl),
           of_baseline=0),
    Metric("top1", "top-1", "share of positions where the baseline's first token is first", MORE, number(".4f"),
           quality=_text(lambda t: t.top1_agreement), of_baseline=1, console=False),
    Metric("needle", "needle", "share of planted numbers found", MORE, percent,
           quality=lambda r: Figure.interval(r.needle.accuracy) if r.needle else None),
    Metric("ttft_p50_ms", "TTFT P50 / P95, ms", "ms", LESS, milliseconds, load=_latency(lambda d: d.p50, "ttft_ms")),
    Metric("ttft_p95_ms", "TTFT P50 / P95, ms", "ms", LESS, milliseconds, load=_latency(lambda d: d.p95, "ttft_ms")),
    Metric("tpot_p50_ms", "TPOT P50 / P95, ms", "ms", LESS, milliseconds, load=_latency(lambda d: d.p50, "tpot_ms")),
    Metric("tpot_p95_ms", "TPOT P50 / P95, ms", "ms", LESS, milliseconds, load=_latency(lambda d: d.p95, "tpot_ms")),
    Metric("output_tokens_per_s", "output tokens/s", "tokens a second under load", MORE, number(",.0f"),
           load=_throughput),
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
    TradeOff("decode", "Quality against decode speed", "step_ratio", "decode speed relative to bf16 KV"),
)
