"""One compression, from its state directory to the finished checkpoint.

A run works in ``OUT.partial/``: ``state.json`` says what is being made, ``block-*.safetensors`` hold finished blocks,
``checkpoint/`` is filled at the end and renamed to OUT. A run that was interrupted goes on from its first unfinished
block. It replays the calibration set through the finished blocks instead of storing hidden states, with the same
arithmetic as the first time, so the checkpoint's bytes do not depend on where it was interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from kv_cache.calibration import KVCalibrator
from kv_cache.errors import ParetoError
from quant_methods import checkpoint
from quant_methods.block_solver import BlockSolver
from quant_methods.calibrator import Decoder, clone
from quant_methods.checkpoint import read_tensors, write_json, write_tensors
from quant_methods.kv_observer import kv_geometry, kv_rotary, value_metric
from quant_methods.model_source import fingerprint, read_config, read_header, weight_files
from quant_methods.plan import Plan
from quant_methods.recipe import Recipe, Serving
from quant_methods.text_source import load_sequences

RECIPE_FILE = "pareto_recipe.json"

Progress = Callable[[int, int, str], None]
"""Called with (blocks finished, blocks in all, what happens now)."""


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer.

    Attributes:
        name: the module's name.
        shape: [out, in].
        bits_per_weight: storage, scales and zero-points included.
        relative_error: ``||W X - Q X|| / ||W X||`` over the calibration set; ``||W - Q|| / ||W||`` without data. A step
            that makes up for earlier layers' errors moves Q away from W on purpose, and that counts here too.

    """

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    relative_error: float


@dataclass
class Report:
    """What a compression did.

    Attributes:
        out: the checkpoint.
        layers: the quantized layers, in model order.
        bits_per_weight: mean over the quantized layers' weights.
        bytes_before: bytes of the original's tensors.
        bytes_after: bytes of the checkpoint's tensors.
        seconds: wall time of this run (not of runs that it resumed).
        peak_memory: the process's peak resident memory in bytes.
        resumed_blocks: blocks that an earlier run had finished.
        serving: what serves it.

    """

    out: Path
    layers: list[LayerReport] = field(default_factory=list)
    bits_per_weight: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    resumed_blocks: int = 0
    serving: Serving = field(default_factory=lambda: Serving.of(()))


