"""Which points improve on their baseline, and which hypotheses hold: from what was measured, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.report.metrics import MORE
from bench.schema import Estimate
from bench.statistics import holm
from bench.study import compare
from bench.study.plan import Hypothesis, Plan
from bench.study.points import Point, of
from bench.study.samples import ACCURACY, Measured, Sample, asked_tasks, by_task, headline
from bench.study.schema import (
    FALSIFIED,
    HELD,
    UNDECIDED,
    Comparison,
    Decided,
    HypothesisResult,
    Improvement,
)

SIGNIFICANT = 0.05
COSTS = ("memory_bytes", "output_tokens_per_s", "step_ratio", "output_joules")
"""What a point may improve unless the plan says it."""
RATIOS = (*COSTS, "perplexity", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "tpot_p95_ms", "kv_tokens")
"""Metrics that are compared as a ratio."""


def is_energy(key: str) -> bool:
    """Return whether a metric is an energy."""
    return key.partition("@")[0].endswith("_joules")


def base_of(one: Measured, found: Sequence[Measured]) -> Measured | None:
    """Return the baseline of a point, on the same hardware; None for a baseline."""
    for other in found:
        if other.point.is_baseline and (other.point.model, other.hardware) == (one.point.model, one.hardware):
            return None if other is one else other
    return None


def as_ratio(key: str) -> bool:
    """Return whether a metric is compared as a ratio."""
    return key.partition("@")[0] in RATIOS or is_energy(key)


def changed(tested: Sample, base: Sample) -> tuple[str, tuple[Estimate, float | None] | None]:
    """Return how a metric is compared, and the comparison with its p."""
    if as_ratio(tested.key):
        return "ratio", compare.ratio(tested, base)
    return "difference", compare.difference(tested, base)


def compared(plan: Plan, found: Sequence[Measured]) -> list[Comparison]:
    """Return every point's main metrics beside its baseline's, with p after Holm over all of them.

    What has no error (bits, bytes) is not tested and stands in no correction, and neither are the same figures under
    every load (the loads of the plan are steps of one curve) nor the parts of a group of tasks, whose score is tested.
    """
    made: list[Comparison] = []
    for one in found:
        base = base_of(one, found)
        if base is None:
            continue
        for key in _tested_keys(plan, one):
            if key not in base.samples:
                continue
            measure, result = changed(one.samples[key], base.samples[key])
            if result is not None:
                change, p = result
                better = one.samples[key].better
                made.append(Comparison(one.point.name, one.hardware, key, better, measure, change, p, None, ""))
    adjusted = iter(holm([c.p for c in made if c.p is not None]))
    return [_judged(c, next(adjusted) if c.p is not None else None) for c in made]


def _tested_keys(plan: Plan, one: Measured) -> list[str]:
    metrics = by_task(one.samples)
    keys = [f"{task}/{headline(metrics[task])}" for task in asked_tasks(plan, metrics)]
    others = ("perplexity", "needle", "output_tokens_per_s", "ttft_p95_ms", "tpot_p95_ms", ACCURACY)
    energies = [key for key in one.samples if is_energy(key) and "@" not in key]
    return [key for key in (*others, *energies, *keys) if key in one.samples and not one.samples[key].exact]


def _judged(comparison: Comparison, p: float | None) -> Comparison:
    neutral = 1.0 if comparison.measure == "ratio" else 0.0
    verdict = "not significant"
    if p is not None and p < SIGNIFICANT:
        more = comparison.change.value > neutral
        verdict = "better" if more == (comparison.better == MORE) else "worse"
    return replace(comparison, p_holm=p, verdict=verdict)


def quality_metric(plan: Plan, found: Sequence[Measured]) -> str:
    """Return the metric that stands for quality: the plan's, else the tasks' accuracy, else the divergence."""
    if plan.improvement.quality is not None:
        return plan.improvement.quality
    return ACCURACY if any(ACCURACY in one.samples for one in found) else "kl"


def improvements(plan: Plan, found: Sequence[Measured]) -> list[Improvement]:
    """Return for every point whether it improves on its baseline.

    It does if its quality is not worse by the plan's margin (a one-sided test of non-inferiority) and at least one of
    its costs is better (one-sided, Bonferroni over the costs that have an error). Both must be, so the larger p is the
    point's (an intersection-union test, Berger 1982); Holm's correction is over the points.
    """
    quality = quality_metric(plan, found)
    made = []
    for one in found:
        base = base_of(one, found)
        if base is not None:
            made.append(_improvement(plan, quality, one, base))
    adjusted = iter(holm([one.p for one in made if one.p is not None]))
    return [_concluded(one, next(adjusted) if one.p is not None else None) for one in made]


def _improvement(plan: Plan, quality: str, one: Measured, base: Measured) -> Improvement:
    why = ""
    change: Estimate | None = None
    p_quality: float | None = None
    tested = one.samples.get(quality)
    if tested is None or quality not in base.samples:
        why = f"{quality} was not measured"
    elif (found := compare.difference(tested, base.samples[quality])) is None:
        why = f"{quality} was measured on other units than the baseline's"
    else:
        change = found[0]
        gain = change if tested.better == MORE else compare.negated(change)
        p_quality = compare.beyond(gain, -plan.improvement.margin)
        if one.point.seeded and len(tested.runs) < compare.RUNS_NEEDED:
            why = f"{len(tested.runs)} of at least {compare.RUNS_NEEDED} runs with other seeds"
        elif p_quality is None:
            why = f"nothing tells the error of {quality}"
    keys = plan.improvement.costs or COSTS
    gains: dict[str, float] = {}
    tests: list[float] = []
    exact = False
    for key in keys:
        if key not in one.samples or key not in base.samples:
            continue
        cost, ratio = one.samples[key], compare.ratio(one.samples[key], base.samples[key])
        if ratio is None:
            continue
        estimate, _ = ratio
        better = estimate.value > 1 if cost.better == MORE else estimate.value < 1
        if better:
            gains[key] = estimate.value
        if cost.exact:
            exact |= better
        elif (p := _one_sided(estimate, cost.better)) is not None:
            tests.append(p)
    p_cost = 0.0 if exact else min(1.0, len(tests) * min(tests)) if tests else None
    if not why and p_cost is None:
        why = "no cost has an error, or none was measured: " + ", ".join(keys)
    p = None if p_quality is None or p_cost is None else max(p_quality, p_cost)
    return Improvement(one.point.name, one.hardware, quality, change, p_quality, gains, p_cost, p, None, False, why)


def _one_sided(estimate: Estimate, better: str) -> float | None:
    """Return the p of a ratio's being no better than 1."""
    return compare.beyond(estimate, 1.0) if better == MORE else compare.beyond(compare.negated(estimate), -1.0)


