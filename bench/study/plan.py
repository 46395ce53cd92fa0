"""What a plan's YAML says, checked key by key before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kv_cache.errors import ParetoError

PLANS = Path(__file__).parents[1] / "studies"
Flags = dict[str, Any]
"""Flags of a ``pareto`` command by name; bench/study/words.py checks them with the command's own parser."""
Name = Annotated[str, Field(pattern=r"^[\w.+-]+$")]


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) or value is None else [value]


Names = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]


class Part(BaseModel):
    """A part of a plan: keys that are not known are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Hardware(Part):
    """A kind of machine.

    Attributes:
        gpu: part of its GPU's name, by which a machine is refused that is another; None for a CPU.
        gpus: GPUs that a step takes.
        cpus: cores that a step takes; Ray counts them.
        resources: further resources of Ray's that a step asks for, by which it finds a machine of this kind.

    """

    gpu: str | None = None
    gpus: int = Field(0, ge=0)
    cpus: float = Field(1, gt=0)
    resources: dict[str, float] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Hardware:
        if self.gpu is not None and not self.gpus:
            raise ValueError("gpu names a GPU, and gpus says that a step takes none; gpus: 1 would be")
        return self


class Model(Part):
    """What is compressed and served.

    Attributes:
        path: embedded name, folder (of --models, or beside the plan) or hub name.
        shape: a folder with a config.json alone, measured with random weights, for speed only.

    """

    path: str
    shape: bool = False


class Selector(Part):
    """Points of the plan; what it leaves out matches everything."""

    model: Names | None = None
    weights: Names | None = None
    kv: Names | None = None
    hardware: Names | None = None


class Points(Selector):
    """Points to measure: every combination of what is listed.

    Attributes:
        model: models; all of the plan.
        weights: names of ``weights``, or ``none`` for the model's own.
        kv: KV-cache dtypes.
        hardware: labels; all of the plan.

    """

    weights: Names = ["none"]
    kv: Names = ["auto"]


class Hypothesis(Part):
    """A claim with a criterion that decides it.

    Attributes:
        claim: in words.
        metric: what is compared, see docs/study.md.
        points: of which points.
        against: compared with which: ``baseline``, or what to change in each point to have its partner; ``value``
            compares with nothing, and the bound is of the metric itself.
        measure: what is bounded: the point's difference from its partner, its ratio to it, or its own value.
        relation: how the measure stands to the bound.
        bound: in the metric's unit; of a ratio a number.
        needed: of how many of the points it must hold: ``all``, ``any``, or a number.
        confidence: of the interval that has to lie on one side of the bound.

    """

    name: Name
    claim: str
    metric: str
    points: Selector = Selector()
    against: Literal["baseline"] | dict[Literal["model", "weights", "kv"], str] = "baseline"
    measure: Literal["difference", "ratio", "value"] = "difference"
    relation: Literal["at_least", "at_most"]
    bound: float
    needed: Literal["all", "any"] | Annotated[int, Field(ge=1)] = "all"
    confidence: float = Field(0.95, gt=0.5, lt=1)


class Chart(Part):
    """A sensitivity chart: a metric over an axis, a line for each of the points that differ in nothing else.

    Attributes:
        title: of the picture.
        axis: any setting of a recipe or its calibration (``group_size``, ``num_calibration_samples``, ``alpha``),
            ``kv_bits``, ``weight_bits``, or ``under`` for every load or shape that the metric was measured under.
        metric: the other axis.
        points: which points.

    """

    title: str
    axis: str
    metric: str
    points: Selector = Selector()


class Improvement(Part):
    """What counts as an improvement on the baseline.

    Attributes:
        quality: the metric that must not be worse by more than ``margin``; None: ``accuracy`` where tasks are asked,
            else ``kl``.
        margin: in that metric's unit.
        costs: metrics of which at least one must be better; None: memory, throughput and energy, as measured.

    """

    quality: str | None = None
    margin: float = Field(default=0.01, ge=0)
    costs: Names | None = None


class Plan(Part):
    """A whole plan; docs/study.md explains each key."""

    study: Name
    title: str = ""
    description: str = ""
    hardware: dict[Name, Hardware] = Field(min_length=1)
    quality_on: str | None = None
    models: dict[Name, Model] = Field(min_length=1)
    runs: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)
    vary: list[Literal["calibration", "training", "load", "speed", "text"]] = [
        "calibration", "training", "load", "speed",
    ]  # fmt: skip
    students: dict[Name, Flags] = {}
    distill: Flags = {}
    weights: dict[Name, Flags] = {}
    compress: Flags = {}
    points: list[Points] = Field(min_length=1)
    quality: Flags | None = None
    tasks: list[Flags] = []
    serve: Flags = {}
    loads: dict[Name, Flags] = {}
    served: Flags | None = None
    speed: Flags | None = None
    context_tokens: int = Field(32_768, ge=0)
    improvement: Improvement = Improvement()
    hypotheses: list[Hypothesis] = []
    charts: list[Chart] = []

    @model_validator(mode="before")
    @classmethod
    def _short_models(cls, data: Any) -> Any:
        """Let ``ref-7m: ref-7m`` stand for a model without further keys."""
        if isinstance(data, dict) and isinstance(data.get("models"), dict):
            short = {name: {"path": one} if isinstance(one, str) else one for name, one in data["models"].items()}
            data = {**data, "models": short}
        return data

    @model_validator(mode="after")
    def _names_exist(self) -> Plan:
        known = {
            "model": set(self.models), "weights": {"none", *self.weights}, "hardware": set(self.hardware), "kv": None,
        }  # fmt: skip
        selectors: list[tuple[str, Selector]] = [(f"points[{i}]", one) for i, one in enumerate(self.points)]
        selectors += [(f"hypotheses[{h.name}].points", h.points) for h in self.hypotheses]
        selectors += [(f"charts[{chart.title}].points", chart.points) for chart in self.charts]
        for where, selector in selectors:
            for key, names in known.items():
                for name in getattr(selector, key) or []:
                    # A hypothesis may name one of several that a group stands for; bench/study/points.py knows them.
                    group = name.partition(" ")[0] if key == "weights" and not isinstance(selector, Points) else name
                    if names is not None and group not in names:
                        raise ValueError(
                            f"{where}.{key}: {name!r} is not in the plan; it has {', '.join(sorted(names))}"
                        )
        if self.quality_on is not None and self.quality_on not in self.hardware:
            raise ValueError(f"quality_on: {self.quality_on!r} is none of hardware: {', '.join(self.hardware)}")
        if "none" in self.weights:
            raise ValueError("weights: 'none' stands for the model's own weights; give it another name")
        for name, settings in self.weights.items():
            for student in _listed(settings.get("student")) or []:
                if not isinstance(student, str) or student not in self.students:
                    there = f"the plan has {', '.join(sorted(self.students))}" if self.students else "the plan has none"
                    raise ValueError(f"weights.{name}.student: {student!r} is none of students; {there}")
        if not (self.quality or self.tasks or self.loads or self.served or self.speed):
            raise ValueError("nothing to measure: give quality, tasks, loads, served or speed")
        called = [h.name for h in self.hypotheses]
        if len(set(called)) < len(called):
            raise ValueError(f"hypotheses: two are called {next(n for n in called if called.count(n) > 1)!r}")
        return self

    @property
    def quality_hardware(self) -> str:
        """The label of the machines that quality is measured on."""
        return self.quality_on or next(iter(self.hardware))


def find_plan(name: str) -> Path:
    """Return the file of a plan: a path, or the name of one that ships.

    Raises:
        ParetoError: there is none.

    """
    path, shipped = Path(name), PLANS / f"{name}.yaml"
    if path.is_file():
        return path
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in PLANS.glob("*.yaml")))
    raise ParetoError(f"plan {name}: no such file; plans that ship: {names}")


def load_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        ParetoError: it cannot be read, or a key of it is wrong; the line names the key.

    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ParetoError(f"plan {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ParetoError(f"plan {path} is not valid YAML: {' '.join(str(error).split())}") from error
    return parse_plan(data, f"plan {path}")


def parse_plan(data: Any, where: str) -> Plan:
    """Check a plan.

    Raises:
        ParetoError: a key is unknown, missing or has a value that makes no sense; ``where`` starts the line.

    """
    if not isinstance(data, dict):
        raise ParetoError(f"{where}: expected a mapping with the keys study, hardware, models and points")
    try:
        return Plan.model_validate(data)
    except ValidationError as error:
        raise ParetoError(f"{where}: {_line(error)}") from None


def _line(error: ValidationError) -> str:
    """Return what is wrong, in one line that names the key and what would be right."""
    first = error.errors()[0]
    # Of a union pydantic lists every branch; its names in the path are of no use to the reader.
    keys = [
        part for part in first["loc"] if not (isinstance(part, str) and ("[" in part or part.startswith("function")))
    ]
    path = ".".join(str(part) for part in keys) or "the plan"
    if first["type"] == "extra_forbidden":
        part = _part_at(keys[:-1])
        valid = f"; valid keys: {', '.join(part.model_fields)}" if part is not None else ""
        return f"{path}: unknown key {keys[-1]!r}{valid}"
    if first["type"] == "missing":
        return f"{path}: is missing"
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return text if path == "the plan" else f"{path}: {text}"
    return f"{path}: {text[0].lower()}{text[1:]}, got {first['input']!r}"


_PARTS: dict[str, type[Part]] = {
    "hardware": Hardware, "models": Model, "points": Points, "improvement": Improvement, "hypotheses": Hypothesis,
    "charts": Chart,
}  # fmt: skip


def _part_at(keys: list[Any]) -> type[Part] | None:
    """Return the class that stands at a place of a plan, as far as it is one of a part's."""
    if not keys:
        return Plan
    if len(keys) > 2 and keys[-1] == "points":
        return Selector
    return _PARTS.get(keys[0])
