"""Compares the speed of KV-cache dtypes in one run whose rounds alternate between them.

A machine's speed drifts by more than the differences of interest, so every round measures all dtypes, and ratios are
taken within a round before their median is taken. Each dtype's engine is started anew in each round: two engines at
once would share memory bandwidth and, on a GPU, not fit.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench import engine
from bench.engine import EngineSettings
from bench.environment import environment, gpu_names, versions
from bench.files import read_json, write_json
from bench.kv_bench_schema import DtypeResult, KVBenchReport, Point, Spread
from bench.schema import KVCache
from bench.step_timer import prompts, time_batch
from kv_cache.errors import ParetoError
from quant_methods.model_source import fingerprint, read_config, resolve_model

RESULT = "kv-bench.json"
FLOOR = 16
"""Context whose decode step stands for everything but attention."""


@dataclass(frozen=True)
class Settings:
    """The user's choices, as recorded in the result.

    Attributes:
        model: as given.
        kv_cache_dtypes: the first is the baseline.
        batches: sequences decoded together.
        contexts: prompt tokens of each.
        rounds: how often every dtype is measured.
        steps: decode steps timed in each round.
        max_num_batched_tokens: longest prefill chunk.
        dtype: vLLM's ``--dtype``.
        kv_cache_memory_bytes: the same for every dtype.
        enforce_eager: vLLM's.
        tensor_parallel_size: vLLM's.
        seed: of the random prompts.

    """

    model: str
    kv_cache_dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    rounds: int
    steps: int
    max_num_batched_tokens: int
    dtype: str
    kv_cache_memory_bytes: int
    enforce_eager: bool
    tensor_parallel_size: int
    seed: int


Sample = dict[str, Any]
"""What one engine start measured: ``kv_cache``, and by ``batch x context`` the two times in seconds."""


class KVBench:
    """One run.

    Args:
        settings: what to measure.
        out: folder of the result; finished engine starts are kept in ``.work`` there.
        say: called with a line of progress.

    """

    def __init__(self, settings: Settings, out: Path, say: Callable[[str], None] | None = None) -> None:
        self.settings, self.out = settings, out
        self.say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self.folder = resolve_model(settings.model, quantized=True)
        config = read_config(self.folder)
        text = config.get("text_config") or config
        self.vocabulary = int(text.get("vocab_size") or 1000)
        longest = max(settings.contexts)
        context = int(text.get("max_position_embeddings") or 0)
        self.max_model_len = longest + settings.steps + self._ahead() + 8
        if context and self.max_model_len > context:
            raise ParetoError(
                f"--context {longest} and {settings.steps} decode steps need {self.max_model_len} positions and the "
                f"model's context is {context}; use at most {context - settings.steps - self._ahead() - 8}"
            )
        determining = asdict(settings) | {
            "model": fingerprint(self.folder), "rounds": None, "versions": versions(), "gpus": gpu_names(),
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()[:24]
        self.samples_file = out / ".work" / f"kv-bench-{key}.json"
        self.samples: dict[str, Sample] = read_json(self.samples_file) or {}
        self.errors: dict[str, str] = {}
        self.environment = environment()

    def _ahead(self) -> int:
        s = self.settings
        return -(-max(s.batches) * max(s.contexts) // s.max_num_batched_tokens) + max(s.batches)

    def run(self) -> KVBenchReport:
        """Measure every round that is missing; the result file is rewritten after each engine.

        Raises:
            ParetoError: the baseline's engine does not start.

        """
        s = self.settings
        for index in range(s.rounds):
            for dtype in s.kv_cache_dtypes:
                name = f"{index} {dtype}"
                if name in self.samples or dtype in self.errors:
                    continue
                self.say(f"round {index + 1} of {s.rounds}: {dtype}")
                try:
                    self.samples[name] = self._measure(dtype)
                except (ParetoError, RuntimeError) as error:
                    if dtype == s.kv_cache_dtypes[0]:
                        raise ParetoError(engine.reason(error)) from error
                    self.errors[dtype] = engine.reason(error)
                    self.say(f"{dtype} left out: {self.errors[dtype]}")
                    continue
                write_json(self.samples_file, self.samples)
                write_json(self.out / RESULT, self.report("partial").to_dict())
        report = self.report("complete")
        write_json(self.out / RESULT, report.to_dict())
        return report

    def _measure(self, dtype: str) -> Sample:
        s = self.settings
        settings = EngineSettings(
            str(self.folder), dtype, s.dtype, self.max_model_len, s.max_num_batched_tokens, max(s.batches),
            s.kv_cache_memory_bytes, s.tensor_parallel_size, s.enforce_eager, s.seed,
        )  # fmt: skip
        sample: Sample = {"points": {}, "at": time.time()}
        with engine.running(settings) as llm:
            sample["kv_cache"] = asdict(engine.kv_cache(llm, settings))
            # Compilation, allocation and caches: not what is measured.
            time_batch(llm, prompts(max(s.batches), FLOOR, self.vocabulary, s.seed + 1), 8)
            for batch in s.batches:
                for context in sorted({FLOOR, *s.contexts}):
                    timing = time_batch(llm, prompts(batch, context, self.vocabulary, s.seed), s.steps)
                    sample["points"][f"{batch}x{context}"] = asdict(timing)
        return sample

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
            dtypes=summarize(s, self.samples, self.errors),
        )


def summarize(settings: Settings, samples: dict[str, Sample], errors: dict[str, str]) -> list[DtypeResult]:
    """Return the result of each dtype from the samples, keyed by ``round dtype``."""
    rounds = {
        dtype: {i: samples[f"{i} {dtype}"] for i in range(settings.rounds) if f"{i} {dtype}" in samples}
        for dtype in settings.kv_cache_dtypes
    }
    base = rounds[settings.kv_cache_dtypes[0]]
    results = []
    for dtype, own in rounds.items():
        if not own:
            if dtype in errors:
                results.append(DtypeResult(dtype, errors[dtype], None, None, []))
            continue
        cache = KVCache(**next(iter(own.values()))["kv_cache"])
        reference = next(iter(base.values()))["kv_cache"]["tokens"] if base else None
        points = [_point(batch, context, own, base) for batch in settings.batches for context in settings.contexts]
        results.append(DtypeResult(dtype, None, cache, cache.tokens / reference if reference else None, points))
    return results


def _point(batch: int, context: int, own: dict[int, Sample], base: dict[int, Sample]) -> Point:
    name, floor = f"{batch}x{context}", f"{batch}x{FLOOR}"

    def step(sample: Sample) -> float:
        return float(1000 * sample["points"][name]["step_s"])

    def prefill(sample: Sample) -> float:
        return float(batch * context / sample["points"][name]["prefill_s"])

    def reading(sample: Sample) -> float:
        return step(sample) - float(1000 * sample["points"][floor]["step_s"])

    shared = sorted(set(own) & set(base))
    readings = [(reading(base[i]), reading(own[i])) for i in shared]
    positive = bool(readings) and all(a > 0 and b > 0 for a, b in readings)
    return Point(
        batch=batch,
        context=context,
        step_ms=spread([step(sample) for sample in own.values()]),
        step_ratio=median(step(base[i]) / step(own[i]) for i in shared) if shared else None,
        prefill_tokens_per_s=spread([prefill(sample) for sample in own.values()]),
        prefill_ratio=median(prefill(own[i]) / prefill(base[i]) for i in shared) if shared else None,
        context_ms=spread([reading(sample) for sample in own.values()]),
        context_ratio=median(a / b for a, b in readings) if positive else None,
    )


def spread(values: list[float]) -> Spread:
    """Return median and extremes."""
    return Spread(median(values), min(values), max(values), len(values))
