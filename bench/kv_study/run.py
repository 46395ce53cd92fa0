"""Measures the coders of a study one after the other and keeps what is done, so that a run can be continued."""

from __future__ import annotations

import functools
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.environment import environment
from bench.files import read_json, write_json
from bench.kv_study.plant import plant_key_bias, plant_value_outliers
from bench.kv_study.schema import SCHEMA, CoderResult, KVStudyReport, WindowLoss, from_dict
from bench.kv_study.study import Loss, StudiedModel
from bench.statistics import exp_estimate, mean_estimate
from kv_cache.errors import ParetoError
from kv_cache.simulate.registry import ENTRIES
from quant_methods.calibration.text_source import Split, load_sequences
from quant_methods.model_source import fingerprint, read_config, resolve_model
from quant_methods.progress import EVERY, Lines

RESULT = "kv-study.json"


@dataclass(frozen=True)
class Settings:
    """What the figures of a study depend on.

    Attributes:
        model: embedded name, folder or hub name.
        texts: text files; none: the model writes its own.
        num_windows: windows of each text.
        window_tokens: tokens of each.
        calibration: text file; None: the model writes its own.
        calibration_windows: windows of it.
        calibration_tokens: tokens of each.
        key_bias: size of biases planted in the keys; 0 for none.
        value_outlier: factor of outliers planted in the values; 1 for none.
        seed: of sampled text and of what calibration looks at.

    """

    model: str
    texts: tuple[str, ...] = ()
    num_windows: int = 4
    window_tokens: int = 2048
    calibration: str | None = None
    calibration_windows: int = 32
    calibration_tokens: int = 2048
    key_bias: float = 0.0
    value_outlier: float = 1.0
    seed: int = 0


def progress_lines(say: Callable[[str], object] | None = None, every: float = EVERY) -> Lines:
    """Return the lines that say what a study is doing; on stderr unless ``say`` takes them."""
    return Lines("kv-study", say or functools.partial(print, file=sys.stderr, flush=True), every)


