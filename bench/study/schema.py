"""What ``study.json`` holds: typed results, apart from the code that computes them. ``None`` is never zero.

An interval is of 95% unless a hypothesis says otherwise; p-values are two-sided unless said otherwise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bench.schema import Estimate

SCHEMA = "vllm-pareto/study/1"
HELD, FALSIFIED, UNDECIDED = "held", "falsified", "not decidable"


@dataclass(frozen=True)
class PointResult:
    """A point on a kind of machine.

    Attributes:
        name: unique in the plan.
        model: its name in the plan.
        weights: name of their compression; None for the model's own.
        kv: KV-cache dtype, ``bf16`` for one that is not quantized.
        hardware: label of the machine.
        is_baseline: whether the others of its model are compared with it.
        settings: of the compression, as the plan gives them.
        runs: by metric, how many runs there are; one where no seed reaches the metric.
        figures: by metric, its value.

    """

    name: str
    model: str
    weights: str | None
    kv: str
    hardware: str
    is_baseline: bool
    settings: dict[str, Any]
    runs: dict[str, int]
    figures: dict[str, Estimate]


@dataclass(frozen=True)
class Comparison:
    """A point's metric beside its baseline's.

    Attributes:
        point: name.
        hardware: label.
        metric: key.
        better: ``more`` or ``less``.
        measure: ``difference``, or ``ratio`` for what is rather compared so: times, rates, perplexity.
        change: the difference or the ratio.
        p: of no change; None where nothing tells the error.
        p_holm: the same after Holm over all comparisons of the plan.
        verdict: ``better``, ``worse`` (below 0.05 after Holm), or ``not significant``.

    """

    point: str
    hardware: str
    metric: str
    better: str
    measure: str
    change: Estimate
    p: float | None
    p_holm: float | None
    verdict: str


@dataclass(frozen=True)
class Improvement:
    """Whether a point improves on its baseline: in quality not worse by the margin, and better in one cost.

    Attributes:
        point: name.
        hardware: label.
        quality: the metric of quality.
        change: its difference from the baseline.
        p_quality: one-sided, of its being worse by the margin or more.
        costs: metrics that are better, by what factor.
        p_cost: of none of the costs being better (Bonferroni over them); 0 for one that has no error, such as bytes.
        p: of the point: the larger of both, since it must be both.
        p_holm: the same after Holm over the points of the plan.
        improves: below 0.05 after Holm, with enough runs.
        why_not: if it does not.

    """

    point: str
    hardware: str
    quality: str
    change: Estimate | None
    p_quality: float | None
    costs: dict[str, float]
    p_cost: float | None
    p: float | None
    p_holm: float | None
    improves: bool
    why_not: str


@dataclass(frozen=True)
class Decided:
    """A hypothesis at one of its points.

    Attributes:
        point: name.
        hardware: label.
        against: what it was compared with; None for nothing.
        value: of the measure; None if there is none.
        low: lower end of the interval that decides; None if there is none.
        high: upper end.
        runs: that the point has.
        verdict: ``held``, ``falsified`` or ``not decidable``.
        why: if it is not decidable.

    """

    point: str
    hardware: str
    against: str | None
    value: float | None
    low: float | None
    high: float | None
    runs: int
    verdict: str
    why: str = ""


@dataclass(frozen=True)
class HypothesisResult:
    """A hypothesis.

    Attributes:
        name: its name.
        claim: in the plan's words.
        criterion: the same as a formula.
        verdict: ``held``, ``falsified`` or ``not decidable``.
        points: what decided it.

    """

    name: str
    claim: str
    criterion: str
    verdict: str
    points: list[Decided]


@dataclass(frozen=True)
class StepResult:
    """A step: its key, and how it ended (``done``, ``failed`` or ``skipped``, with the reason)."""

    key: str
    kind: str
    name: str
    status: str
    reason: str
    seconds: float


@dataclass(frozen=True)
class Study:
    """A whole study.

    Attributes:
        study: the plan's name.
        title: of the page.
        created_at: when its last step began, ISO 8601, UTC.
        plan_sha256: of the plan's file.
        seeds: of the runs.
        context_tokens: tokens of KV cache that count as memory beside the weights.
        machines: by hardware label, the machines and versions that results were measured with.
        points: what was measured.
        comparisons: beside the baselines.
        improvements: which points improve on them.
        hypotheses: with their verdicts.
        steps: with how they ended.
        notes: what the reader should know.

    """

    study: str
    title: str
    created_at: str
    plan_sha256: str
    seeds: list[int]
    context_tokens: int
    machines: dict[str, list[dict[str, Any]]]
    points: list[PointResult]
    comparisons: list[Comparison]
    improvements: list[Improvement]
    hypotheses: list[HypothesisResult]
    steps: list[StepResult]
    notes: list[str]
    schema: str = field(default=SCHEMA)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document, its ``schema`` first."""
        document = asdict(self)
        return {"schema": document.pop("schema"), **document}
