"""Estimates of a metric, and of what one point has more or less of it than another, over units and runs.

Runs differ by their seeds and units (windows, questions) by what is asked; both are samples of what might have been.
With three runs and more, both variances are in an estimate; with fewer, only that of the units.
"""

from __future__ import annotations

import math
from dataclasses import replace

from scipy import optimize, stats

from bench.schema import Estimate
from bench.statistics import between_and_within, exp_estimate, mean_estimate, paired, proportion
from bench.study.samples import Sample

RUNS_NEEDED = 3
"""Runs of what has a seed, for an interval that speaks of other seeds too."""


def value(sample: Sample) -> Estimate:
    """Return a metric's value with its 95% interval; without one where nothing tells its error."""
    runs = [list(run.values()) for run in sample.runs]
    groups = _groups(sample)
    if len(runs) == 1 and len(runs[0]) > 1 and set(runs[0]) <= {0.0, 1.0} and not sample.exact and groups is None:
        return proportion(round(math.fsum(runs[0])), len(runs[0]))
    found = _estimate(runs, sample.exact, groups)
    return exp_estimate(found) if sample.log else found


def _groups(sample: Sample) -> list[str] | None:
    """Return the document of each unit, the unit itself where it shares none; None where none is shared."""
    return [sample.documents.get(unit, unit) for unit in sample.runs[0]] if sample.documents else None


def _of_documents(runs: list[list[float]], groups: list[str]) -> list[list[float]]:
    """Return values of documents, whose mean is that of their units: its spread is that of a mean over clusters."""
    names = list(dict.fromkeys(groups))
    scale = len(names) / len(groups)
    made = []
    for run in runs:
        mean = math.fsum(run) / len(run)
        sums = dict.fromkeys(names, 0.0)
        for group, value in zip(groups, run, strict=True):
            sums[group] += value - mean
        made.append([mean + scale * total for total in sums.values()])
    return made


def _estimate(runs: list[list[float]], exact: bool, groups: list[str] | None = None) -> Estimate:
    mean = math.fsum(math.fsum(run) / len(run) for run in runs) / len(runs)
    if exact:
        return Estimate(mean, 0.0, mean, mean, len(runs))
    if len(runs) >= RUNS_NEEDED:
        return between_and_within(runs if groups is None else _of_documents(runs, groups)).mean
    if len({len(run) for run in runs}) > 1 or len(runs[0]) == 1:
        return Estimate(mean, None, None, None, len(runs))
    return mean_estimate([math.fsum(values) / len(runs) for values in zip(*runs, strict=True)], groups)


def _table(tested: Sample, base: Sample) -> tuple[list[list[float]], list[list[float]]] | None:
    """Return both samples' values, run by run and unit by unit in the same order; None if their units differ."""
    units = list(tested.runs[0])
    if any(set(run) != set(units) for run in (*tested.runs, *base.runs)):
        return None
    count = max(len(tested.runs), len(base.runs))

    def values(sample: Sample) -> list[list[float]]:
        # What has one run because no seed reaches it stands beside every run of the other.
        return [[sample.runs[min(i, len(sample.runs) - 1)][unit] for unit in units] for i in range(count)]

    return values(tested), values(base)


def difference(tested: Sample, base: Sample) -> tuple[Estimate, float | None] | None:
    """Return how much more of a metric a point has than another, and the two-sided p of no difference.

    Args:
        tested: of the point.
        base: of what it is compared with.

    Returns:
        None where both were not measured on the same units, or for a perplexity, whose ratio is compared. p is None
        where nothing tells the error.

    """
    table = _table(tested, base)
    if table is None or tested.log:
        return None
    return _difference(*table, tested.exact and base.exact, _groups(tested))


def _difference(
    tested: list[list[float]], base: list[list[float]], exact: bool, groups: list[str] | None
) -> tuple[Estimate, float | None]:
    differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(tested, base, strict=True)]
    if len(tested) == 1 and len(tested[0]) > 1 and not exact:
        compared = paired(tested[0], base[0], groups)
        return compared.change, compared.p
    found = _estimate(differences, exact, groups)
    return found, None if exact else two_sided(found)


def ratio(tested: Sample, base: Sample) -> tuple[Estimate, float | None] | None:
    """Return how many times as much of a metric a point has as another, and the two-sided p of a ratio of 1.

    Returns:
        None where units differ or the other's mean is not above 0. The error of a ratio of means is that of its
        linearized values (Cochran 1977, section 6.4).

    """
    table = _table(tested, base)
    if table is None:
        return None
    if tested.log:
        found, p = _difference(*table, False, _groups(tested))
        return exp_estimate(found), p
    mean_base = math.fsum(map(math.fsum, table[1])) / sum(map(len, table[1]))
    if mean_base <= 0:
        return None
    whole = math.fsum(map(math.fsum, table[0])) / sum(map(len, table[0])) / mean_base
    linear = [[(a - whole * b) / mean_base for a, b in zip(*pair, strict=True)] for pair in zip(*table, strict=True)]
    found = _estimate(linear, tested.exact and base.exact, _groups(tested))
    shifted = replace(
        found, value=whole, low=None if found.low is None else whole + found.low - found.value,
        high=None if found.high is None else whole + found.high - found.value,
    )  # fmt: skip
    exact = tested.exact and base.exact
    return shifted, None if exact else two_sided(replace(shifted, value=whole - 1))


def negated(estimate: Estimate) -> Estimate:
    """Return an estimate of the opposite."""
    low, high = (None if end is None else -end for end in (estimate.high, estimate.low))
    return replace(estimate, value=-estimate.value, low=low, high=high)


def degrees(estimate: Estimate) -> float:
    """Return the degrees of freedom that an estimate's interval was made with; infinite for a normal one."""
    if not estimate.standard_error or estimate.low is None or estimate.high is None:
        return math.inf
    reach = (estimate.high - estimate.low) / 2 / estimate.standard_error
    if reach <= float(stats.norm.ppf(0.975)) + 1e-9:
        return math.inf
    return float(optimize.brentq(lambda nu: stats.t.ppf(0.975, nu) - reach, 0.5, 1e9))


def standard_error(estimate: Estimate) -> float | None:
    """Return an estimate's error; where it is 0 but the interval has a width, what that width says."""
    if estimate.standard_error or estimate.low is None or estimate.high is None:
        return estimate.standard_error
    return (estimate.high - estimate.low) / 2 / float(stats.norm.ppf(0.975))


def two_sided(estimate: Estimate) -> float | None:
    """Return the p of an estimate's being 0; None where nothing tells its error."""
    error = standard_error(estimate)
    if error is None:
        return None
    if not error:
        return 1.0 if estimate.value == 0 else 0.0
    return 2 * float(stats.t.sf(abs(estimate.value) / error, degrees(estimate)))


def beyond(estimate: Estimate, bound: float) -> float | None:
    """Return the one-sided p of an estimate's being at most ``bound`` when it seems to be above."""
    error = standard_error(estimate)
    if error is None:
        return None
    if not error:
        return 0.0 if estimate.value > bound else 1.0
    return float(stats.t.sf((estimate.value - bound) / error, degrees(estimate)))


def interval(estimate: Estimate, confidence: float) -> tuple[float, float] | None:
    """Return an estimate's interval at another confidence than 95%, its two sides in the same proportion."""
    if estimate.low is None or estimate.high is None:
        return None
    freedom = degrees(estimate)
    stretch = float(stats.t.ppf((1 + confidence) / 2, freedom) / stats.t.ppf(0.975, freedom))
    low, high = (estimate.value + (end - estimate.value) * stretch for end in (estimate.low, estimate.high))
    return low, high