def _concluded(one: Improvement, p: float | None) -> Improvement:
    why = one.why_not
    if not why and (p is None or p >= SIGNIFICANT):
        if (one.p_quality or 0) >= SIGNIFICANT:
            why = f"{one.quality} may be worse by more than the margin"
        elif (one.p_cost or 0) >= SIGNIFICANT:
            why = "no cost is significantly better"
        else:
            why = "not significant among so many points"
    return replace(one, p_holm=p, improves=not why, why_not=why)


def decided(plan: Plan, points: Sequence[Point], found: Sequence[Measured]) -> list[HypothesisResult]:
    """Return the hypotheses with their verdicts.

    An interval of the stated confidence lies on the right side of the bound: held; on the wrong side: falsified; on
    both, or none there is: not decidable. Where only some of several points are needed, each one's interval is widened
    (Bonferroni), so that the hypothesis as a whole has the stated confidence.
    """
    by_place = {(one.point.name, one.hardware): one for one in found}
    made = []
    for hypothesis in plan.hypotheses:
        pairs = of(hypothesis, points)
        places = [(point, other, label) for point, other in pairs for label in point.hardware]
        confidence = hypothesis.confidence
        if hypothesis.needed != "all":
            confidence = 1 - (1 - confidence) / len(places)
        each = [_at(hypothesis, by_place, place, confidence) for place in places]
        made.append(
            HypothesisResult(hypothesis.name, hypothesis.claim, criterion(hypothesis), _whole(hypothesis, each), each)
        )
    return made


