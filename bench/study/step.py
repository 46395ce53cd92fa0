"""A step of a study, as data: what its process is told, and what its folder keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["distill", "compress", "quality", "tasks", "load", "served", "speed"]
ORDER: tuple[Kind, ...] = ("distill", "compress", "quality", "tasks", "load", "served", "speed")
"""Each kind for every point before the next: a study that is stopped early has the same of all its points."""
OUT = "{out}"
"""Stands in a step's words for the folder of its result."""
RESULTS = {
    "distill": "config.json", "compress": "config.json", "quality": "eval.json", "tasks": "eval.json",
    "load": "summary.json", "served": "serve-bench.json", "speed": "kv-bench.json",
}  # fmt: skip
"""The file with which each kind of step is done."""
CHECKPOINTS: tuple[Kind, ...] = ("distill", "compress")
"""Kinds whose result is a checkpoint, which appears in one piece when it is whole."""
SCHEMA = "vllm-pareto/step/1"


def checkpoint(key: str) -> str:
    """Return what stands in a step's words for the checkpoint that another step makes."""
    return f"{{checkpoint:{key}}}"


@dataclass(frozen=True)
class Step:
    """A piece of work that is done as a whole.

    Attributes:
        key: names its folder.
        kind: what it does.
        name: for people.
        words: of the ``pareto`` command that makes the result.
        serve: of ``pareto serve``, which runs meanwhile; none if nothing is served.
        after: keys of the steps whose results it needs.
        determines: what the key is a hash of.
        hardware: label of the machine.
        gpu: part of the GPU's name that the machine must have; None for any.
        gpus: that it takes.
        cpus: cores that it takes.
        resources: further ones of Ray's.
        parameters: of the model, roughly.
        tokens: that it trains on; 0 for one that trains nothing.
        disk_bytes: what its result takes, roughly.

    """

    key: str
    kind: Kind
    name: str
    words: tuple[str, ...]
    serve: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    determines: dict[str, Any] = field(default_factory=dict)
    hardware: str = ""
    gpu: str | None = None
    gpus: int = 0
    cpus: float = 1
    resources: dict[str, float] = field(default_factory=dict)
    parameters: float = 0
    tokens: float = 0
    disk_bytes: float = 0

    @property
    def result(self) -> str:
        """The file with which it is done."""
        return RESULTS[self.kind]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return {"schema": SCHEMA, **asdict(self)}


@dataclass(frozen=True)
class Cell:
    """One run of a point on a kind of machine: the keys of its steps.

    Attributes:
        point: its name.
        hardware: label.
        run: 0 to the plan's runs less 1.
        distill: of the student that its weights are; None where they are the model's own.
        compress: of its checkpoint; None where it needs none, or has one.
        quality: of ``pareto eval`` on texts and needles.
        tasks: of ``pareto eval`` on tasks, one for each group of the plan.
        loads: of load tests, by the load's name.
        served: of ``pareto serve-bench``.
        speed: of ``pareto kv-bench``.

    """

    point: str
    hardware: str
    run: int
    distill: str | None = None
    compress: str | None = None
    quality: str | None = None
    tasks: tuple[str, ...] = ()
    loads: dict[str, str] = field(default_factory=dict)
    served: str | None = None
    speed: str | None = None

    def keys(self) -> list[str]:
        """Return all of them."""
        made = [self.distill, self.compress]
        found = [*made, self.quality, *self.tasks, *self.loads.values(), self.served, self.speed]
        return [key for key in found if key is not None]
