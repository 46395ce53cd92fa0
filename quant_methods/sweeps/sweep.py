"""Runs a grid of compressions and measures each: one results table, written anew after every point.

OUT holds ``sweep.json``, ``sweep.md``, ``sweep.png`` (KL against bits) and ``points/``, where points are compressed. A
point whose row is in ``sweep.json`` is finished and skipped; one that was interrupted goes on from its last finished
block. Checkpoints are removed once they are measured, unless they are to be kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kv_cache.atomic import write_bytes
from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.checkpoint import Source, write_json
from quant_methods.checkpoints.quality import Yardstick
from quant_methods.checkpoints.replaceable import RECIPE_FILE, check_unfinished
from quant_methods.compress import compress, prepare, work_of
from quant_methods.mixed_precision.budget import Loss
from quant_methods.mixed_precision.mixed import check_budget, compress_to_budget
from quant_methods.mixed_precision.sensitivity import Settings
from quant_methods.model_source import digest, fingerprint, resolve_model
from quant_methods.sweeps.file import Point, Sweep
from quant_methods.sweeps.plot import plot
from quant_methods.work_folder import locked

SCHEMA = "vllm-pareto/sweep/1"
Progress = Callable[[int, int, str, int, int, str], None]
"""Called with (points done, points in all, the point, steps done of it, steps in all, what happens now)."""


class SweepRun:
    """One sweep, taken up where an earlier one stopped.

    Args:
        model: an embedded model's name, a directory, or a hub name.
        sweep: the grid.
        out: directory of the results.
        text: calibration text (.txt or .jsonl); None lets the model write its own.
        settings: how sensitivity is measured, for points with a budget.
        device: torch device.
        keep: keep the points' checkpoints.
        overwrite: drop results of another model or another evaluation.
        progress: told how far it is.

    Raises:
        ParetoError: bad input; a point that cannot work for this model is refused before any work.

    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        sweep: Sweep,
        out: Path,
        *,
        text: Path | None = None,
        settings: Settings | None = None,
        device: str = "cpu",
        keep: bool = False,
        overwrite: bool = False,
        progress: Progress = lambda done, total, point, step, steps, what: None,
    ) -> None:
        if not keep:
            # Nothing that is measured here depends on KV scales.
            points = [
                dataclasses.replace(p, recipe=dataclasses.replace(p.recipe, kv_scales=False)) for p in sweep.points
            ]
            sweep = dataclasses.replace(sweep, points=points)
        self.model, self.sweep, self.out, self.text, self.device = model, sweep, out, text, device
        self.settings, self.keep, self.overwrite, self.progress = settings or Settings(), keep, overwrite, progress
        self.folder = resolve_model(model)
        self.model_key = fingerprint(self.folder)
        self.text_key = hashlib.sha256(text.read_bytes()).hexdigest() if text is not None else None
        self.loss: Loss = "kl" if self.settings.kl else "hessian"
        self.keys = [self._key(point) for point in sweep.points]
        self.rows: dict[str, dict[str, Any]] = {}

    def _key(self, point: Point) -> str:
        return digest(
            {
                "model": self.model_key,
                "recipe": point.recipe.fingerprint(),
                "budget": None if point.budget is None else dataclasses.asdict(point.budget),
                "sensitivity": None if point.budget is None else dataclasses.asdict(self.settings),
                "text": self.text_key,
                "device": self.device.partition(":")[0],
            }
        )

    def _place(self, number: int) -> Path:
        slug = re.sub(r"[^\w.+=-]+", "-", self.sweep.points[number].name)[:80]
        return self.out / "points" / f"{slug}-{self.keys[number][:8]}"

    def run(self) -> list[dict[str, Any]]:
        """Run to the end; return the points' rows in the grid's order."""
        points, total = self.sweep.points, len(self.sweep.points)
        evaluation = self.sweep.evaluation
        self.out.mkdir(parents=True, exist_ok=True)
        check_unfinished(work_of(self.out))
        with locked(work_of(self.out)):
            windows = load_sequences(
                self.folder,
                evaluation.text,
                evaluation.num_windows,
                evaluation.window_tokens,
                split="evaluation",
                device=self.device,
                progress=lambda done, steps: self.progress(0, total, "sampling evaluation text", done, steps, ""),
            )
            measured_on = {
                "text": evaluation.text.name if evaluation.text else "samples",
                "tokens_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
                "num_windows": evaluation.num_windows,
                "window_tokens": evaluation.window_tokens,
            }
            self._take_up(measured_on)
            waiting = [number for number in range(total) if self.keys[number] not in self.rows]
            for number in waiting:
                # Refuses what cannot work for this model, before the first hour is spent.
                try:
                    self._check(number)
                except ParetoError as error:
                    raise ParetoError(f"point {points[number].name}: {error}") from error
            yardstick = None
            if waiting:
                yardstick = Yardstick(
                    self.folder,
                    windows,
                    self.device,
                    lambda done, steps: self.progress(0, total, "the original", done, steps, "evaluation"),
                )
            for number in waiting:
                assert yardstick is not None
                self.rows[self.keys[number]] = self._point(number, yardstick)
                self._write(measured_on)
                if not self.keep:
                    shutil.rmtree(self._place(number))
            self._write(measured_on)
        shutil.rmtree(work_of(self.out))
        if not self.keep:
            # Only once it is empty: whatever else lies there is not of this run.
            with contextlib.suppress(OSError):
                (self.out / "points").rmdir()
        self.progress(total, total, "", 0, 0, "")
        return self.ordered()

    def ordered(self) -> list[dict[str, Any]]:
        """Return the rows of the grid's finished points, in its order."""
        return [self.rows[key] for key in self.keys if key in self.rows]

    def _take_up(self, measured_on: dict[str, Any]) -> None:
        """Read the rows of an earlier run.

        Raises:
            ParetoError: they were measured on another model or text.

        """
        path = self.out / "sweep.json"
        if not path.is_file():
            return
        try:
            found = json.loads(path.read_text())
            same = found["model_sha256"] == self.model_key and found["evaluation"] == measured_on
            rows = {row["key"]: row for row in found["rows"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ParetoError(f"{path} is not a sweep's results; give another --out") from error
        if same:
            self.rows = rows
        elif not self.overwrite:
            raise ParetoError(
                f"{path} holds results of another model or evaluation text; give another --out, or --overwrite"
            )

    def _check(self, number: int) -> None:
        point, place = self.sweep.points[number], self._place(number)
        if point.budget is None:
            prepare(self.model, point.recipe, place, device=self.device, overwrite=True)
        else:
            check_budget(
                self.model, point.recipe, point.budget, place, settings=self.settings, loss=self.loss,
                device=self.device, overwrite=True,
            )  # fmt: skip

    def _point(self, number: int, yardstick: Yardstick) -> dict[str, Any]:
        """Compress and measure one point."""
        point, place = self.sweep.points[number], self._place(number)
        total = len(self.sweep.points)
        done = len([key for key in self.keys if key in self.rows])
        started = time.monotonic()

        def show(step: int, steps: int, what: str) -> None:
            self.progress(done, total, point.name, step, steps, what)

        if not place.is_dir():  # Else it was finished, and then interrupted while it was measured.
            place.parent.mkdir(parents=True, exist_ok=True)
            # Whatever lies there is of the same key, or of an older version of a package.
            common: dict[str, Any] = {"text": self.text, "device": self.device, "overwrite": True}
            if point.budget is None:
                compress(self.model, point.recipe, place, progress=show, **common)
            else:
                compress_to_budget(
                    self.model,
                    point.recipe,
                    point.budget,
                    place,
                    settings=self.settings,
                    loss=self.loss,
                    progress=show,
                    **common,
                )
        seconds = time.monotonic() - started
        quality, bits = yardstick.measure(place, lambda step, steps: show(step, steps, "evaluation"))
        provenance = json.loads((place / RECIPE_FILE).read_text())
        return {
            "name": point.name,
            "key": self.keys[number],
            "settings": point.settings,
            "recipe": provenance["recipe"],
            "versions": provenance["versions"],
            "device": device_name(self.device),
            "bits_per_weight": bits,
            "checkpoint_bytes": Source(place).size(),
            "kl": quality.mean_kl,
            "kl_by_window": quality.kl,
            "top1_agreement": quality.mean_top1,
            "perplexity": quality.perplexity,
            "compress_seconds": seconds,
        }

    def _write(self, measured_on: dict[str, Any]) -> None:
        rows = self.ordered()
        # Rows of points that are no longer in the grid stay: it may be widened and narrowed.
        others = [row for key, row in self.rows.items() if key not in self.keys]
        document = {
            "schema": SCHEMA,
            "model": self.folder.name,
            "model_sha256": self.model_key,
            "calibration_text": self.text.name if self.text else "samples",
            "evaluation": measured_on,
            "rows": rows + others,
        }
        write_json(self.out / "sweep.json", document)
        if rows:
            write_bytes(self.out / "sweep.md", (markdown(rows, self.folder.name) + "\n").encode())
            write_bytes(self.out / "sweep.png", plot(rows, f"{self.folder.name}, {measured_on['text']}"))


def device_name(device: str) -> str:
    """Return what a torch device is: the GPU's name, or the processor's architecture."""
    kind = torch.device(device)
    return torch.cuda.get_device_name(kind) if kind.type == "cuda" else f"{kind.type} ({platform.machine()})"


def markdown(rows: list[dict[str, Any]], model: str) -> str:
    """Return the table of a sweep; ``#`` are the numbers in the plot."""
    lines = [
        f"| # | {model} | bits a weight | MB | KL | same top token | perplexity | seconds |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {number} | {row['name']} | {row['bits_per_weight']:.3f} | {row['checkpoint_bytes'] / 1e6:.1f} | "
        f"{row['kl']:.4f} | {100 * row['top1_agreement']:.1f}% | {row['perplexity']:.2f} | "
        f"{row['compress_seconds']:.0f} |"
        for number, row in enumerate(rows, 1)
    ]
    return "\n".join(lines)