class Study:
    """One run."""

    def __init__(
        self, settings: Settings, out: Path, *, device: str, batch_tokens: int, lines: Lines, command: str
    ) -> None:
        """Resolve the model and the texts, and read what an earlier run has left.

        Args:
            settings: what is studied.
            out: folder of the result.
            device: torch device.
            batch_tokens: tokens that go through the model at once.
            lines: are told what is going on.
            command: what was typed.

        Raises:
            ParetoError: a model or text is missing or too short, or the folder holds a study of other settings.

        """
        self.lines, self.path, self.command = lines, out / RESULT, command
        self.device, self.batch_tokens, self._settings = device, batch_tokens, settings
        self.folder = resolve_model(settings.model)
        longest = max(settings.window_tokens, settings.calibration_tokens)
        context = read_config(self.folder).get("max_position_embeddings")
        if context and longest > context:
            raise ParetoError(f"{settings.model}: windows of {longest} tokens exceed the model's {context} positions")
        lines.begin("reading texts")
        self.calibration = self._tokens(
            settings.calibration, settings.calibration_windows, settings.calibration_tokens, "calibration"
        )
        self.names: list[str] = []
        windows = []
        for text in settings.texts or (None,):
            windows.append(self._tokens(text, settings.num_windows, settings.window_tokens, "evaluation"))
            self.names += [Path(text).name if text else "samples"] * settings.num_windows
        self.windows = torch.cat(windows)
        # The same bytes may lie elsewhere on another machine: names tell people, digests tell the program.
        self.settings: dict[str, Any] = asdict(settings) | {
            "model": self.folder.name if Path(settings.model).is_dir() else settings.model,
            "texts": [Path(text).name for text in settings.texts],
            "calibration": settings.calibration and Path(settings.calibration).name,
            "fingerprint": fingerprint(self.folder),
            "windows_sha256": _sha256(self.windows),
            "calibration_sha256": _sha256(self.calibration),
        }
        self.report = self._earlier()

    def _tokens(self, text: str | None, windows: int, tokens: int, split: Split) -> Tensor:
        return load_sequences(
            self.folder, Path(text) if text else None, windows, tokens, self._settings.seed, split,
            device=self.device, progress=lambda done, total: None,
        )  # fmt: skip

    def _earlier(self) -> KVStudyReport | None:
        document = read_json(self.path)
        if document is None:
            if self.path.exists():
                raise ParetoError(f"{self.path} is damaged: delete it, or give another --out")
            return None
        report = read_report(self.path)
        names = {"model", "texts", "calibration"}
        differing = [k for k, v in self.settings.items() if k not in names and report.settings.get(k) != v]
        if differing:
            raise ParetoError(f"{self.path} is of other settings ({', '.join(differing)}): give another --out")
        return report

    def run(self, names: list[str], again: set[str], told: Callable[[CoderResult], None]) -> KVStudyReport:
        """Measure coders.

        Args:
            names: of the registry.
            again: those that are measured though an earlier run has done so.
            told: called with each new result.

        """
        done = {coder.name for coder in self.report.coders if not coder.error} - again if self.report else set()
        missing = [name for name in names if name not in done]
        if self.report is not None and not missing:
            return self.report
        model, nll = self._prepared()
        perplexity = exp_estimate(mean_estimate(nll))
        kept = [coder for coder in self.report.coders if coder.name in done] if self.report else []
        for number, name in enumerate(missing, 1):
            self.lines.begin(f"coder {number} of {len(missing)}, {name}")
            result = self._measured(model, name, nll)
            kept.append(result)
            order = list(ENTRIES)
            kept.sort(key=lambda coder: order.index(coder.name) if coder.name in order else len(order))
            self.report = KVStudyReport(
                status="complete" if number == len(missing) else "partial",
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                command=self.command,
                settings=self.settings,
                environment=environment() | {"device": self.device},
                perplexity=perplexity,
                reference_nll=nll,
                coders=list(kept),
            )
            write_json(self.path, self.report.to_dict())
            told(result)
        assert self.report is not None
        return self.report

    def _prepared(self) -> tuple[StudiedModel, list[float]]:
        self.lines.begin("loading the model")
        model = StudiedModel(self.folder, self.device, self.batch_tokens)
        if self._settings.key_bias:
            plant_key_bias(model.model, self._settings.key_bias)
        if self._settings.value_outlier != 1:
            plant_value_outliers(model.model, self._settings.value_outlier, self._settings.seed)
        self.lines.begin("running the calibration text")
        model.calibrate(self.calibration, self._settings.seed)
        self.lines.begin("running the test windows in full precision")
        return model, model.refer(self.windows)

    def _measured(self, model: StudiedModel, name: str, nll: list[float]) -> CoderResult:
        entry = ENTRIES[name]
        coder = entry.make()
        failed = CoderResult(name, entry.family, None, None, None, None, None, [], None, None)
        try:
            began = time.monotonic()
            model.fit(coder)
            model.finish()
            fitted = time.monotonic()
            loss = model.measure(coder)
            model.finish()
        except torch.OutOfMemoryError:
            return replace(failed, error="out of memory: lower --batch-tokens or --calibration-windows")
        except ParetoError as error:
            return replace(failed, error=str(error))
        if not all(map(_finite, (loss.kl, loss.nll))):
            return replace(failed, error="the coded model's output is not finite")
        return CoderResult(
            name=name,
            family=entry.family,
            error=None,
            bits=coder.bits(model.shape, self.windows.shape[1]),
            kl=mean_estimate(loss.kl),
            top1_agreement=mean_estimate(loss.top1),
            perplexity_change=exp_estimate(mean_estimate([a - b for a, b in zip(loss.nll, nll, strict=True)]), -1.0),
            windows=self._windows(loss),
            fit_seconds=round(fitted - began, 3),
            run_seconds=round(time.monotonic() - fitted, 3),
        )

    def _windows(self, loss: Loss) -> list[WindowLoss]:
        return [WindowLoss(*row) for row in zip(self.names, loss.kl, loss.top1, loss.nll, strict=True)]


def read_report(path: Path) -> KVStudyReport:
    """Read ``kv-study.json``.

    Raises:
        ParetoError: the file is missing or no such result.

    """
    document = read_json(path)
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ParetoError(f"{path} is missing or no result of pareto kv-study")
    try:
        return from_dict(document)
    except (KeyError, TypeError) as error:
        raise ParetoError(f"{path} is no result of this version of pareto kv-study") from error


def _sha256(tokens: Tensor) -> str:
    return hashlib.sha256(str(tuple(tokens.shape)).encode() + tokens.numpy().tobytes()).hexdigest()


def _finite(values: list[float]) -> bool:
    return bool(torch.tensor(values).isfinite().all())
