"""One compression, from its state directory to the finished checkpoint.

A run works in ``OUT.partial/``: ``state.json`` says what is being made, ``block-*.safetensors`` hold finished blocks,
``tuned-*.safetensors`` the same blocks after tuning, ``checkpoint/`` is filled at the end and renamed to OUT. A run
that was interrupted goes on from its first unfinished block. It replays the calibration set through the finished blocks
instead of storing hidden states, with the same arithmetic as the first time, so the checkpoint's bytes do not depend on
where it was interrupted.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from kv_cache.atomic import write_bytes
from kv_cache.calibration import KVCalibrator
from kv_cache.errors import ParetoError
from kv_cache.scales import KVScales
from kv_cache.tf32 import tf32
from quant_methods.block_solver import BlockSolver
from quant_methods.calibration.calibrator import Decoder, clone
from quant_methods.calibration.kv_pass import KVPass, calibrate, kv_sequences
from quant_methods.calibration.served import Served
from quant_methods.calibration.text_source import SAMPLED, describe, load_sequences
from quant_methods.checkpoints import checkpoint
from quant_methods.checkpoints.checkpoint import read_tensors, write_json, write_tensors
from quant_methods.checkpoints.replaceable import RECIPE_FILE, TRAINED
from quant_methods.handlers import MODEL_STEPS, ModelRun
from quant_methods.model_source import digest, fingerprint, name_of, read_config, read_header, weight_files
from quant_methods.plan import Plan
from quant_methods.recipe import Recipe
from quant_methods.report import LayerReport, Report
from quant_methods.trained_first import Origin
from quant_methods.work_folder import empty, locked, put_in_place
from quant_methods.zeros import recounted, zeros

# Measures of sensitivity in the state directory; they have keys of their own.
MEASURES = "sensitivity"

# Of the weights, up to which blocks may be calibrated with products of bfloat16.
MOST_BITS = 6

Progress = Callable[[int, int, str], None]
"""Called with (blocks finished, blocks in all, what happens now); while tuning, with steps in the place of blocks."""


class KVBits(Protocol):
    """What gives each layer's KV cache bits of its own; ``mixed_precision.kv_choice.KVChoice`` does."""

    def check(self, decoder: Decoder, recipe: Recipe) -> None:
        """Refuse, before any work, what cannot be for a model."""

    def __call__(self, model: Served, scales: KVScales, name: str, folder: Path, key: str) -> dict[str, bytes]:
        """Enter the bits into the scales; return files to put beside the weights."""


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
        attachments: Mapping[str, bytes],
        kv_bits: KVBits | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.origin = origin
        self.attachments, self.kv_bits = dict(attachments), kv_bits
        self.model_dir, self.recipe, self.out, self.work = model_dir, recipe, out, work
        self.decoder, self.plan, self.overwrite, self.progress = decoder, plan, overwrite, progress
        # Where weights keep 8 bits, what rounding them costs is no more than what bfloat16 does.
        decoder.rounds = all(step.bits <= MOST_BITS for step in plan.steps.values())
        self.total = len(decoder.blocks)
        self.now = 0
        self.solver = BlockSolver(
            decoder, plan, lambda what: progress(self.now, self.total, f"block {self.now + 1}/{self.total}: {what}")
        )
        self.text = None if text is None else Path(text)
        self.tokens: Tensor | None = None
        self.kv_scales: KVCalibrator | None = None
        # Text that a model writes is the original's, whatever was made of it since.
        self.writer = model_dir if origin is None else origin.original
        settings, own = recipe.calibration, SAMPLED
        if not plan.changed:
            own = "the text that ships with vllm-pareto"
            self.tokens = kv_sequences(self.writer, self.text, settings.num_samples, settings.length, settings.seed)
        elif plan.needs_data or plan.kv_scales:
            self.tokens = self._sequences("calibration data", settings.num_samples, settings.length)
        self.text_source = own if self.text is None else self.text.name
        self.final: ModelRun | None = None
        if (last := plan.final or plan.training) is not None:
            self.final = MODEL_STEPS[type(last)](
                last,
                model_dir=model_dir,
                source=decoder.source,
                device=decoder.device,
                steps=plan.steps,
                prunes=plan.prunes,
                storage=self.solver.storage,
                block_file=self._block_file,
                tokens=self._sequences("text to tune on", *last.text),
                work=work,
                original=None if origin is None else origin.original,
                say=progress,
            )
        self.provenance = self._provenance(os.fspath(model))

    def _sequences(self, what: str, num: int, length: int) -> Tensor:
        self.progress(0, self.total, what)
        return load_sequences(
            self.writer,
            self.text,
            num,
            length,
            self.recipe.calibration.seed,
            device=str(self.decoder.device),
            progress=lambda done, steps: self.progress(0, self.total, f"sampling text, {100 * done // steps}%"),
        )

    def _provenance(self, model: str) -> dict[str, Any]:
        """Return what determines the checkpoint's bytes; it travels with the checkpoint and names an unfinished run."""
        seed = self.recipe.calibration.seed
        packages = ("vllm-pareto", "torch", "transformers", "compressed-tensors", "safetensors")
        return {
            "model": name_of(model),
            "model_sha256": fingerprint(self.model_dir),
            "recipe": self.recipe.to_dict(),
            "calibration": None if self.tokens is None else describe(self.tokens, self.text_source, seed),
            **({self._learning: describe(self.final.tokens, self.text_source, seed)} if self.final else {}),
            "device": self.decoder.device.type,
            "versions": {
                "python": platform.python_version(),
                **{package: importlib.metadata.version(package) for package in packages},
            },
            "served_by": str(self.plan.serving),
            **({} if self.origin is None else self.origin.provenance()),
        }

    @property
    def _learning(self) -> str:
        """What the checkpoint calls the text that the whole model learned on."""
        return "tuning" if self.plan.training is None else "training"

    def _key(self) -> str:
        determining = {k: v for k, v in self.provenance.items() if k not in ("model", "recipe")}
        determining["recipe"] = (self.recipe if self.origin is None else self.origin.recipe).fingerprint()
        return digest(determining)

    def finish(self, started: float) -> Report:
        """Run to the end and return the report."""
        with self._state_directory(), tf32(True):
            report = Report(self.out, bytes_before=self.decoder.source.size(), serving=self.plan.serving)
            report.resumed_blocks = sum(self._block_file(index).is_file() for index in range(self.total))
            if self.plan.changed:
                self._blocks(report, self._block_file, kv_scales=self.plan.kv_scales and self.final is None)
            else:
                self._calibrate()
            changed = self.plan.training is not None or any(layer.relative_error for layer in report.layers)
            if report.layers and not changed:
                raise ParetoError(
                    f"no-op: every weight of {self.model_dir.name} reads back exactly as it was; the model has been "
                    "rounded or pruned like this before: compress the original, or to fewer bits"
                )
            if self.final is not None:
                found = self.final.run()
                report.tuned, report.trained = (found, None) if self.plan.training is None else (None, found)
                self._recount(report)
                # KV scales are those of the model that is served, which the blocks are only now.
                if self.plan.kv_scales:
                    self._blocks(Report(self.out), self.final.block_result, kv_scales=True)
            if self.origin is not None:
                report.trained = self.origin.found()
            scales = self._scales()
            report.kv_scales = scales is not None
            self.progress(self.total, self.total, "writing the checkpoint")
            report.bytes_after = self._write(report, scales)
            weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
            bits = sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in report.layers)
            report.bits_per_weight = bits / weights if weights else 16.0
        shutil.rmtree(self.work)
        report.seconds = time.monotonic() - started
        report.peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return report

    def _calibrate(self) -> None:
        """Calibrate the KV scales of weights as they are."""
        assert self.tokens is not None
        self.kv_scales = calibrate(
            self.decoder,
            self.model_dir,
            self.tokens,
            self.recipe.calibration.seed,
            lambda done, what: self.progress(done, self.total, what),
        )

    def _scales(self) -> KVScales | None:
        """Return the calibrated scales, with bits for each layer if there is a budget."""
        if self.kv_scales is None:
            return None
        scales = self.kv_scales.finish({"recipe": self.recipe.name})
        if self.kv_bits is not None:
            assert self.tokens is not None
            model = Served(self.decoder, self.tokens, self._install, self._changed_outside, self.progress)
            name = f"{self.model_dir.name}, {self.recipe.name}"
            self.attachments |= self.kv_bits(model, scales, name, self.work / MEASURES, self._key())
        return scales

    def _finished_block(self, index: int) -> Path:
        """Return the file of a block as it will be served; there is none for one that stays as it was."""
        return self._block_file(index) if self.final is None else self.final.block_result(index)

    def _install(self, index: int, block: nn.Module) -> None:
        if (path := self._finished_block(index)).is_file():
            self.solver.install(index, block, read_tensors(path)[0])

    def _changed_outside(self) -> dict[str, Tensor]:
        """Return the tensors outside of the blocks that tuning changed."""
        if self.final is None or not self.final.outside_result.is_file():
            return {}
        return read_tensors(self.final.outside_result)[0]

    @contextlib.contextmanager
    def _state_directory(self) -> Iterator[None]:
        """Create the state directory or take up an unfinished run's, and keep other runs out of it."""
        with locked(self.work):
            state = self.work / "state.json"
            if state.is_file():
                found = json.loads(state.read_text())
                if found["key"] != self._key():
                    if not self.overwrite:
                        raise ParetoError(_mismatch(self.work, found, self.provenance))
                    empty(self.work, keep=(MEASURES, TRAINED))
            write_json(state, {"key": self._key(), **self.provenance})
            yield

    def _block_file(self, index: int) -> Path:
        return self.work / f"block-{index:05d}.safetensors"

    def _blocks(self, report: Report, file_of: Callable[[int], Path], *, kv_scales: bool) -> None:
        """Quantize the blocks that have no file yet, and calibrate KV scales, if asked for, on all of them."""
        # What only runs through the blocks runs for the KV scales, or for a block that is still to be solved.
        solving = not all(file_of(index).is_file() for index in range(self.total))
        needed = self.tokens if solving or kv_scales else None
        watching = None
        if kv_scales:
            assert self.tokens is not None
            watching = KVPass(self.decoder, self.model_dir, self.tokens, self.recipe.calibration.seed)
        hidden = self.decoder.embed(needed) if needed is not None else None
        original = hidden.clone() if hidden is not None and self.plan.needs_original and solving else None
        for index in range(self.total):
            self.progress(index, self.total, f"block {index + 1}/{self.total}")
            linears = self.decoder.linears(index)
            local = [name for name in linears if self.decoder.name(index, name) in self.plan.changed]
            if not local and hidden is None:
                continue
            with self.decoder.loaded(index) as block:
                pristine = clone(block) if original is not None else None
                path = file_of(index)
                if path.is_file():
                    tensors, metadata = read_tensors(path)
                    errors, unseen = json.loads(metadata["relative_error"]), json.loads(metadata.get("unseen", "[]"))
                    self.solver.install(index, block, tensors)
                else:
                    self.now = index
                    comparison = (pristine, original) if pristine is not None and original is not None else None
                    scaled = self.solver.transform(index, block, hidden, original=comparison) if local else {}
                    if pristine is not None and original is not None:
                        # Inputs are compared as they are after the scaling, which `original` is none the wiser of.
                        comparison = (clone(block) if self.plan.transforms else pristine), original
                    tensors, errors = self.solver.quantize(index, block, local, hidden, original=comparison)
                    unseen = self.solver.unseen
                    if tensors:
                        told = {"relative_error": json.dumps(errors), "unseen": json.dumps(unseen)}
                        write_tensors(path, scaled | tensors, told)
                report.unseen += unseen
                report.layers += [self._layer_report(index, name, tensors, errors) for name in local]
                last = index == self.total - 1
                if hidden is not None and not (last and watching is None):
                    self.progress(index, self.total, f"block {index + 1}/{self.total}: running")
                    if watching is not None:
                        watching.advance(index, block, hidden)
                    else:
                        with self.decoder.rounded(), self.solver.replaying(index, block):
                            self.decoder.advance(index, block, hidden)
                    if pristine is not None and original is not None and not last:
                        with self.decoder.rounded(), self.solver.replaying(index, pristine):
                            self.decoder.advance(index, pristine, original)
        if watching is not None:
            self.kv_scales = watching.calibrator

    def _layer_report(
        self, index: int, local: str, tensors: dict[str, Tensor], errors: dict[str, float]
    ) -> LayerReport:
        name = self.decoder.name(index, local)
        linear = self.decoder.linears(index)[local]
        rows, columns = linear.out_features, linear.in_features
        step = self.plan.steps.get(name)
        if step is None:
            bits = 8.0 * tensors[f"{name}.weight"].element_size()
        else:
            bits = self.solver.storage.bits_per_weight(name, tensors, step, (rows, columns))
        count = None
        if name in self.plan.prunes:
            count = int(zeros(name, tensors, step, self.solver.storage).sum())
        return LayerReport(name, (rows, columns), bits, errors[name], count)

    def _recount(self, report: Report) -> None:
        """Count the zeros of the pruned layers again now that the model has learned; see ``zeros.recounted``."""
        assert self.final is not None
        for index in range(self.total):
            own = {self.decoder.name(index, local) for local in self.decoder.linears(index)} & self.plan.prunes.keys()
            if not own:
                continue
            before, after = (read_tensors(path(index))[0] for path in (self._block_file, self.final.block_result))
            report.layers = [
                recounted(
                    layer,
                    self.plan.prunes[layer.name],
                    before,
                    after,
                    step=self.plan.steps.get(layer.name),
                    storage=self.solver.storage,
                )
                if layer.name in own
                else layer
                for layer in report.layers
            ]

    def _changed(self, names: set[str]) -> Path:
        """Write tensors as the source gives them, in the dtype that they are stored in, and return the file."""
        source, path = self.decoder.source, self.work / "changed.safetensors"
        write_tensors(path, {name: source.read(name).to(source.dtype(name)) for name in sorted(names)}, {})
        return path

    def _write(self, report: Report, scales: KVScales | None) -> int:
        """Fill ``checkpoint/``, rename it to the output, and return the bytes of its tensors."""
        target = self.work / "checkpoint"
        if target.exists():
            shutil.rmtree(target)
        target.mkdir()
        checkpoint.copy_companions(self.model_dir, target)
        config = read_config(self.model_dir)
        if self.plan.changed:
            replaced = {f"{name}.weight" for name in self.plan.changed}
            files = [self._finished_block(index) for index in range(self.total)]
            if self.final is not None:
                files.append(self.final.outside_result)
            parts = [path for path in files if path.is_file()]
            replaced |= {name for part in parts for name in read_header(part)}
            if changed := self.decoder.source.changed():
                parts.append(self._changed(set(changed) - replaced))
                replaced |= set(changed)
                config["tie_word_embeddings"] = False  # Head and embedding changed in different ways.
            size = checkpoint.assemble(self.decoder.source, replaced, parts, target)
            if self.plan.steps:
                config["quantization_config"] = self.solver.storage.config(self.plan, parts)
        else:
            for path in weight_files(self.model_dir):
                checkpoint.copy_file(path, target / path.name)
            index = self.model_dir / checkpoint.INDEX
            if index.is_file():
                shutil.copyfile(index, target / index.name)
            size = self.decoder.source.size()
        write_json(target / "config.json", config)
        for name, data in self.attachments.items():
            write_bytes(target / name, data)
        write_json(target / RECIPE_FILE, {**self.provenance, **report.found()})
        if scales is not None:
            scales.save(target)
        put_in_place(target, self.out, self.work)
        return size


def _mismatch(work: Path, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Say in one line what differs between an unfinished run and the one asked for."""
    fields = ("model", "model_sha256", "recipe", "calibration", "training", "tuning", "device", "versions")
    differs = [name for name in fields if found.get(name) != wanted.get(name)]
    what = ", ".join("model" if name == "model_sha256" else name for name in differs) or "settings"
    return (
        f"{work} holds an unfinished run of recipe {found['recipe']['name']} on {found['model']} with a different "
        f"{what}; repeat that command to finish it, or give --overwrite to start anew"
    )
