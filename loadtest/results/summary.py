"""Records in, exact statistics out."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from loadtest.results import records
from loadtest.results.energy import energy_of
from loadtest.results.intervals import with_intervals
from loadtest.results.percentiles import distribution
from loadtest.results.records import Record
from loadtest.results.schema import (
    Goodput,
    Latency,
    MetricSeries,
    RequestCounts,
    StageResult,
    Throughput,
    TokenCounts,
)
from loadtest.stage_spec import StageSpec
from loadtest.statistics.samples import SampleCollector

_LAG_WORTH_A_NOTE_MS = 10.0
# A stage is invalid when the generator was later than this at P95. A slow server's latencies bear more of it.
_ALWAYS_ALLOWED_MS, _ALLOWED_SHARE_OF_TTFT = 10.0, 0.05
_CACHED_WORTH_A_NOTE = 0.02
_HITS, _QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"


class StageAccumulator:
    """Collects the records of one stage, one at a time, keeping numbers only.

    Args:
        slo_ms: limits for goodput: any of ``ttft``, ``tpot`` and ``e2el``, in milliseconds.

    """

    def __init__(self, slo_ms: dict[str, float]) -> None:
        self._slo = slo_ms
        self._outcomes: Counter[str] = Counter()
        self._warmups: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._reasons: Counter[str] = Counter()
        self._ttft, self._tpot, self._itl, self._e2e, self._lag = (array("d") for _ in range(5))
        self._from_send, self._lateness = array("d"), array("d")
        self._prompt_tokens, self._output_tokens = array("q"), array("q")
        self._asked_prompt, self._asked_output = array("q"), array("q")
        self._cached_tokens = 0
        self._chunks = 0
        self._good = 0
        self._retokenized = self._uncounted = self._unknown_prompts = 0
        self._first_start: float | None = None
        self._last_start = 0.0
        self._last_end = 0.0
        self._busy_s = 0.0

    def add(self, record: Record) -> None:
        """Take one record."""
        if record.warmup:
            self._warmups[record.outcome] += 1
            return
        self._outcomes[record.outcome] += 1
        if record.outcome == records.CANCELLED:
            return
        begin, end = record.intended_unix_s, record.intended_unix_s + record.end_s
        self._first_start = begin if self._first_start is None else min(self._first_start, begin)
        self._last_start = max(self._last_start, begin)
        self._last_end = max(self._last_end, end)
        self._busy_s += record.end_s - (record.start_s or 0.0)
        if record.start_s is not None:
            self._lateness.append((record.start_s - record.held_s) * 1000)
        if record.outcome == records.ERROR:
            kind = record.error or records.CLIENT_ERROR
            self._failures[kind] += 1
            self._examples.setdefault(kind, record.message or "")
        else:
            self._add_success(record)

    def _add_success(self, record: Record) -> None:
        ttft, tpot, e2e = record.first_token_s, record.tpot_s, record.end_s
        if ttft is not None:
            self._ttft.append(ttft * 1000)
            self._from_send.append((ttft - (record.start_s or 0.0)) * 1000)
        self._e2e.append(e2e * 1000)
        self._lag.append((record.start_s or 0.0) * 1000)
        if tpot is not None:
            self._tpot.append(tpot * 1000)
        times = record.token_s
        self._itl.extend((after - before) * 1000 for before, after in pairwise(times))
        self._chunks += len(times)
        counted = record.counted_output_tokens
        if counted is None:
            self._uncounted += 1
        else:
            self._output_tokens.append(counted)
            self._retokenized += record.output_tokens is None
        if record.prompt_tokens is None:
            self._unknown_prompts += 1
        else:
            self._prompt_tokens.append(record.prompt_tokens)
        self._cached_tokens += record.cached_tokens or 0
        if record.requested_prompt_tokens is not None:
            self._asked_prompt.append(record.requested_prompt_tokens)
        if record.requested_output_tokens is not None:
            self._asked_output.append(record.requested_output_tokens)
        self._reasons[record.finish_reason or "unknown"] += 1
        self._good += record.meets(self._slo)

    def result(self, spec: StageSpec, finished: bool, server_metrics: dict[str, MetricSeries]) -> StageResult:
        """Return the stage's results.

        Args:
            spec: what the stage was asked to do.
            finished: whether it ran to its end.
            server_metrics: the server's own metrics meanwhile.

        """
        times = (self._ttft, self._tpot, self._itl, self._e2e, self._lag, self._from_send, self._lateness)
        latency = Latency(*(distribution(values) for values in times))
        invalid = _too_late(latency)
        throughput = self._throughput()
        # A total that leaves some answers out would be wrong, and nobody would see it.
        output = None if self._uncounted else self._tokens(self._output_tokens, self._asked_output)
        per_chunk = output.total / self._chunks if output and self._chunks else None
        ok, failed = self._outcomes[records.OK], self._outcomes[records.ERROR]
        goodput = None
        if self._slo and throughput is not None:
            goodput = Goodput(dict(self._slo), self._good, self._good / (ok + failed), self._good / throughput.window_s)
        open_loop = spec.mode == "open"
        energy, energy_notes = energy_of(server_metrics, output.total if output else None)
        return StageResult(
            index=spec.index,
            mode=spec.mode,
            concurrency=spec.concurrency,
            rate=spec.rate,
            arrival=spec.arrival if open_loop else None,
            burstiness=spec.burstiness if open_loop else None,
            max_concurrency=spec.max_concurrency if open_loop else None,
            started_unix_s=self._first_start,
            finished=finished,
            requests=RequestCounts(
                sent=self._outcomes.total(),
                ok=ok,
                failed=failed,
                cancelled=self._outcomes[records.CANCELLED],
                warmup=self._warmups.total(),
                warmup_failed=self._warmups[records.ERROR],
            ),
            failures=dict(sorted(self._failures.items())),
            failure_examples=dict(sorted(self._examples.items())),
            latency=latency,
            throughput=throughput,
            goodput=goodput,
            prompt_tokens=None if self._unknown_prompts else self._tokens(self._prompt_tokens, self._asked_prompt),
            output_tokens=output,
            tokens_per_chunk=per_chunk,
            finish_reasons=dict(sorted(self._reasons.items())),
            server_metrics=server_metrics,
            invalid=invalid,
            shape=spec.shape,
            profile=spec.profile,
            energy=energy,
            notes=[
                *([invalid] if invalid else []),
                *self._notes(spec, latency, per_chunk, finished),
                *_cache_notes(self._cached_tokens, sum(self._prompt_tokens), server_metrics),
                *energy_notes,
            ],
        )

    def _throughput(self) -> Throughput | None:
        if self._first_start is None:
            return None
        window = max(self._last_end - self._first_start, 1e-6)
        ended = self._outcomes[records.OK] + self._outcomes[records.ERROR]
        output = None if self._uncounted else sum(self._output_tokens)
        total = None if output is None or self._unknown_prompts else output + sum(self._prompt_tokens)
        gaps = self._last_start - self._first_start
        return Throughput(
            window_s=window,
            requests_per_s=self._outcomes[records.OK] / window,
            output_tokens_per_s=None if output is None else output / window,
            total_tokens_per_s=None if total is None else total / window,
            offered_requests_per_s=(ended - 1) / gaps if gaps > 0 else ended / window,
            mean_in_flight=self._busy_s / window,
        )

    @staticmethod
    def _tokens(counts: array[int], asked: array[int]) -> TokenCounts | None:
        if not counts:
            return None
        wanted = float(np.mean(asked)) if asked else None
        return TokenCounts(sum(counts), float(np.mean(counts)), min(counts), max(counts), wanted)

    def _notes(self, spec: StageSpec, latency: Latency, per_chunk: float | None, finished: bool) -> list[str]:
        notes = []
        if not finished:
            notes.append("cut short: the stage is partial")
        if self._uncounted:
            notes.append(
                f"{self._uncounted} answers had no usage, and nothing counted their tokens: output tokens and "
                "their rate are undefined, and TPOT leaves these answers out; --tokenizer PATH counts them"
            )
        if self._retokenized:
            notes.append(
                f"{self._retokenized} answers had no usage: their text was tokenized again, which may differ by a few "
                "tokens from what was generated"
            )
        if per_chunk is not None and not 0.95 <= per_chunk <= 1.05:
            notes.append(
                f"{per_chunk:.2f} tokens a chunk: itl_ms is the gap between chunks, not between tokens; use tpot_ms"
            )
        lag = latency.schedule_lag_ms
        if lag is not None and lag.p99 > _LAG_WORTH_A_NOTE_MS and spec.mode == "open" and not _too_late(latency):
            cause = "--max-concurrency or the generator" if spec.max_concurrency else "the generator"
            notes.append(f"requests left up to {lag.p99:.0f} ms (P99) late because of {cause}; latencies include it")
        return notes


def _too_late(latency: Latency) -> str | None:
    """Return why a late generator makes the stage's latencies useless; None when it was in time."""
    late, ttft = latency.send_lateness_ms, latency.ttft_from_send_ms
    allowed = max(_ALWAYS_ALLOWED_MS, _ALLOWED_SHARE_OF_TTFT * (ttft.p50 if ttft else 0.0))
    if late is None or late.p95 <= allowed:
        return None
    return (
        f"invalid: the load generator sent its requests {late.p95:.0f} ms late (P95; up to {allowed:.0f} ms are sound)"
        ", and that is in every latency but TTFT from the send; use a lower rate, more --processes or a faster machine"
    )


