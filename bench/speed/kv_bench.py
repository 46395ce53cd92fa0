"""Compares the speed of KV-cache dtypes in one run whose rounds alternate between them.

A machine's speed drifts by more than the differences of interest, so every round measures all dtypes, and ratios are
taken within a round before their median is taken. Each dtype's engine is started anew in each round: two engines at
once would share memory bandwidth and, on a GPU, not fit.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench import engine
from bench.engine import EngineSettings
from bench.environment import environment
from bench.files import write_json
from bench.schema import KVCache
from bench.speed.alternation import Alternation, Sample, identity, say_on_stderr
from bench.speed.engine_flags import EngineChoices
from bench.speed.schema import DtypeResult, KVBenchReport, Point, Spread
from bench.speed.step_timer import ahead, prompts, time_batch
from kv_cache.errors import ParetoError
from quant_methods.model_source import read_config, resolve_model, resolve_shape

RESULT = "kv-bench.json"
FLOOR = 16
"""Context whose decode step stands for everything but attention."""


@dataclass(frozen=True, kw_only=True)
class Settings(EngineChoices):
    """The user's choices, as recorded in the result, beside the engine's.

    Attributes:
        model: as given.
        kv_cache_dtypes: the first is the baseline.
        shapes: (sequences decoded together, prompt tokens of each).
        rounds: how often every dtype is measured.
        steps: decode steps timed in each round.
        compressed: the same model with compressed weights, once or more, measured beside it.
        compressed_kv_cache_dtypes: those to measure with each.
        prefix_shapes: of shapes, those in which prefill with half of each prompt in the prefix cache is timed too.
        shapes_of: shapes of rows that are not measured in all, by the row's name.

    """

    model: str
    kv_cache_dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    rounds: int
    steps: int
    compressed: tuple[str, ...] = ()
    compressed_kv_cache_dtypes: tuple[str, ...] = ()
    prefix_shapes: tuple[tuple[int, int], ...] = ()
    shapes_of: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = ()

    def shapes_for(self, row: Row) -> tuple[tuple[int, int], ...]:
        """Return the shapes that a row is measured in."""
        own = dict(self.shapes_of).get(row.name)
        return self.shapes if own is None else tuple(shape for shape in self.shapes if shape in own)

    def prefix_shapes_for(self, row: Row) -> tuple[tuple[int, int], ...]:
        """Return the shapes in which a row is timed from the prefix cache: none where it has shapes of its own."""
        return () if row.name in dict(self.shapes_of) else self.prefix_shapes

    def rows(self) -> list[Row]:
        """Return what is measured, the baseline first."""
        own = [Row(self.model, dtype, dtype) for dtype in self.kv_cache_dtypes]
        return own + [
            Row(model, dtype, f"{Path(model).name} {dtype}")
            for model in self.compressed
            for dtype in self.compressed_kv_cache_dtypes
        ]


@dataclass(frozen=True)
class Row:
    """One model and KV-cache dtype, and the name under which its samples are kept."""

    model: str
    kv_cache_dtype: str
    name: str


class KVBench:
    """One run.

    A sample is what one engine start measured: ``kv_cache``, the device's ``copy_bytes_per_s`` (None on CPU), and by
    ``batch x context`` the times in seconds: ``prefill_s``, ``step_s`` and, where timed, ``prefix_prefill_s``.

    Args:
        settings: what to measure.
        out: folder of the result; finished engine starts are kept in ``.work`` there.
        say: called with a line of progress.

    """

    def __init__(self, settings: Settings, out: Path, say: Callable[[str], None] | None = None) -> None:
        self.settings, self.out = settings, out
        models = [settings.model, *settings.compressed]
        dummy = settings.load_format == "dummy"
        resolve = resolve_shape if dummy else functools.partial(resolve_model, quantized=True)
        self.folders = {model: resolve(model) for model in models}
        config = read_config(self.folders[settings.model])
        text = config.get("text_config") or config
        self.vocabulary = int(text.get("vocab_size") or 1000)
        longest = max(context for _, context in settings.shapes)
        context = int(text.get("max_position_embeddings") or 0)
        self.max_model_len = longest + settings.steps + self._ahead() + 8
        if context and self.max_model_len > context:
            raise ParetoError(
                f"--context {longest} and {settings.steps} decode steps need {self.max_model_len} positions and the "
                f"model's context is {context}; use at most {context - settings.steps - self._ahead() - 8}"
            )
        self.identities = {model: identity(folder, settings.load_format) for model, folder in self.folders.items()}
        self._rows = {row.name: row for row in settings.rows()}
        self._turns = Alternation(
            list(self._rows),
            settings.rounds,
            asdict(settings) | {"model": list(self.identities.values()), "rounds": None},
            out / ".work" / "kv-bench",
            say or say_on_stderr,
        )
        self.environment = environment()

    @property
    def errors(self) -> dict[str, str]:
        """Why rows could not be measured, by their names."""
        return self._turns.errors

    def _ahead(self) -> int:
        return max(
            ahead(batch, context, self.settings.max_num_batched_tokens) for batch, context in self.settings.shapes
        )

    def run(self) -> KVBenchReport:
        """Measure every round that is missing; the result file is rewritten after each engine.

        What fails in one round is left out of the later ones, and ``errors`` has the reason by the row's name.

        Raises:
            ParetoError: the baseline cannot be measured.

        """

        def keep() -> None:
            write_json(self.out / RESULT, self.report("partial").to_dict())

        self._turns.run(lambda name, _: self._measure(self._rows[name]), keep)
        report = self.report("complete")
        write_json(self.out / RESULT, report.to_dict())
        return report

    def _measure(self, row: Row) -> Sample:
        s = self.settings
        extra: dict[str, Any] = {"skip_tokenizer_init": True, "enable_prefix_caching": bool(s.prefix_shapes)}
        if s.load_format != "auto":
            extra["load_format"] = s.load_format
        extra |= engine.json_flag("compilation_config", s.compilation_config)
        most = max(batch for batch, _ in s.shapes)
        settings = EngineSettings(
            str(self.folders[row.model]), row.kv_cache_dtype, s.dtype, self.max_model_len, s.max_num_batched_tokens,
            most, s.kv_cache_memory_bytes, s.tensor_parallel_size, s.enforce_eager, s.seed, extra=extra,
        )  # fmt: skip
        sample: Sample = {"points": {}, "at": time.time()}
        with engine.running(settings) as llm:
            sample["kv_cache"] = asdict(engine.kv_cache(llm, settings))
            sample["copy_bytes_per_s"] = min(llm.collective_rpc("pareto_copy_rate"), key=lambda rate: rate or 0.0)
            # Compilation, allocation and caches: not what is measured.
            time_batch(llm, prompts(most, FLOOR, self.vocabulary, s.seed + 1), 8)
            shapes = s.shapes_for(row)
            floors = {(batch, FLOOR) for batch, _ in shapes}
            for batch, context in sorted(floors | set(shapes)):
                tokens = prompts(batch, context, self.vocabulary, s.seed)
                point = asdict(time_batch(llm, tokens, s.steps))
                if (batch, context) in s.prefix_shapes_for(row):
                    point["prefix_prefill_s"] = self._prefix_prefill(llm, batch, context)
                sample["points"][f"{batch}x{context}"] = point
        return sample

    def _prefix_prefill(self, llm: Any, batch: int, context: int) -> float:
        tokens = prompts(batch, context, self.vocabulary, self.settings.seed + 2)
        time_batch(llm, [prompt[: context // 2] for prompt in tokens], 2)
        return time_batch(llm, tokens, 2).prefill_s

    def report(self, status: str) -> KVBenchReport:
        """Return what has been measured so far."""
        s = self.settings
        return KVBenchReport(
            status=status,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            model=s.model,
            baseline=s.kv_cache_dtypes[0],
            settings=asdict(s) | {"max_model_len": self.max_model_len},
            environment=self.environment,
            dtypes=summarize(s, self._turns.samples, self.errors, {} if s.load_format == "dummy" else self.identities),
        )


def summarize(
    settings: Settings, samples: dict[str, Sample], errors: dict[str, str], fingerprints: dict[str, str]
) -> list[DtypeResult]:
    """Return the result of each dtype.

    Args:
        settings: what was measured.
        samples: by ``round dtype``.
        errors: by row, why it could not be measured.
        fingerprints: of models, by their names in the settings; none of those without weights.

    """
    rounds = {
        row: {i: samples[f"{i} {row.name}"] for i in range(settings.rounds) if f"{i} {row.name}" in samples}
        for row in settings.rows()
    }
    base = next(iter(rounds.values()))
    results = []
    for row, own in rounds.items():
        model, mark = None if row.model == settings.model else row.model, fingerprints.get(row.model)
        if not own:
            if row.name in errors:
                results.append(DtypeResult(row.kv_cache_dtype, errors[row.name], None, None, [], model, mark))
            continue
        cache = KVCache(**next(iter(own.values()))["kv_cache"])
        reference = next(iter(base.values()))["kv_cache"]["tokens"] if base else None
        ratio = cache.tokens / reference if reference else None
        points = [_point(batch, context, cache, own, base) for batch, context in settings.shapes_for(row)]
        results.append(DtypeResult(row.kv_cache_dtype, None, cache, ratio, points, model, mark))
    return results


def _point(batch: int, context: int, cache: KVCache, own: dict[int, Sample], base: dict[int, Sample]) -> Point:
    name, floor = f"{batch}x{context}", f"{batch}x{FLOOR}"

    def step(sample: Sample) -> float:
        return float(1000 * sample["points"][name]["step_s"])

    def prefill(sample: Sample) -> float:
        return float(batch * context / sample["points"][name]["prefill_s"])

    def prefix_prefill(sample: Sample) -> float | None:
        seconds = sample["points"][name].get("prefix_prefill_s")
        return None if seconds is None else float(batch * (context - context // 2) / seconds)

    def reading(sample: Sample) -> float:
        return step(sample) - float(1000 * sample["points"][floor]["step_s"])

    shared = sorted(set(own) & set(base))
    readings = [(reading(base[i]), reading(own[i])) for i in shared]
    positive = bool(readings) and all(a > 0 and b > 0 for a, b in readings)
    hits = [rate for sample in own.values() if (rate := prefix_prefill(sample)) is not None]
    hit_ratios = [mine / its for i in shared if (mine := prefix_prefill(own[i])) and (its := prefix_prefill(base[i]))]
    context_ms = spread([reading(sample) for sample in own.values()])
    copies = [rate for sample in own.values() if (rate := sample.get("copy_bytes_per_s"))]
    rate = batch * context * cache.bytes_per_token / (context_ms.median / 1000) if context_ms.median > 0 else None
    return Point(
        batch=batch,
        context=context,
        step_ms=spread([step(sample) for sample in own.values()]),
        step_ratio=median(step(base[i]) / step(own[i]) for i in shared) if shared else None,
        prefill_tokens_per_s=spread([prefill(sample) for sample in own.values()]),
        prefill_ratio=median(prefill(own[i]) / prefill(base[i]) for i in shared) if shared else None,
        context_ms=context_ms,
        context_ratio=median(a / b for a, b in readings) if positive else None,
        prefix_tokens_per_s=spread(hits) if hits else None,
        prefix_ratio=median(hit_ratios) if hit_ratios else None,
        context_bytes_per_s=rate,
        copy_bytes_per_s=median(copies) if copies else None,
    )


def spread(values: list[float]) -> Spread:
    """Return median and extremes."""
    return Spread(median(values), min(values), max(values), len(values))