class Run:
    """One compression, from its state directory to the finished checkpoint."""

    def __init__(
        self,
        *,
        model: str | os.PathLike[str],
        model_dir: Path,
        recipe: Recipe,
        out: Path,
        work: Path,
        text: str | os.PathLike[str] | None,
        decoder: Decoder,
        plan: Plan,
        overwrite: bool,
        progress: Progress,
    ) -> None:
        self.model_dir, self.recipe, self.out, self.work = model_dir, recipe, out, work
        self.decoder, self.plan, self.overwrite, self.progress = decoder, plan, overwrite, progress
        self.total = len(decoder.blocks)
        self.now = 0
        self.solver = BlockSolver(
            decoder, plan, lambda what: progress(self.now, self.total, f"block {self.now + 1}/{self.total}: {what}")
        )
        self.text = None if text is None else Path(text)
        self.tokens: Tensor | None = None
        if plan.needs_data or recipe.kv_scales:
            progress(0, self.total, "calibration data")
            settings = recipe.calibration
            self.tokens = load_sequences(
                model_dir,
                self.text,
                settings.num_samples,
                settings.length,
                settings.seed,
                device=str(decoder.device),
                progress=lambda done, steps: progress(0, self.total, f"sampling text, {100 * done // steps}%"),
            )
        self.calibrator = None
        if recipe.kv_scales:
            self.calibrator = KVCalibrator(
                *kv_geometry(decoder.config),
                seed=recipe.calibration.seed,
                rotary=kv_rotary(decoder.base, decoder.config),
            )
        self.provenance = self._provenance(os.fspath(model))

    def _provenance(self, model: str) -> dict[str, Any]:
        """Return what determines the checkpoint's bytes; it travels with the checkpoint and names an unfinished run."""
        data: dict[str, Any] | None = None
        if self.tokens is not None:
            data = {
                "source": self.text.name if self.text else "sampled from the model",
                "tokens_sha256": hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest(),
                "num_samples": self.tokens.shape[0],
                "length": self.tokens.shape[1],
                "seed": self.recipe.calibration.seed,
            }
        packages = ("vllm-pareto", "torch", "transformers", "compressed-tensors", "safetensors")
        return {
            "model": Path(model).name if Path(model).is_dir() else model,
            "model_sha256": fingerprint(self.model_dir),
            "recipe": self.recipe.to_dict(),
            "calibration": data,
            "device": self.decoder.device.type,
            "versions": {
                "python": platform.python_version(),
                **{package: importlib.metadata.version(package) for package in packages},
            },
            "served_by": str(self.plan.serving),
        }

    def _key(self) -> str:
        determining = {k: v for k, v in self.provenance.items() if k not in ("model", "recipe")}
        determining["recipe"] = self.recipe.fingerprint()
        return hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()

    def finish(self, started: float) -> Report:
        """Run to the end and return the report."""
        with self._state_directory():
            report = Report(self.out, bytes_before=self.decoder.source.size(), serving=self.plan.serving)
            report.resumed_blocks = sum(self._block_file(index).is_file() for index in range(self.total))
            self._blocks(report)
            if report.layers and not any(layer.relative_error for layer in report.layers):
                raise ParetoError(
                    f"no-op: every weight of {self.model_dir.name} reads back exactly as it was; the model has been "
                    "rounded like this before: compress the original, or to fewer bits"
                )
            self.progress(self.total, self.total, "writing the checkpoint")
            report.bytes_after = self._write()
            weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
            bits = sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in report.layers)
            report.bits_per_weight = bits / weights if weights else 16.0
        shutil.rmtree(self.work)
        report.seconds = time.monotonic() - started
        report.peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return report

    @contextlib.contextmanager
    def _state_directory(self) -> Iterator[None]:
        """Create the state directory or take up an unfinished run's, and keep other runs out of it."""
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ParetoError(f"{self.work} is in use by another run; wait for it or give another --out") from None
            state = self.work / "state.json"
            if state.is_file():
                found = json.loads(state.read_text())
                if found["key"] != self._key():
                    if not self.overwrite:
                        raise ParetoError(_mismatch(self.work, found, self.provenance))
                    for path in self.work.iterdir():
                        if path.name != "lock":
                            shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_json(state, {"key": self._key(), **self.provenance})
            yield

    def _block_file(self, index: int) -> Path:
        return self.work / f"block-{index:05d}.safetensors"

    def _blocks(self, report: Report) -> None:
        hidden = self.decoder.embed(self.tokens) if self.tokens is not None else None
        original = hidden.clone() if hidden is not None and self.plan.needs_original else None
        for index in range(self.total):
            self.progress(index, self.total, f"block {index + 1}/{self.total}")
            linears = self.decoder.linears(index)
            local = [name for name in linears if self.decoder.name(index, name) in self.plan.steps]
            if not local and hidden is None:
                continue
            with self.decoder.loaded(index) as block:
                pristine = clone(block) if original is not None else None
                path = self._block_file(index)
                if local and path.is_file():
                    tensors, metadata = read_tensors(path)
                    errors = json.loads(metadata["relative_error"])
                    self.solver.install(index, block, tensors)
                else:
                    self.now = index
                    comparison = (pristine, original) if pristine is not None and original is not None else None
                    scaled = self.solver.transform(index, block, hidden, original=comparison) if local else {}
                    if pristine is not None and original is not None:
                        # Inputs are compared as they are after the scaling, which `original` is none the wiser of.
                        comparison = (clone(block) if self.plan.transforms else pristine), original
                    tensors, errors = self.solver.quantize(index, block, local, hidden, original=comparison)
                    if tensors:
                        write_tensors(path, scaled | tensors, {"relative_error": json.dumps(errors)})
                report.layers += [self._layer_report(index, name, tensors, errors) for name in local]
                last = index == self.total - 1
                if hidden is not None and not (last and self.calibrator is None):
                    self.progress(index, self.total, f"block {index + 1}/{self.total}: running")
                    if self.calibrator is not None and (metric := value_metric(block, self.decoder.config)) is not None:
                        self.calibrator.weigh_values(index, metric)
                    self.decoder.advance(index, block, hidden, self.calibrator)
                    if pristine is not None and original is not None and not last:
                        self.decoder.advance(index, pristine, original)

    def _layer_report(
        self, index: int, local: str, tensors: dict[str, Tensor], errors: dict[str, float]
    ) -> LayerReport:
        name = self.decoder.name(index, local)
        linear = self.decoder.linears(index)[local]
        rows, columns = linear.out_features, linear.in_features
        bits = self.solver.storage.bits_per_weight(name, tensors, self.plan.steps[name], (rows, columns))
        return LayerReport(name, (rows, columns), bits, errors[name])

    def _changed(self, names: set[str]) -> Path:
        """Write tensors as the source gives them, in the dtype that they are stored in, and return the file."""
        source, path = self.decoder.source, self.work / "changed.safetensors"
        write_tensors(path, {name: source.read(name).to(source.dtype(name)) for name in sorted(names)}, {})
        return path

    def _write(self) -> int:
        """Fill ``checkpoint/``, rename it to the output, and return the bytes of its tensors."""
        target = self.work / "checkpoint"
        if target.exists():
            shutil.rmtree(target)
        target.mkdir()
        checkpoint.copy_companions(self.model_dir, target)
        config = read_config(self.model_dir)
        if self.plan.steps:
            replaced = {f"{name}.weight" for name in self.plan.steps}
            parts = [p for p in map(self._block_file, range(self.total)) if p.is_file()]
            replaced |= {name for part in parts for name in read_header(part)}
            if changed := self.decoder.source.changed():
                parts.append(self._changed(set(changed) - replaced))
                replaced |= set(changed)
                config["tie_word_embeddings"] = False  # Head and embedding changed in different ways.
            size = checkpoint.assemble(self.decoder.source, replaced, parts, target)
            config["quantization_config"] = self.solver.storage.config(self.plan, parts)
        else:
            for path in weight_files(self.model_dir):
                checkpoint.link_or_copy(path, target / path.name)
            index = self.model_dir / checkpoint.INDEX
            if index.is_file():
                shutil.copyfile(index, target / index.name)
            size = self.decoder.source.size()
        write_json(target / "config.json", config)
        write_json(target / RECIPE_FILE, self.provenance)
        if self.calibrator is not None:
            self.calibrator.finish({"recipe": self.recipe.name}).save(target)
        if self.out.exists():
            old = self.work / "replaced"
            if old.exists():
                shutil.rmtree(old)
            self.out.rename(old)
        target.rename(self.out)
        return size


def _mismatch(work: Path, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Say in one line what differs between an unfinished run and the one asked for."""
    fields = ("model", "model_sha256", "recipe", "calibration", "device", "versions")
    differs = [name for name in fields if found.get(name) != wanted[name]]
    what = ", ".join("model" if name == "model_sha256" else name for name in differs) or "settings"
    return (
        f"{work} holds an unfinished run of recipe {found['recipe']['name']} on {found['model']} with a different "
        f"{what}; repeat that command to finish it, or give --overwrite to start anew"
    )
