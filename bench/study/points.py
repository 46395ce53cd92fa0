"""The points of a plan: every model, with every compression of its weights and every KV-cache dtype that is named."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.engine import plain_dtype
from bench.study.plan import Flags, Hypothesis, Plan, Selector
from bench.study.words import words_of
from kv_cache.errors import ParetoError
from quant_methods.overrides import override
from quant_methods.recipe import Recipe
from quant_methods.sweeps.file import POINT_KEYS, point_of

LISTS = ("ignore", "exempt", "widths")
"""Settings whose value is a list; a list of lists gives several points."""
NONE = "none"


@dataclass(frozen=True)
class Student:
    """A model that learns from one of the plan's.

    Attributes:
        group: its name in the plan's ``students``, which several share where a flag lists values.
        chosen: the values that tell it from the others of its group.
        settings: flags of ``pareto distill`` as the plan gives them, with ``_`` in their names.
        flags: the same, and the plan's common ones.

    """

    group: str
    chosen: dict[str, Any]
    settings: dict[str, Any]
    flags: dict[str, Any]

    @property
    def name(self) -> str:
        """What tells it from all others of the plan."""
        return _named(self.group, self.chosen)


@dataclass(frozen=True)
class Variant:
    """A compression of a model's weights, or of a student's in their place.

    Attributes:
        name: unique in the plan.
        group: its name in the plan's ``weights``, which several share where a setting lists values.
        settings: as the plan gives them.
        recipe: with its settings in place; None for a checkpoint that is there already, and for a student as it is.
        checkpoint: folder of such a one.
        flags: further flags of ``pareto compress``, the plan's common ones among them.
        student: whose weights they are; None: the model's own.

    """

    name: str
    group: str
    settings: dict[str, Any]
    recipe: Recipe | None
    checkpoint: str | None
    flags: dict[str, Any]
    student: Student | None = None

    @property
    def all_settings(self) -> dict[str, Any]:
        """The settings, and those of its student."""
        return self.settings if self.student is None else {**self.student.settings, **self.settings}

    def seeded(self, seed: int) -> Recipe:
        """Return the recipe with a calibration seed."""
        assert self.recipe is not None
        return override(self.recipe, {"seed": seed})

    def setting(self, name: str) -> Any:
        """Return a setting's or its student's value, else the recipe's own; None if there is none."""
        if name in self.all_settings or self.recipe is None:
            return self.all_settings.get(name)
        calibration = {"num_calibration_samples": "num_samples", "calibration_length": "length"}
        if name in calibration:
            return getattr(self.recipe.calibration, calibration[name])
        return next((getattr(step, name) for step in self.recipe.steps if hasattr(step, name)), None)


@dataclass(frozen=True)
class Point:
    """One configuration: what is served.

    Attributes:
        name: unique in the plan.
        model: its name in the plan.
        weights: their compression; None for the model's own.
        kv: ``--kv-cache-dtype``.
        hardware: labels of the machines to measure on.
        seeded: whether a step of it that decides its quality has a seed.

    """

    name: str
    model: str
    weights: Variant | None
    kv: str
    hardware: tuple[str, ...]
    seeded: bool = False

    @property
    def is_baseline(self) -> bool:
        """Whether it is what the others of its model are compared with."""
        return self.weights is None and plain_dtype(self.kv) == "bf16"

    @property
    def labels(self) -> tuple[str, ...]:
        """The names by which a plan's selector may call its weights."""
        return (NONE,) if self.weights is None else (self.weights.group, self.weights.name)


def variants(plan: Plan, folder: Path) -> dict[str, list[Variant]]:
    """Return the compressions by their name in the plan.

    Args:
        plan: the plan.
        folder: where it lies; recipes in files are looked for there.

    Raises:
        ParetoError: a recipe that there is not, or a setting that it does not have.

    """
    made: dict[str, list[Variant]] = {}
    known = students(plan)
    for group, settings in plan.weights.items():
        made[group] = []
        for chosen in _combinations(settings):
            own = settings | chosen
            for student in known[own["student"]] if "student" in own else [None]:
                made[group].append(_variant(group, own, chosen, plan.compress, folder, student))
    return made


def students(plan: Plan) -> dict[str, list[Student]]:
    """Return the students by their name in the plan.

    Raises:
        ParetoError: a flag that ``pareto distill`` does not have, or a value that it refuses.

    """
    made: dict[str, list[Student]] = {}
    for group, given in plan.students.items():
        settings, common = _underscored(given), _underscored(plan.distill)
        made[group] = []
        for chosen in _combinations(settings):
            own = settings | chosen
            words_of("distill", common | own, f"students.{group}")
            made[group].append(Student(group, chosen, own, common | own))
    return made


def _underscored(flags: Flags) -> Flags:
    return {str(name).replace("-", "_"): value for name, value in flags.items()}