def _cache_notes(cached: int, prompt_tokens: int, server_metrics: dict[str, MetricSeries]) -> list[str]:
    """Say that the server's prefix cache answered, by its usage fields or else by its own counters."""
    share = cached / prompt_tokens if prompt_tokens else 0.0
    if not cached and _HITS in server_metrics and _QUERIES in server_metrics:
        share = server_metrics[_HITS].delta / max(server_metrics[_QUERIES].delta, 1.0)
    if share <= _CACHED_WORTH_A_NOTE:
        return []
    return [
        f"{share:.0%} of the prompt tokens came from the server's prefix cache, which shortens TTFT: wanted with "
        "shared prefixes, --turns and --trace; else it knew these prompts, from a run of the same --seed or the same "
        "--prompts file"
    ]


def summarize(
    items: Iterable[Record],
    specs: Sequence[StageSpec],
    slo_ms: dict[str, float] | None = None,
    server_metrics: dict[int, dict[str, MetricSeries]] | None = None,
    unfinished: frozenset[int] = frozenset(),
) -> list[StageResult]:
    """Return the results of every stage in ``specs``.

    Args:
        items: records of any order; those of other stages are ignored.
        specs: the stages.
        slo_ms: limits for goodput.
        server_metrics: by stage.
        unfinished: indices of stages that were cut short.

    """
    accumulators = {spec.index: StageAccumulator(slo_ms or {}) for spec in specs}
    collectors = {spec.index: SampleCollector(slo_ms or {}) for spec in specs}
    for record in items:
        if record.stage in accumulators:
            accumulators[record.stage].add(record)
            collectors[record.stage].add(record)
    results = []
    for spec in specs:
        series = (server_metrics or {}).get(spec.index, {})
        result = accumulators[spec.index].result(spec, spec.index not in unfinished, series)
        results.append(with_intervals(result, collectors[spec.index].samples()))
    return results