def criterion(hypothesis: Hypothesis) -> str:
    """Return a hypothesis as a formula."""
    relation = "≥" if hypothesis.relation == "at_least" else "≤"
    against = hypothesis.against if isinstance(hypothesis.against, str) else ", ".join(
        f"{key} {value}" for key, value in hypothesis.against.items()
    )  # fmt: skip
    measure = {
        "value": hypothesis.metric, "difference": f"{hypothesis.metric} less that of {against}",
        "ratio": f"{hypothesis.metric} over that of {against}",
    }[hypothesis.measure]  # fmt: skip
    which = {"all": "every point", "any": "some point"}.get(str(hypothesis.needed), f"{hypothesis.needed} points")
    return f"{measure} {relation} {hypothesis.bound:g} at {which}, {hypothesis.confidence:.3g} confidence"


def _at(
    hypothesis: Hypothesis,
    by_place: dict[tuple[str, str], Measured],
    place: tuple[Point, Point | None, str],
    confidence: float,
) -> Decided:
    point, other, label = place
    against = None if other is None else other.name
    one = by_place.get((point.name, label))
    base = None if other is None else by_place.get((other.name, label))
    sample = one.samples.get(hypothesis.metric) if one is not None else None
    runs = 0 if sample is None else len(sample.runs)

    def undecided(why: str, value: float | None = None) -> Decided:
        return Decided(point.name, label, against, value, None, None, runs, UNDECIDED, why)

    if sample is None:
        return undecided(f"{hypothesis.metric} was not measured at this point")
    if other is None:
        estimate = compare.value(sample)
    else:
        reference = base.samples.get(hypothesis.metric) if base is not None else None
        if reference is None:
            return undecided(f"{hypothesis.metric} was not measured at {other.name}")
        found = (compare.ratio if hypothesis.measure == "ratio" else compare.difference)(sample, reference)
        if found is None:
            reason = "perplexities are compared by their ratio" if sample.log else "both were measured on other units"
            return undecided(reason)
        estimate = found[0]
    if point.seeded and not sample.exact and runs < compare.RUNS_NEEDED:
        # The interval would be of the questions only, and another seed might decide otherwise.
        seeds = f"{runs} of at least {compare.RUNS_NEEDED} runs with other seeds"
        return undecided(seeds, estimate.value)
    ends = compare.interval(estimate, confidence)
    if ends is None:
        return undecided(f"nothing tells its error ({runs} run{'s' if runs != 1 else ''})", estimate.value)
    low, high = ends
    inside = low >= hypothesis.bound if hypothesis.relation == "at_least" else high <= hypothesis.bound
    outside = high < hypothesis.bound if hypothesis.relation == "at_least" else low > hypothesis.bound
    verdict = HELD if inside else FALSIFIED if outside else UNDECIDED
    why = "" if verdict != UNDECIDED else "the interval holds the bound"
    return Decided(point.name, label, against, estimate.value, low, high, runs, verdict, why)


def _whole(hypothesis: Hypothesis, each: Sequence[Decided]) -> str:
    needed = {"all": len(each), "any": 1}.get(str(hypothesis.needed)) or int(hypothesis.needed)
    held = sum(one.verdict == HELD for one in each)
    falsified = sum(one.verdict == FALSIFIED for one in each)
    if held >= needed:
        return HELD
    return FALSIFIED if len(each) - falsified < needed else UNDECIDED
