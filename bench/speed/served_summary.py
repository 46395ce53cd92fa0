"""Rounds in, figures over rounds out; ratios to the baseline are taken within a round."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from pydantic import TypeAdapter

from bench.speed.alternation import Alternation
from bench.speed.kv_bench import spread
from bench.speed.schema import Spread
from bench.speed.served_schema import Energy, Idle, Load, PointRound, Round, ServedDtype, ServedPoint

_ROUND = TypeAdapter(Round)
LATE_MS = 10
FAILED_SHARE = 0.02
"""Requests of a load that may fail. What they took counts for the tokens of the others, which is too much by that."""
Figure = Callable[[PointRound, Idle], float | None]
"""A figure of one round; None where it is undefined."""


def summarize(turns: Alternation) -> list[ServedDtype]:
    """Return the result of each KV-cache dtype that was measured, and why others were not."""
    rounds = {
        name: {index: _ROUND.validate_python(sample) for index, sample in turns.of(name).items()}
        for name in turns.names
    }
    base = rounds[turns.names[0]]
    results = []
    for name, own in rounds.items():
        if not own:
            results.append(ServedDtype(name, turns.errors.get(name, "not measured yet")))
            continue
        last = own[max(own)]
        base_tokens = base[max(base)].kv_cache.tokens if base else None
        watts = [r.idle.watts for r in own.values() if r.idle.watts is not None]
        results.append(
            ServedDtype(
                kv_cache_dtype=name,
                error=turns.errors.get(name),
                kv_cache=last.kv_cache,
                capacity_ratio=last.kv_cache.tokens / base_tokens if base_tokens else None,
                memory=max((r.memory for r in own.values()), key=lambda memory: memory.peak or 0),
                idle_watts=spread(watts) if watts else None,
                points=[_point(number, own, base) for number in range(len(last.points))],
                rounds=list(own.values()),
            )
        )
    return results


def _point(number: int, own: dict[int, Round], base: dict[int, Round]) -> ServedPoint:
    points = [r.points[number] for r in own.values()]

    def over(figure: Figure) -> Spread | None:
        values = [figure(r.points[number], r.idle) for r in own.values()]
        found = [value for value in values if value is not None]
        return spread(found) if found else None

    def surely(figure: Figure) -> Spread:
        found = over(figure)
        assert found is not None, "a round is kept only if requests succeeded"
        return found

    def ratio(figure: Figure) -> float | None:
        pairs = [
            (figure(own[i].points[number], own[i].idle), figure(base[i].points[number], base[i].idle))
            for i in sorted(set(own) & set(base))
        ]
        found = [mine / its for mine, its in pairs if mine is not None and its]
        return median(found) if found else None

    return ServedPoint(
        batch=points[0].batch,
        context=points[0].context,
        output_tokens_per_s=surely(lambda p, _: p.generation.output_tokens / p.generation.window_s),
        output_ratio=ratio(lambda p, _: p.generation.output_tokens / p.generation.window_s),
        prefill_tokens_per_s=surely(lambda p, _: p.prefill.prompt_tokens / p.prefill.window_s),
        prefill_ratio=ratio(lambda p, _: p.prefill.prompt_tokens / p.prefill.window_s),
        ttft_p50_ms=surely(_latency("ttft_ms", "p50")),
        ttft_p95_ms=surely(_latency("ttft_ms", "p95")),
        tpot_p50_ms=over(_latency("tpot_ms", "p50")),
        tpot_p95_ms=over(_latency("tpot_ms", "p95")),
        e2e_p50_ms=surely(_latency("e2e_ms", "p50")),
        e2e_p95_ms=surely(_latency("e2e_ms", "p95")),
        requests=sum(p.generation.ok for p in points),
        failed=sum(p.generation.failed + p.prefill.failed for p in points),
        energy=_energy(over),
        decode_energy_ratio=ratio(decode_joules),
        notes=_notes(list(own.values()), points),
    )


def _latency(kind: str, percentile: str) -> Figure:
    def figure(point: PointRound, _: Idle) -> float | None:
        found = getattr(point.generation, kind)
        return None if found is None else float(getattr(found, percentile))

    return figure


def _energy(over: Callable[[Figure], Spread | None]) -> Energy | None:
    prefill, output, share = over(prefill_joules), over(output_joules), over(prefill_share)
    if prefill is None or output is None or share is None:
        return None
    return Energy(
        prefill=prefill,
        prefill_net=over(lambda p, idle: prefill_joules(p, idle, net=True)),
        decode=over(decode_joules),
        decode_net=over(lambda p, idle: decode_joules(p, idle, net=True)),
        output=output,
        output_net=over(lambda p, idle: output_joules(p, idle, net=True)),
        prefill_share=share,
    )


def _joules(load: Load, idle: Idle, net: bool) -> float | None:
    """Return the energy of a load; None where unknown, and where failed requests may have taken too much of it."""
    if load.joules is None or _lost(load) > FAILED_SHARE:
        return None
    if not net:
        return sum(load.joules)
    return None if idle.watts is None else sum(load.joules) - idle.watts * load.window_s


def _lost(load: Load) -> float:
    """Return the share of a load's requests that failed."""
    return load.failed / (load.ok + load.failed)


