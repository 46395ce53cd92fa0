"""Runs an evaluation: one engine at a time, every finished window and retrieval cell kept.

The baseline's logits and figures lie in the user's cache, keyed by model and settings, and serve every later evaluation
against the same baseline; a tested configuration's figures lie in ``OUT/.work``. An interrupted run goes on where it
stopped, and a configuration whose figures are all there starts no engine. Evaluations that run at the same time measure
what they have in common one after the other.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import engine
from bench.environment import environment
from bench.files import replacing, write_arrays, write_json
from bench.quality import units
from bench.quality.measure import Window, ask_trials, measure_windows, text_quality
from bench.quality.needle import is_correct
from bench.quality.needle import summarize as summarize_needle
from bench.quality.plan import Configuration, Plan
from bench.quality.schema import ConfigurationResult, EvalReport, FailedConfiguration, TaskResult
from bench.quality.store import Arrays, Store
from bench.quality.tasks.figures import adjusted, task_results
from bench.quality.tasks.run import Chosen, Scores, ask, choose, scratch
from kv_cache.errors import ParetoError
from kv_cache.terminal import console as plain_console
from kv_cache.user_cache import cache_dir, is_being_made, limit_bytes, making, trim, using
from quant_methods.progress import Lines

RESULT = "eval.json"


class Evaluation:
    """One run of ``pareto eval``.

    Args:
        plan: what to measure.
        out: folder of the result.
        console: where progress goes.

    """

    def __init__(self, plan: Plan, out: Path, console: Console | None = None) -> None:
        self.plan, self.out = plan, out
        self.console = console or plain_console(stderr=True)
        self.windows = [(text.name, window.tolist()) for text in plan.texts for window in text.windows]
        self.environment = environment()
        self.base_store = Store(cache_dir() / "baselines" / plan.configurations[0].key)
        self.tasks: Chosen | None = None

    def store(self, configuration: Configuration) -> Store:
        """Return where a configuration's pieces lie."""
        return self.base_store if configuration.is_baseline else Store(self.out / ".work" / configuration.key)

    def run(self) -> EvalReport:
        """Measure everything that is missing; ``eval.json`` is rewritten after each configuration.

        A configuration that fails is recorded with its reason and the others are measured; the next run tries it again.

        Raises:
            ParetoError: the baseline cannot be measured, without which nothing else can be, or the disk is full.

        """
        limit_bytes()  # A limit that is no number is said before the work, not after it.
        results: list[ConfigurationResult] = []
        failed: list[FailedConfiguration] = []
        with using(self.base_store.folder), self._chosen_tasks():
            for configuration in self.plan.configurations:
                try:
                    self._measure_alone(configuration)
                    results.append(self._result(configuration))
                # vLLM raises bare exceptions for what happens in a worker.
                except Exception as error:
                    if configuration.is_baseline:
                        raise ParetoError(engine.reason(error)) from error
                    failed.append(_failure(configuration, error))
                    print(f"{configuration.name} failed: {failed[-1].error}", file=sys.stderr, flush=True)
                done = len(results) + len(failed) == len(self.plan.configurations)
                report = self._report("complete" if done else "partial", results, failed)
                write_json(self.out / RESULT, report.to_dict())
            self._write_units(results)
        return report

    def _write_units(self, results: Sequence[ConfigurationResult]) -> None:
        """Write what each window, needle and question gave, by which other comparisons than this one's are made."""
        found, shared = {}, {}
        for configuration in self.plan.configurations:
            if any(result.name == configuration.name for result in results):
                store = self.store(configuration)
                windows = [
                    (f"{name}/{i}", self._arrays(store, i, configuration.is_baseline))
                    for i, (name, _) in enumerate(self.windows)
                ]
                found[configuration.name] = units.of(
                    windows, self.plan.trials, store.answers(), self._scores(store) if self.tasks else [],
                    self.tasks.groups if self.tasks else {},
                )  # fmt: skip
                if self.tasks:
                    shared[configuration.name] = units.documents(self._scores(store), self.tasks.groups)
        write_json(self.out / units.RESULT, {"schema": units.SCHEMA, "configurations": found, "documents": shared})

    @contextlib.contextmanager
    def _chosen_tasks(self) -> Iterator[None]:
        """Find the tasks, before any engine starts."""
        if not self.plan.settings.tasks.tasks:
            yield
            return
        with scratch() as folder:
            tokenizer = self.plan.configurations[0].checkpoint.folder
            self.tasks = choose(self.plan.settings.tasks, tokenizer, Path(folder))
            yield

    def _measure_alone(self, configuration: Configuration) -> None:
        """Measure while no other evaluation measures the same: it would write over the answers of this one."""
        folder = self.store(configuration).folder
        if is_being_made(folder):
            print(f"{configuration.name}: waiting for another evaluation of the same", file=sys.stderr, flush=True)
        with making(folder):
            if configuration.is_baseline:
                self._check_disk()
            self._measure(configuration)
            self._ask_tasks(configuration)
        if configuration.is_baseline:
            for entry in trim():
                print(f"the cache was above its limit: removed {entry.path}", file=sys.stderr, flush=True)

    def _check_disk(self) -> None:
        missing = [i for i in range(len(self.windows)) if self.base_store.window(i, True) is None]
        # Four bytes: a head may compute in float32.
        needed = sum((len(self.windows[i][1]) - 1) * self.plan.vocabulary * 4 for i in missing)
        self.base_store.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.base_store.folder).free
        if needed > free:
            raise ParetoError(
                f"the baseline's logits may need {needed / 1e9:.1f} GB under {self.base_store.folder.parent} and "
                f"{free / 1e9:.1f} GB are free; lower --num-windows or point PARETO_CACHE to a larger disk"
            )

    def _measure(self, configuration: Configuration) -> None:
        store, trials = self.store(configuration), self.plan.trials
        windows = [i for i in range(len(self.windows)) if store.window(i, configuration.is_baseline) is None]
        answered = store.answers()
        pending = [i for i in range(len(trials)) if i not in answered]
        if not windows and not pending and (store.kv_cache() is not None or self._missing_tasks(store)):
            return
        with self._progress(configuration.name, len(windows) + len(pending)) as advance:
            settings, began = self.plan.engine_settings(configuration), time.monotonic()
            with engine.running(settings) as llm:
                started = time.monotonic()
                write_json(store.folder / "kv_cache.json", asdict(engine.kv_cache(llm, settings)))
                together = self.plan.windows_at_once
                for start in range(0, len(windows), together):
                    group = windows[start : start + together]
                    self._windows(llm, configuration, store, group)
                    advance(len(group))
                # Those of one length together: none waits for another.
                pending.sort(key=lambda i: trials[i].length)
                for start in range(0, len(pending), self.plan.prompts_at_once):
                    group = pending[start : start + self.plan.prompts_at_once]
                    store.add_answers(ask_trials(llm, [trials[i] for i in group], group, self._chunk))
                    advance(len(group))
                took = f"started in {started - began:.1f} s, measured in {time.monotonic() - started:.1f} s"
                print(f"{configuration.name}: {took}", file=sys.stderr, flush=True)

    @property
    def _chunk(self) -> int | None:
        return self.plan.settings.chunk_tokens if self.plan.shared_steps else None

    def _windows(self, llm: Any, configuration: Configuration, store: Store, indices: Sequence[int]) -> None:
        with contextlib.ExitStack() as written:
            asked: list[Window] = []
            for index in indices:
                partial = compare = None
                if configuration.is_baseline:
                    partial = str(written.enter_context(replacing(store.logits_file(index))))
                else:
                    base = self.base_store.window(index, True)
                    if base is None:
                        raise ParetoError(f"the baseline's logits under {self.base_store.folder} are gone; run again")
                    compare = [str(self.base_store.logits_file(index)), str(base["dtype"])]
                asked.append((self.windows[index][1], partial, compare))
            figures = measure_windows(llm, asked, self._chunk)
            self._check_chunks(max(one["max_chunk"] for one in figures))
        for index, one in zip(indices, figures, strict=True):
            arrays = {
                "nll": np.array(one["nll"], np.float32),
                "kl": np.array(one["kl"], np.float32),
                "top1": np.array(one["top1"], bool),
                "max_chunk": np.array(one["max_chunk"]),
                "dtype": np.array(one["dtype"]),
            }
            write_arrays(store.window_file(index), arrays)

    def _missing_tasks(self, store: Store) -> list[str]:
        settings = self.tasks.settings if self.tasks else {}
        return [name for name, one in settings.items() if store.scores(name, one) is None]

    def _ask_tasks(self, configuration: Configuration) -> None:
        """Ask the tasks whose scores are missing."""
        store = self.store(configuration)
        missing = self._missing_tasks(store)
        if self.tasks is None or not missing:
            return
        with self._progress(f"{configuration.name}, tasks", len(missing)) as advance:
            running = self.plan.task_engine_settings(configuration)
            with engine.running(running) as llm:
                cache = engine.kv_cache(llm, running)
                if store.kv_cache() is None:
                    write_json(store.folder / "kv_cache.json", asdict(cache))
                for name in missing:
                    task, settings = self.tasks.tasks[name], self.tasks.settings[name]
                    say = functools.partial(print, file=sys.stderr, flush=True)
                    began = time.monotonic()
                    with Lines(f"{configuration.name}: {name}", say) as lines:
                        scores = ask(llm, task, settings, engine.on_gpu(llm), cache.tokens, lines.note)
                    store.add_scores(name, settings, scores)
                    say(f"{configuration.name}: {name}: {time.monotonic() - began:.1f} s")
                    advance(1)

    def _task_results(self, configuration: Configuration) -> list[TaskResult]:
        if self.tasks is None:
            return []
        tested = self._scores(self.store(configuration))
        base = None if configuration.is_baseline else self._scores(self.base_store)
        return task_results(tested, base, self.tasks.groups, self.plan.settings.margin)

    def _scores(self, store: Store) -> list[Scores]:
        found = [store.scores(*one) for one in self.tasks.settings.items()] if self.tasks else []
        if any(one is None for one in found):
            raise ParetoError(f"{store.folder} was changed while the evaluation ran; run again")
        return [score for one in found for score in one or []]

    def _check_chunks(self, longest: int) -> None:
        if longest > self.plan.settings.chunk_tokens:
            raise RuntimeError(
                f"the engine prefilled {longest} tokens at once, more than the {self.plan.settings.chunk_tokens} asked "
                "for: the result would hide the KV cache's error"
            )

    def _result(self, configuration: Configuration) -> ConfigurationResult:
        store = self.store(configuration)
        tested = [self._arrays(store, i, configuration.is_baseline) for i in range(len(self.windows))]
        base = [self._arrays(self.base_store, i, True) for i in range(len(self.windows))]
        texts = []
        for text in self.plan.texts:
            chosen = [i for i, (name, _) in enumerate(self.windows) if name == text.name]
            reference = None if configuration.is_baseline else [base[i] for i in chosen]
            texts.append(text_quality(text.name, [tested[i] for i in chosen], reference))
        overall = text_quality("all", tested, None if configuration.is_baseline else base) if tested else None
        answers = store.answers()
        trials = self.plan.trials
        needle = None
        if any(index not in answers for index in range(len(trials))):
            raise ParetoError(f"{store.folder} was changed while the evaluation ran; run again")
        if trials:
            needle = summarize_needle(trials, [is_correct(t, answers[i]) for i, t in enumerate(trials)])
        cache = store.kv_cache()
        if cache is None:
            raise ParetoError(f"{store.folder} was changed while the evaluation ran; run again")
        return ConfigurationResult(
            name=configuration.name,
            is_baseline=configuration.is_baseline,
            model=configuration.checkpoint.info,
            kv_cache=cache,
            texts=texts,
            overall=overall,
            needle=needle,
            max_chunk_tokens=max((int(a["max_chunk"]) for a in tested), default=0),
            tasks=self._task_results(configuration),
        )

    @staticmethod
    def _arrays(store: Store, index: int, baseline: bool) -> Arrays:
        arrays = store.window(index, baseline)
        if arrays is None:
            raise ParetoError(f"{store.folder} was changed while the evaluation ran; run again")
        return arrays

    def _report(self, status: str, results: list[ConfigurationResult], failed: list[FailedConfiguration]) -> EvalReport:
        settings = asdict(self.plan.settings) | {
            "max_model_len": self.plan.max_model_len,
            "kv_cache_memory_bytes": self.plan.kv_cache_memory_bytes,
        }
        parts = [name for tasks in self.tasks.groups.values() for name in tasks] if self.tasks else []
        return EvalReport(
            status=status,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            settings=settings,
            environment=self.environment,
            configurations=adjusted(results, parts),
            failed=failed,
        )

    @contextlib.contextmanager
    def _progress(self, name: str, total: int) -> Iterator[Any]:
        if not self.console.is_terminal:
            print(f"{name}: starting the engine, {total} pieces to measure", file=sys.stderr, flush=True)
            done = 0

            def say(count: int) -> None:
                nonlocal done
                done += count
                print(f"{name}: {done} of {total}", file=sys.stderr, flush=True)

            yield say
            return
        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=total)
            yield lambda count: progress.advance(task, count)


def _failure(configuration: Configuration, error: Exception) -> FailedConfiguration:
    return FailedConfiguration(
        configuration.name, configuration.checkpoint.info, configuration.kv_cache_dtype, engine.reason(error)
    )