def _combinations(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one of the values of each setting that lists several, in every combination."""
    axes = {key: value for key, value in settings.items() if _is_axis(key, value)}
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _is_axis(key: str, value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return key not in LISTS or isinstance(value[0], list)


def _variant(
    group: str, settings: dict[str, Any], chosen: dict[str, Any], common: Flags, folder: Path, student: Student | None
) -> Variant:
    where = f"weights.{group}"
    name = _named(group, chosen, student.chosen if student is not None else {})
    if student is not None and len(settings) == 1:
        return Variant(name, group, settings, None, None, {}, student)
    if "checkpoint" in settings:
        if len(settings) > 1:
            raise ParetoError(f"{where}: checkpoint is made already and takes no other keys; leave them out")
        return Variant(name, group, settings, None, str(settings["checkpoint"]), {})
    inner = {key: value for key, value in settings.items() if key in POINT_KEYS}
    flags = {key: value for key, value in settings.items() if key not in (*POINT_KEYS, "student")}
    if "seed" in inner:
        raise ParetoError(f"{where}: 'seed' is set by the study itself (the plan's seed, and runs); leave it out")
    try:
        point = point_of(inner, "gptq-w4", folder, where)
    except ParetoError as error:
        raise ParetoError(str(error).replace(f"{where}: point", where, 1)) from None
    words_of("compress", common | flags, where)
    if point.budget is not None:
        flags["budget"] = point.budget.text
    return Variant(name, group, settings, point.recipe, None, common | flags, student)


def _named(group: str, *chosen: dict[str, Any]) -> str:
    return " ".join([group, *(f"{key}={_short(value)}" for each in chosen for key, value in each.items())])


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value).lower()


def make_points(plan: Plan, folder: Path) -> list[Point]:
    """Return the points, each model's baseline first whether it is named or not.

    Points that are named twice are one, measured on all hardware that either names.

    Raises:
        ParetoError: see :func:`variants`.

    """
    known = variants(plan, folder)
    found: dict[str, Point] = {}
    baselines = Selector(weights=[NONE], kv=["auto"])
    for named in [baselines, *plan.points]:
        weights = [one for group in named.weights or [] for one in (known[group] if group != NONE else [None])]
        for model, variant, kv in itertools.product(named.model or plan.models, weights, named.kv or []):
            words = [model, *([variant.name] if variant else []), f"{plain_dtype(kv)} KV"]
            hardware = tuple(named.hardware or plan.hardware)
            seeded = variant is not None and variant.checkpoint is None
            point = Point(", ".join(words), model, variant, kv, hardware, seeded)
            if point.name in found:
                both = dict.fromkeys((*found[point.name].hardware, *hardware))
                point = replace(found[point.name], hardware=tuple(both))
            found[point.name] = point
    order = list(plan.models)
    return sorted(found.values(), key=lambda point: (order.index(point.model), not point.is_baseline))


def select(points: Sequence[Point], selector: Selector) -> list[Point]:
    """Return the points that a selector matches, on the hardware that it names."""
    chosen = []
    for point in points:
        if selector.model is not None and point.model not in selector.model:
            continue
        if selector.weights is not None and not set(selector.weights) & set(point.labels):
            continue
        if selector.kv is not None and plain_dtype(point.kv) not in map(plain_dtype, selector.kv):
            continue
        hardware = tuple(one for one in point.hardware if selector.hardware is None or one in selector.hardware)
        if hardware:
            chosen.append(replace(point, hardware=hardware))
    return chosen


def partner(point: Point, against: str | dict[Any, str], points: Sequence[Point]) -> Point | None:
    """Return what a point is compared with; None if the plan has no such point, or it is the point itself."""
    change = {"weights": NONE, "kv": "auto"} if isinstance(against, str) else dict(against)
    model = change.get("model", point.model)
    kv = plain_dtype(change.get("kv", point.kv))
    labels = {change["weights"]} if "weights" in change else {point.labels[-1]}
    for other in points:
        if other.model == model and plain_dtype(other.kv) == kv and labels & set(other.labels):
            return None if other.name == point.name else other
    return None


def check_hypotheses(plan: Plan, points: Sequence[Point]) -> None:
    """Refuse a hypothesis that no point of the plan can decide.

    Raises:
        ParetoError: it selects no point, or no point that has a partner.

    """
    labels = {label for point in points for label in point.labels}
    named = [(f"hypotheses.{one.name}.points", one.points.weights or []) for one in plan.hypotheses]
    named += [
        (f"hypotheses.{one.name}.against", [one.against["weights"]])
        for one in plan.hypotheses
        if isinstance(one.against, dict) and "weights" in one.against
    ]
    for where, names in named:
        for name in names:
            if name not in labels:
                raise ParetoError(f"{where}: {name!r} are no weights of the plan's points: {', '.join(sorted(labels))}")
    for hypothesis in plan.hypotheses:
        where = f"hypotheses.{hypothesis.name}"
        if not of(hypothesis, points):
            raise ParetoError(f"{where}: its points are none of the plan's (or all are what they are compared with)")
    for chart in plan.charts:
        if not select(points, chart.points):
            raise ParetoError(f"charts[{chart.title}]: its points are none of the plan's")


def of(hypothesis: Hypothesis, points: Sequence[Point]) -> list[tuple[Point, Point | None]]:
    """Return the points of a hypothesis, each with what it is compared with (None for its own value)."""
    chosen = select(points, hypothesis.points)
    if hypothesis.measure == "value":
        return [(point, None) for point in chosen]
    pairs = [(point, partner(point, hypothesis.against, points)) for point in chosen]
    return [(point, other) for point, other in pairs if other is not None]