def prefill_joules(point: PointRound, idle: Idle, net: bool = False) -> float | None:
    """Return joules a prompt token of the prefill load."""
    joules = _joules(point.prefill, idle, net)
    return None if joules is None else joules / point.prefill.prompt_tokens


def output_joules(point: PointRound, idle: Idle, net: bool = False) -> float | None:
    """Return joules a token of the answers, all that the generation load took."""
    joules = _joules(point.generation, idle, net)
    return None if joules is None else joules / point.generation.output_tokens


def decode_joules(point: PointRound, idle: Idle, net: bool = False) -> float | None:
    """Return joules a token after each answer's first; None where the prompts seem to have cost everything."""
    joules, prefill = _joules(point.generation, idle, net), prefill_joules(point, idle, net)
    tokens = point.generation.output_tokens - point.generation.ok
    if joules is None or prefill is None or tokens < 1:
        return None
    decode = joules - prefill * point.generation.prompt_tokens
    return decode / tokens if decode > 0 else None


def prefill_share(point: PointRound, idle: Idle) -> float | None:
    """Return what share of the generation load's energy its prompts took."""
    joules, prefill = _joules(point.generation, idle, False), prefill_joules(point, idle)
    return None if not joules or prefill is None else prefill * point.generation.prompt_tokens / joules


def _notes(rounds: list[Round], points: list[PointRound]) -> list[str]:
    loads = [load for point in points for load in (point.prefill, point.generation)]
    without = dict.fromkeys(load.missing for load in loads if load.missing)
    notes = [f"no energy: {why}" for why in without]
    watched = dict.fromkeys(r.idle.missing for r in rounds if r.idle.missing and r.idle.missing not in without)
    notes += [f"no idle power: {why}" for why in watched]
    if failed := sum(load.failed for load in loads):
        lost = max(_lost(load) for load in loads)
        so = "so there is no energy" if lost > FAILED_SHARE else f"so energy a token is up to {lost:.1%} too high"
        notes.append(f"{failed} requests failed, and what they took brought no token, {so}")
    if preempted := sum(load.preemptions or 0 for load in loads):
        notes.append(f"{preempted} times the cache was too small for all requests, and one was computed again")
    late = max((load.generator_lag_ms or 0 for load in loads), default=0)
    if late > LATE_MS:
        notes.append(f"the load generator itself ran late (P99 {late:.0f} ms), and latencies include that")
    pairs = list(zip(points, (r.idle for r in rounds), strict=True))
    if any(prefill_share(p, idle) is not None and decode_joules(p, idle) is None for p, idle in pairs):
        notes.append("prefill seems to have taken all of a load's energy: raise --output-tokens or --duration")
    return notes
