"""Prometheus exporter: the load test's own measurements as they come."""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from loadtest.errors import LoadTestError
from loadtest.results.records import OK, Record

_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 40, 80)
_TOKEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_WHOLE = (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 240, 480)


class Exporter:
    """Counters and histograms named ``pareto_loadtest_*``, of the measured requests (warm-up is only counted).

    Histograms hold successful requests. Percentiles from their buckets are approximate; the exact ones are in the
    summary.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix, registry = "pareto_loadtest_", self.registry
        self._requests = Counter(
            f"{prefix}requests", "Finished requests by outcome and error class", ["outcome", "error"], registry=registry
        )
        self._warmups = Counter(f"{prefix}warmup_requests", "Finished warm-up requests", registry=registry)
        self._prompt_tokens = Counter(f"{prefix}prompt_tokens", "Prompt tokens of successes", registry=registry)
        self._output_tokens = Counter(f"{prefix}output_tokens", "Output tokens of successes", registry=registry)
        self._ttft = Histogram(
            f"{prefix}time_to_first_token_seconds",
            "Intended start to first token",
            buckets=_FIRST_TOKEN,
            registry=registry,
        )
        self._tpot = Histogram(
            f"{prefix}time_per_output_token_seconds",
            "Mean time per output token after the first",
            buckets=_TOKEN,
            registry=registry,
        )
        self._itl = Histogram(
            f"{prefix}inter_token_latency_seconds", "Gap between content chunks", buckets=_TOKEN, registry=registry
        )
        self._e2e = Histogram(
            f"{prefix}e2e_request_latency_seconds",
            "Intended start to end of the stream",
            buckets=_WHOLE,
            registry=registry,
        )
        self._in_flight = Gauge(f"{prefix}requests_in_flight", "Requests due and not ended", registry=registry)
        self._concurrency = Gauge(f"{prefix}target_concurrency", "Users of the closed-loop stage", registry=registry)
        self._rate = Gauge(f"{prefix}target_rate", "Requests per second of the open-loop stage", registry=registry)

    def watch(self, in_flight: Callable[[], float]) -> None:
        """Read the number of requests in flight from ``in_flight`` whenever scraped."""
        self._in_flight.set_function(in_flight)

    def begin_stage(self, concurrency: int | None, rate: float | None) -> None:
        """Show what the present stage asks for; the other of the two is 0."""
        self._concurrency.set(concurrency or 0)
        self._rate.set(rate or 0)

    def observe(self, record: Record) -> None:
        """Count one finished request."""
        if record.warmup:
            self._warmups.inc()
            return
        self._requests.labels(record.outcome, record.error or "").inc()
        if record.outcome != OK:
            return
        self._prompt_tokens.inc(record.prompt_tokens or 0)
        self._output_tokens.inc(record.counted_output_tokens or 0)
        if record.first_token_s is not None:
            self._ttft.observe(record.first_token_s)
        if record.tpot_s is not None:
            self._tpot.observe(record.tpot_s)
        for before, after in pairwise(record.token_s):
            self._itl.observe(after - before)
        self._e2e.observe(record.end_s)

    def serve(self, host: str, port: int) -> Callable[[], None]:
        """Serve ``/metrics`` from a thread; returns what stops it.

        Raises:
            LoadTestError: the address cannot be bound.

        """
        try:
            server, thread = start_http_server(port, addr=host, registry=self.registry)
        except (OSError, OverflowError) as error:
            in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            why = "the port is in use" if in_use else str(error)
            raise LoadTestError(f"--exporter-port {port}: cannot listen on {host}: {why}") from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop
