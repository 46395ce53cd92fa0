"""Comparison of two configurations question by question, and what a table of comparisons shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.schema import Estimate
from bench.statistics import bootstrap
from bench.statistics.counts import mcnemar, score_interval, smallest_difference
from bench.statistics.estimates import codes, mean_estimate

MARGIN = 0.01
"""A loss of accuracy that does not matter unless told otherwise: a point."""


@dataclass(frozen=True)
class Paired:
    """A comparison of two configurations, question by question.

    Attributes:
        change: mean difference, tested less baseline. Its interval is Tango's where ``p`` is McNemar's, else that of
            the bootstrap; its standard error is clustered where questions are.
        p: two-sided, of no change: McNemar's exact test (1947) where all scores are 0 or 1 and questions stand for
            themselves, else the paired bootstrap of 10,000 resamples, of clusters where questions share a document.
        more: questions with a higher score than the baseline's.
        fewer: questions with a lower one.
        smallest: smallest true difference that this sample would have shown with 80% power at two-sided 5%, in the
            scores' unit; None where the sample cannot say: fewer than 2 units, or 6 right and wrong answers, or scores
            of other kinds of which none differ.

    """

    change: Estimate
    p: float
    more: int
    fewer: int
    smallest: float | None


def paired(tested: Sequence[float], baseline: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Paired:
    """Compare scores of the same questions, in the same order.

    Args:
        tested: one score a question; at least one.
        baseline: of the same questions.
        clusters: a label a question; questions of one label share a document and are drawn together.

    Raises:
        ValueError: numbers of scores or labels differ, or there are none.

    """
    differences = [a - b for a, b in zip(tested, baseline, strict=True)]
    more, fewer = (sum(1 for d in differences if sign * d > 0) for sign in (1, -1))
    change = mean_estimate(differences, clusters)
    groups = codes(clusters, len(differences))
    binary = set(tested) | set(baseline) <= {0.0, 1.0}
    if not more + fewer or (binary and groups is None):
        # Resamples of nothing but zeros say nothing; the score interval knows how much can hide behind n of them.
        bounded = min(*tested, *baseline) >= 0 and max(*tested, *baseline) <= 1
        low, high = score_interval(more, fewer, change.n) if bounded else (None, None)
        smallest = smallest_difference(more + fewer, change.n) if binary else None
        return Paired(dataclasses.replace(change, low=low, high=high), mcnemar(more, fewer), more, fewer, smallest)
    if change.standard_error is None:
        return Paired(change, 1.0, more, fewer, None)
    units = np.arange(len(differences)) if groups is None else groups
    sums, sizes = np.bincount(units, differences), np.bincount(units)
    means = bootstrap.drawn(change.n, lambda counts: (counts @ sums) / (counts @ sizes))
    found, p = bootstrap.around(change.value, change.n, means)
    change = dataclasses.replace(change, low=found.low, high=found.high)
    return Paired(change, p, more, fewer, bootstrap.smallest_mean(change))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for how many there are (Holm 1979): below 0.05 is significant in the whole table."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(list(p_values), method="holm")[1]] if len(p_values) else []


def non_inferior(change: Estimate, margin: float, better: str) -> str:
    """Return whether a change is at worst a loss that does not matter, by its 95% interval.

    Args:
        change: tested less baseline.
        margin: the largest loss that does not matter, above 0, in the change's unit; state it beside the verdict.
        better: ``more`` or ``less``, what of the score is better.

    Returns:
        ``non-inferior`` if the whole interval loses less than the margin, which tests at one-sided 2.5% (Piaggio et al.
        2012, CONSORT); ``inferior`` if all of it loses more; else, or without an interval, ``undecided``.

    Raises:
        ValueError: the margin is not above 0, or ``better`` is neither.

    """
    if not margin > 0 or better not in ("more", "less"):
        raise ValueError(f"margin {margin} is to be above 0, and better {better!r} more or less")
    if change.low is None or change.high is None:
        return "undecided"
    worst, best = (change.low, change.high) if better == "more" else (-change.high, -change.low)
    if worst > -margin:
        return "non-inferior"
    return "inferior" if best < -margin else "undecided"
