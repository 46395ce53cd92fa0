"""Prometheus exporter: the load test's own measurements as they come."""

from __future__ import annotations

import datetime
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from loadtest.results.records import CANCELLED, ERROR, ERROR_CLASSES, OK, Record
from loadtest.watching.buckets import FIRST_TOKEN, LAG, TOKEN, WHOLE, Buckets
from loadtest.watching.serving import Serving

PREFIX = "pareto_loadtest_"
LABELS = ("run", "label", "model", "stage")
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Intended start to first token", FIRST_TOKEN),
    "time_per_output_token_seconds": ("Mean time per output token after the first", TOKEN),
    "inter_token_latency_seconds": ("Gap between content chunks", TOKEN),
    "e2e_request_latency_seconds": ("Intended start to end of the stream", WHOLE),
    "schedule_lag_seconds": ("Intended start to the sending of the request", LAG),
    "loop_lag_seconds": ("By how much the generator's own event loop ran late", LAG),
}
_COUNTERS = {
    "warmup_requests": "Finished warm-up requests",
    "prompt_tokens": "Prompt tokens of successes",
    "output_tokens": "Output tokens of successes",
}
# Stages that are shown at once. More would make each scrape, which runs beside the requests being timed, take longer.
_SHOWN = 2


def new_run_name() -> str:
    """Return a name for one run: its start, UTC, and four random hexadecimal digits."""
    return f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"


class _Series:
    """What was counted in one stage."""

    def __init__(self, values: tuple[str, ...], concurrency: int | None, rate: float | None, slo: bool) -> None:
        self.values = values
        self.requests: dict[tuple[str, str], int] = dict.fromkeys(
            [(OK, ""), (CANCELLED, ""), *((ERROR, name) for name in ERROR_CLASSES)], 0
        )
        self.counts: Counter[str] = Counter()
        self.good: int | None = 0 if slo else None
        self.histograms = {name: Buckets(upper) for name, (_, upper) in _HISTOGRAMS.items()}
        self.concurrency, self.rate = concurrency or 0, rate or 0.0
        self.scraped_after_end = False


class Exporter(Collector):
    """Counters and histograms named ``pareto_loadtest_*``, of the measured requests (warm-up is only counted).

    Every series says which run, label, model and stage it is of. Series are there at 0 from the start of their stage:
    Prometheus sees an increase only between two samples. Histograms hold successful requests. A quantile from their
    buckets is off by 5% at most; the exact ones are in the summary. The two latest stages are shown, and an earlier one
    until it was scraped after its end.

    Args:
        label: name of the run in reports.
        model: name of the model in requests.
        slo_ms: limits for goodput; without any there are no series of it.

    Attributes:
        run: name of the run: its start and some random digits, so that runs can be told apart.

    """

    def __init__(self, label: str = "", model: str = "", slo_ms: Mapping[str, float] | None = None) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._in_flight: Callable[[], float] = lambda: 0.0
        self.begin_run(label, model, slo_ms or {})
        self.registry.register(self)

    def begin_run(self, label: str, model: str, slo_ms: Mapping[str, float]) -> None:
        """Begin another run: what was counted so far is no longer shown."""
        with self._lock:
            self.run = new_run_name()
            self._names, self._slo = (label, model), dict(slo_ms)
            self._stages: dict[int, _Series] = {}
            self._present: _Series | None = None

    def watch(self, in_flight: Callable[[], float]) -> None:
        """Read the number of requests in flight from ``in_flight`` whenever scraped."""
        self._in_flight = in_flight

    def begin_stage(self, index: int, concurrency: int | None, rate: float | None) -> None:
        """Begin a stage, and show what it asks for; the other of the two is 0."""
        with self._lock:
            series = _Series((self.run, *self._names, str(index)), concurrency, rate, bool(self._slo))
            self._present = self._stages[index] = series
            for old in list(self._stages)[:-_SHOWN]:
                if self._stages[old].scraped_after_end:
                    del self._stages[old]

    def observe(self, record: Record) -> None:
        """Count one finished request, in the stage that it belongs to."""
        with self._lock:
            series = self._stages.get(record.stage)
            if series is None:
                return
            if record.warmup:
                series.counts["warmup_requests"] += 1
                return
            key = record.outcome, record.error or ""
            series.requests[key] = series.requests.get(key, 0) + 1
            if record.outcome != OK:
                return
            series.counts["prompt_tokens"] += record.prompt_tokens or 0
            series.counts["output_tokens"] += record.counted_output_tokens or 0
            if series.good is not None:
                series.good += record.meets(self._slo)
            add = series.histograms
            if record.first_token_s is not None:
                add["time_to_first_token_seconds"].add([record.first_token_s])
            if record.tpot_s is not None:
                add["time_per_output_token_seconds"].add([record.tpot_s])
            add["inter_token_latency_seconds"].add(after - before for before, after in pairwise(record.token_s))
            add["e2e_request_latency_seconds"].add([record.end_s])
            add["schedule_lag_seconds"].add([record.start_s or 0.0])

    def observe_loop_lag(self, seconds: float) -> None:
        """Count by how much the generator's event loop ran late once."""
        with self._lock:
            if self._present is not None:
                self._present.histograms["loop_lag_seconds"].add([max(0.0, seconds)])

    def describe(self) -> list[Metric]:
        """Return nothing: names are not looked for twice in a registry of our own, and nothing counts as a scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric; called for each scrape."""
        requests = CounterMetricFamily(
            f"{PREFIX}requests", "Finished requests by outcome and error class", labels=[*LABELS, "outcome", "error"]
        )
        good = CounterMetricFamily(f"{PREFIX}good_requests", "Requests that met every --goodput limit", labels=LABELS)
        counters = {
            name: CounterMetricFamily(f"{PREFIX}{name}", text, labels=LABELS) for name, text in _COUNTERS.items()
        }
        histograms = {
            name: HistogramMetricFamily(f"{PREFIX}{name}", text, labels=LABELS)
            for name, (text, _) in _HISTOGRAMS.items()
        }
        with self._lock:
            present = self._present
            for series in self._stages.values():
                labels = series.values
                for (outcome, error), count in series.requests.items():
                    requests.add_metric([*labels, outcome, error], count)
                for name, counter in counters.items():
                    counter.add_metric(labels, series.counts[name])
                if series.good is not None:
                    good.add_metric(labels, series.good)
                for name, histogram in histograms.items():
                    histogram.add_metric(labels, *series.histograms[name].snapshot())
                series.scraped_after_end = series is not present
        yield from (requests, good, *counters.values(), *histograms.values())
        if present is None:
            return
        gauges = {
            "requests_in_flight": ("Requests due and not ended", self._in_flight()),
            "target_concurrency": ("Users of the closed-loop stage", present.concurrency),
            "target_rate": ("Requests per second of the open-loop stage", present.rate),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"{PREFIX}{name}", text, labels=LABELS)
            gauge.add_metric(present.values, value)
            yield gauge
        limits = GaugeMetricFamily(f"{PREFIX}goodput_limit_seconds", "Limit of --goodput", labels=[*LABELS, "of"])
        for name, limit in self._slo.items():
            limits.add_metric([*present.values, name], limit / 1000)
        yield limits

    def serve(self, host: str, port: int) -> Serving:
        """Serve ``/metrics`` from a thread until its ``stop`` is called.

        Raises:
            LoadTestError: the address cannot be bound.

        """
        return Serving(self.registry, host, port)
