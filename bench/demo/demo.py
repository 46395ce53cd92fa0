"""The whole chain on one small model: compress, evaluate, serve, load-test, report. Every step is resumable."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.engine import plain_dtype
from bench.files import read_json, write_json
from bench.report.models import short_model
from bench.server import run_pareto, serving, terminated_like_interrupted


@dataclass(frozen=True)
class Served:
    """A configuration of the demo: what is served with which KV-cache dtype."""

    model: str
    kv_cache_dtype: str

    @property
    def label(self) -> str:
        """Return its name in the report, as ``pareto eval`` would call it."""
        return f"{short_model(self.model)}, {plain_dtype(self.kv_cache_dtype)} KV"

    @property
    def slug(self) -> str:
        """Return its name for files."""
        return f"{short_model(self.model)}-{plain_dtype(self.kv_cache_dtype)}"


@dataclass(frozen=True)
class Size:
    """How much the demo measures.

    Attributes:
        evaluate: flags of ``pareto eval``.
        load: flags of ``pareto loadtest``.
        compress: flags of ``pareto compress``.
        serve: flags of ``pareto serve``.

    """

    evaluate: tuple[str, ...] = (
        "--num-windows", "4", "--window-tokens", "1024", "--needle-lengths", "1024", "2048",
        "--needle-depths", "0", "0.5", "1", "--needles-per-cell", "3",
    )  # fmt: skip
    load: tuple[str, ...] = (
        "--concurrency", "1", "4", "--requests", "16", "--warmup", "2", "--prompt-tokens", "1024",
        "--output-tokens", "32", "--no-progress", "--overwrite",
    )  # fmt: skip
    # As many and as long as calibration at start-up takes, so that both use the same samples.
    compress: tuple[str, ...] = ("--num-calibration-samples", "32", "--calibration-length", "512")
    serve: tuple[str, ...] = ("--max-model-len", "4096", "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 30))


class Demo:
    """One run of ``pareto demo``.

    Args:
        model: what to compress and serve.
        out: folder of everything.
        kv_cache_dtypes: quantized dtypes for the original weights; the last is also combined with 4-bit weights.
        size: how much to measure.
        say: called with a line of progress.

    """

    def __init__(
        self, model: str, out: Path, kv_cache_dtypes: tuple[str, ...], size: Size, say: Callable[[str], None]
    ) -> None:
        self.model, self.out, self.dtypes, self.size, self.say = model, out, kv_cache_dtypes, size, say
        self.compressed = str(out / f"{short_model(model)}-w4")
        self.started = time.monotonic()
        self.step = 0

    def configurations(self) -> list[Served]:
        """Return what is measured: bf16, 4-bit weights, quantized KV caches, and both together."""
        both = [Served(self.compressed, dtype) for dtype in ("auto", self.dtypes[-1])]
        return [Served(self.model, "auto"), *(Served(self.model, dtype) for dtype in self.dtypes), *both]

    def results(self) -> list[Path]:
        """Return where results are: evaluations, load tests and the compressed checkpoint."""
        evaluations = [self.out / f"eval-{short_model(model)}" for model in (self.model, self.compressed)]
        loads = [self.out / f"load-{served.slug}" for served in self.configurations()]
        return [*evaluations, *loads, Path(self.compressed)]

    def run(self) -> Path:
        """Do every step that is not done yet, and return the report's path.

        Raises:
            ParetoError: a step failed; its log is named.

        """
        with terminated_like_interrupted():
            return self._run_all()

    def _run_all(self) -> Path:
        served = self.configurations()
        total = 1 + 2 + len(served) + 1
        self._step(total, "compress the weights to 4 bits")
        self._command("compress", ["compress", self.model, "--recipe", "gptq-w4", "--out", self.compressed,
                                   *self.size.compress], Path(self.compressed) / "config.json")  # fmt: skip
        for model, dtypes in ((self.model, self.dtypes), (self.compressed, ("auto", self.dtypes[-1]))):
            name = f"eval-{short_model(model)}"
            self._step(total, f"quality of {short_model(model)} with KV cache {', '.join(map(plain_dtype, dtypes))}")
            words = ["eval", model, "--baseline", self.model, "--kv-cache-dtype", *dtypes, "--out",
                     str(self.out / name), *self.size.evaluate]  # fmt: skip
            self._command(name, words, self.out / name / "eval.json")
        for configuration in served:
            self._step(total, f"serve and load-test {configuration.label}")
            self._load_test(configuration)
        self._step(total, "report")
        page = self.out / "report.html"
        title = f"{short_model(self.model)}: quality, memory and speed"
        self._run("report", ["report", *map(str, self.results()), "--out", str(page), "--title", title])
        return page

    def _step(self, total: int, text: str) -> None:
        self.step += 1
        elapsed = time.monotonic() - self.started
        self.say(f"[{self.step}/{total}] {int(elapsed // 60)}:{int(elapsed % 60):02d}  {text}")

    def _load_test(self, configuration: Served) -> None:
        name = f"load-{configuration.slug}"
        summary = self.out / name / "summary.json"
        serve = [configuration.model, "--kv-cache-dtype", configuration.kv_cache_dtype,
                 "--served-model-name", short_model(configuration.model), *self.size.serve]  # fmt: skip
        load = ["loadtest", "--label", configuration.label, "--out", str(self.out / name), *self.size.load]
        if self._done(name, [*serve, *load], summary):
            return
        with serving(serve, self.out / "logs" / f"serve-{configuration.slug}.log") as server:
            self._run(name, [*load, "--base-url", server.base_url])
        self._finished(name, [*serve, *load])

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
        run_pareto(words, self.out / "logs" / f"{name}.log")
