"""The whole chain on one small model: compress, evaluate, serve under load, report. Every step is resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.engine import plain_dtype
from bench.files import read_json, write_json
from bench.quality.plan import token_bytes
from bench.report.models import short_model
from bench.server import run_pareto, terminated_like_interrupted
from quant_methods.model_source import resolve_model

CONTEXT, ANSWER = 2048, 128
"""Tokens of a request."""
HELD = 2.17
"""Requests that the cache holds in bf16: two, and some pages to spare."""
MEMORY = "--kv-cache-memory-bytes"


def cache_memory(folder: Path) -> int:
    """Return the bytes, in whole MiB, in which a model's cache holds HELD requests in bf16."""
    return math.ceil(HELD * (CONTEXT + ANSWER) * token_bytes(folder) / 2**20) << 20


@dataclass(frozen=True)
class Size:
    """How much the demo measures.

    Attributes:
        kv_cache_dtypes: quantized dtypes; the last is also combined with 4-bit weights.
        compress: flags of ``pareto compress``; None: the weights stay as they are.
        evaluate: flags of ``pareto eval``.
        speed: flags of ``pareto serve-bench``. Unless they name the cache's memory, it has room for about two
            sequences in bf16, so that a dtype that needs less memory runs more of them at once.

    """

    kv_cache_dtypes: tuple[str, ...] = ("int8_per_head", "int4_per_head")
    # As many and as long as calibration at start-up takes, so that both use the same samples.
    compress: tuple[str, ...] | None = (
        "--recipe", "gptq-w4", "--num-calibration-samples", "32", "--calibration-length", "512",
    )  # fmt: skip
    evaluate: tuple[str, ...] = (
        "--num-windows", "4", "--window-tokens", "1024", "--needle-lengths", "1024", "2048",
        "--needle-depths", "0", "0.5", "1", "--needles-per-cell", "3",
    )  # fmt: skip
    speed: tuple[str, ...] = (
        "--batch", "8", "--context", str(CONTEXT), "--output-tokens", str(ANSWER), "--duration", "3", "--rounds", "3",
        "--idle-seconds", "0", "--max-num-batched-tokens", "512", "--side-by-side",
    )  # fmt: skip


PRETRAINED = Size(
    kv_cache_dtypes=("int4_per_head",),
    # Its package ships weights of 4 bits (bench/demo/pretrained.py): rounding them again would show too small a loss.
    compress=None,
    evaluate=(
        "--num-windows", "4", "--window-tokens", "512", "--needle-lengths", "2048", "--needle-depths", "0", "0.5", "1",
        "--needles-per-cell", "1",
    ),
    speed=(
        "--batch", "4", "--context", str(CONTEXT), "--output-tokens", str(ANSWER), "--duration", "1.5", "--rounds", "3",
        "--idle-seconds", "0", "--max-num-batched-tokens", "512", "--side-by-side",
    ),
)  # fmt: skip
"""What fits into ten minutes of two cores."""


class Demo:
    """One run of ``pareto demo``.

    Args:
        model: what to compress and serve.
        out: folder of everything.
        size: what to measure, and how much.
        say: called with a line of progress.

    """

    def __init__(self, model: str, out: Path, size: Size, say: Callable[[str], None]) -> None:
        self.model, self.out, self.size, self.say = model, out, size, say
        self.compressed = str(out / f"{short_model(model)}-w4")
        self.started = time.monotonic()
        self.step = 0

    def models(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return each model with its KV-cache dtypes: bf16 and the quantized ones, then 4-bit weights with two."""
        dtypes = self.size.kv_cache_dtypes
        found = [(self.model, ("auto", *dtypes))]
        return found if self.size.compress is None else [*found, (self.compressed, ("auto", dtypes[-1]))]

    def results(self) -> list[Path]:
        """Return where results are: evaluations, speeds and the compressed checkpoint."""
        measured = [
            self.out / f"{kind}-{short_model(model)}" for kind in ("eval", "speed") for model, _ in self.models()
        ]
        return measured if self.size.compress is None else [*measured, Path(self.compressed)]

    def run(self) -> Path:
        """Do every step that is not done yet, and return the report's path.

        Raises:
            ParetoError: a step failed; its log is named.

        """
        with terminated_like_interrupted():
            return self._run_all()

    def _run_all(self) -> Path:
        models = self.models()
        total = (self.size.compress is not None) + 2 * len(models) + 1
        if self.size.compress is not None:
            self._step(total, "compress the weights to 4 bits")
            words = ["compress", self.model, "--out", self.compressed, *self.size.compress]
            self._command("compress", words, Path(self.compressed) / "config.json")
        for model, dtypes in models:
            name = f"eval-{short_model(model)}"
            self._step(total, f"quality of {short_model(model)} with KV cache {', '.join(map(plain_dtype, dtypes))}")
            # The original's bf16 is the baseline, which is measured without being named.
            others = dtypes[1:] if model == self.model else dtypes
            words = ["eval", model, "--baseline", self.model, "--kv-cache-dtype", *others, "--out",
                     str(self.out / name), *self.size.evaluate]  # fmt: skip
            self._command(name, words, self.out / name / "eval.json")
        speed = list(self.size.speed)
        if MEMORY not in speed:
            speed += [MEMORY, str(cache_memory(resolve_model(self.model, quantized=True)))]
        for model, dtypes in models:
            name = f"speed-{short_model(model)}"
            self._step(
                total, f"serve {short_model(model)} with KV cache {', '.join(map(plain_dtype, dtypes))}, in turns"
            )
            words = ["serve-bench", model, "--kv-cache-dtype", *dtypes, "--out", str(self.out / name),
                     *speed]  # fmt: skip
            self._command(name, words, self.out / name / "serve-bench.json")
        self._step(total, "report")
        page = self.out / "report.html"
        title = f"{short_model(self.model)}: quality, memory and speed"
        self._run("report", ["report", *map(str, self.results()), "--out", str(page), "--title", title])
        return page

    def _step(self, total: int, text: str) -> None:
        self.step += 1
        elapsed = time.monotonic() - self.started
        self.say(f"[{self.step}/{total}] {int(elapsed // 60)}:{int(elapsed % 60):02d}  {text}")

    def _command(self, name: str, words: list[str], result: Path) -> None:
        if not self._done(name, words, result):
            self._run(name, words)
            self._finished(name, words)

    def _done(self, name: str, words: list[str], result: Path) -> bool:
        """Return whether a step was finished with these very words and its result still stands."""
        if not result.is_file() or self._state().get(name) != words:
            return False
        self.say("      done already")
        return True

    def _finished(self, name: str, words: list[str]) -> None:
        write_json(self.out / "state.json", self._state() | {name: words})

    def _state(self) -> dict[str, list[str]]:
        content = read_json(self.out / "state.json")
        return content if isinstance(content, dict) else {}

    def _run(self, name: str, words: list[str]) -> None:
        log = self.out / "logs" / f"{name}.log"
        self.say(f"      progress: tail -f {log}")
        run_pareto(words, log)
