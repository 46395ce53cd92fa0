"""Speed, memory and energy of KV-cache dtypes at the served endpoint, in rounds that alternate between them.

``pareto serve`` is started, ``pareto loadtest`` measures it, and a :class:`bench.speed.energy.Meter` reads the energy
counter all the while; the load test says afterwards between which moments its requests ran. So latencies, throughput
and energy are those of the same requests.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import TypeAdapter

from bench.engine import cache_of
from bench.environment import environment, gpu_names
from bench.files import write_json
from bench.schema import KVCache
from bench.server import Server, run_pareto, starting
from bench.speed.alternation import Alternation, Sample, identity, say_on_stderr
from bench.speed.endpoint import ask, memory_of, word_tokenizer
from bench.speed.energy import CannotMeasure, Counter, Meter, Window, find_counter
from bench.speed.engine_flags import EngineChoices
from bench.speed.served_schema import EnergySource, Idle, Load, PointRound, Round, ServeBenchReport
from bench.speed.served_summary import summarize
from kv_cache.errors import ParetoError
from loadtest.results.schema import Generator, StageResult, Summary
from quant_methods.model_source import read_config, resolve_model, resolve_shape, weight_bytes

RESULT = "serve-bench.json"
PROBE = "bench.speed.worker_memory.MemoryProbe"
SETTLE_S = 1.0
WARM_UP_TOKENS = 8
SPARE_TOKENS = 8
LEAST_DURATION_S = 1.5
"""A load's window may be a little shorter than asked for, and energy is told of LEAST_WINDOW_S."""
FIRST_ID = 16
"""The first few ids are special tokens in most vocabularies."""


@dataclass(frozen=True, kw_only=True)
class Settings(EngineChoices):
    """The user's choices, as recorded in the result, beside the engine's.

    Attributes:
        model: as given.
        kv_cache_dtypes: the first is the baseline.
        batches: requests in flight.
        contexts: prompt tokens of each.
        output_tokens: of each answer of the generation load.
        duration_s: in which the requests of a load start; those in flight are awaited.
        rounds: how often every dtype is measured.
        idle_s: for how long the idle power is watched before each turn; 0: not at all.
        side_by_side: all servers run at once, and rounds alternate between them; else each is started for its turn.

    """

    model: str
    kv_cache_dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    output_tokens: int
    duration_s: float
    rounds: int
    idle_s: float
    side_by_side: bool


class ServeBench:
    """One run.

    Args:
        settings: what to measure.
        out: folder of the result; measured turns, logs and load tests are kept in ``.work`` there.
        say: called with a line of progress.
        counter: finds the energy counter of so many GPUs, 0: of the processors.

    """

    def __init__(
        self,
        settings: Settings,
        out: Path,
        say: Callable[[str], None] = say_on_stderr,
        counter: Callable[[int], Counter] = find_counter,
    ) -> None:
        self.settings, self.out, self.say = settings, out, say
        self.work = out / ".work"
        dummy = settings.load_format == "dummy"
        self.folder = resolve_shape(settings.model) if dummy else resolve_model(settings.model, quantized=True)
        config = read_config(self.folder)
        text = config.get("text_config") or config
        self.vocabulary = int(text.get("vocab_size") or 1000)
        self.max_model_len = max(settings.contexts) + settings.output_tokens + SPARE_TOKENS
        positions = int(text.get("max_position_embeddings") or 0)
        if positions and self.max_model_len > positions:
            raise ParetoError(
                f"--context {max(settings.contexts)} and --output-tokens {settings.output_tokens} need "
                f"{self.max_model_len} positions and the model's context is {positions}; use a --context of at most "
                f"{positions - settings.output_tokens - SPARE_TOKENS}"
            )
        self.weight_bytes = None if dummy else weight_bytes(self.folder)
        self.identity = identity(self.folder, settings.load_format)
        self.turns = Alternation(
            list(settings.kv_cache_dtypes),
            settings.rounds,
            asdict(settings) | {"model": self.identity, "rounds": None},
            self.work / "serve-bench",
            say,
        )
        self.environment = environment()
        self._counter, self.energy = _source(counter, settings.tensor_parallel_size if gpu_names() else 0)
        if self.energy.missing:
            say(f"energy cannot be measured: {self.energy.missing}")

    def run(self) -> ServeBenchReport:
        """Measure every turn that is missing; the result file is rewritten after each.

        Raises:
            ParetoError: the baseline cannot be measured.

        """

        def keep() -> None:
            write_json(self.out / RESULT, self.report("partial").to_dict())

        s = self.settings
        turns = sum(s.rounds - len(self.turns.of(name)) for name in self.turns.names)
        least = s.idle_s + 2 * len(s.batches) * len(s.contexts) * s.duration_s
        self.say(f"{turns} turns of at least {least:.0f} s each, and the servers' starts")
        with self._servers() as server_of:
            self.turns.run(lambda name, index: self._turn(name, index, server_of), keep)
        report = self.report("complete")
        write_json(self.out / RESULT, report.to_dict())
        return report

    def report(self, status: str) -> ServeBenchReport:
        """Return what has been measured so far."""
        dtypes = summarize(self.turns)
        steps = [r.energy_step_s for dtype in dtypes for r in dtype.rounds if r.energy_step_s is not None]
        return ServeBenchReport(
            status=status,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            model=self.settings.model,
            fingerprint=None if self.settings.load_format == "dummy" else self.identity,
            baseline=self.settings.kv_cache_dtypes[0],
            settings=asdict(self.settings) | {"max_model_len": self.max_model_len},
            environment=self.environment,
            energy=replace(self.energy, resolution_s=median(steps) if steps else None),
            dtypes=dtypes,
        )

    @contextlib.contextmanager
    def _servers(self) -> Iterator[Callable[[str], contextlib.AbstractContextManager[Server]]]:
        """Give a function that gives a dtype's server, one that lives on where all run side by side."""
        if not self.settings.side_by_side:
            yield self._started
            return
        with ExitStack() as stack:
            wanted = [name for name in self.turns.names if self.turns.missing(name)]
            launched = {name: stack.enter_context(self._launched(name)) for name in wanted}
            ready: dict[str, Server | ParetoError] = {}
            for name, start in launched.items():
                self.say(f"starting {name}, {len(ready) + 1} of {len(wanted)} side by side")
                try:
                    ready[name] = start.wait()
                    self._warm_up(name, start.wait())
                except ParetoError as error:
                    ready[name] = error

            @contextlib.contextmanager
            def running(name: str) -> Iterator[Server]:
                server = ready[name]
                if isinstance(server, ParetoError):
                    raise server
                yield server

            yield running

    @contextlib.contextmanager
    def _started(self, name: str) -> Iterator[Server]:
        with self._launched(name) as start:
            server = start.wait()
            self._warm_up(name, server)
            yield server

    def _launched(self, name: str) -> Any:
        # A switch of vLLM's that opens the door to the workers' memory (/collective_rpc); it listens on loopback only.
        variables = {"VLLM_SERVER_DEV_MODE": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "VLLM_NO_USAGE_STATS": "1"}
        # On CPU this variable would override the flag, and dtypes would differ in memory.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        return starting(self._words(name), self.work / f"serve-{name}.log", variables=variables)

    def _words(self, name: str) -> list[str]:
        s = self.settings
        words = [
            str(self.folder), "--kv-cache-dtype", name, "--served-model-name", Path(s.model).name,
            "--max-model-len", str(self.max_model_len), "--max-num-seqs", str(max(s.batches)),
            "--max-num-batched-tokens", str(s.max_num_batched_tokens), "--dtype", s.dtype,
            "--kv-cache-memory-bytes", str(s.kv_cache_memory_bytes), "--gpu-memory-utilization", "0.05",
            "--tensor-parallel-size", str(s.tensor_parallel_size), "--seed", str(s.seed),
            "--load-format", s.load_format, "--worker-extension-cls", PROBE, "--disable-uvicorn-access-log",
            # Both loads send the same prompts, and the second is not to find those of the first.
            "--no-enable-prefix-caching",
        ]  # fmt: skip
        words += ["--enforce-eager"] if s.enforce_eager else []
        words += ["--compilation-config", s.compilation_config] if s.compilation_config else []
        if s.load_format == "dummy" and not (self.folder / "tokenizer_config.json").exists():
            words += ["--tokenizer", str(word_tokenizer(self.work / "tokenizer", self.vocabulary))]
        return words

    def _warm_up(self, name: str, server: Server) -> None:
        """Let kernels be compiled and memory be taken: one request of every user of the largest batch."""
        most = max(self.settings.batches)
        short = replace(self.settings, batches=(most,), output_tokens=WARM_UP_TOKENS)
        flags = ["--requests", str(most), "--no-server-metrics"]
        self._load(short, max(short.contexts), short.output_tokens, flags, server, f"{name}-warm-up")

    def _load(
        self, s: Settings, context: int, output_tokens: int, flags: list[str], server: Server, name: str
    ) -> Summary:
        """Run a load test with one stage for each batch size."""
        folder = self.work / "loads" / name
        words = [
            "loadtest", "--base-url", server.base_url, "--concurrency", *map(str, s.batches),
            "--prompt-tokens", str(context), "--prompt-token-ids", f"{FIRST_ID}:{self.vocabulary}",
            "--output-tokens", str(output_tokens), "--seed", str(s.seed), "--label", name, "--out", str(folder),
            "--overwrite", "--no-progress", *flags,
        ]  # fmt: skip
        run_pareto(words, folder.with_suffix(".log"))
        summary = TypeAdapter(Summary).validate_json((folder / "summary.json").read_text())
        for stage in summary.stages:
            if not stage.requests.ok or stage.throughput is None:
                example = next(iter(stage.failure_examples.values()), "")
                raise ParetoError(f"no request of {stage.concurrency} at once succeeded: {example} (see {folder})")
        return summary

    def _turn(
        self, name: str, index: int, server_of: Callable[[str], contextlib.AbstractContextManager[Server]]
    ) -> Sample:
        s = self.settings
        with server_of(name) as server, ExitStack() as stack:
            meter = None if self._counter is None else stack.enter_context(Meter(self._counter))
            at = time.time()
            idle = self._idle(meter)
            ask(server, "pareto_memory_begin")
            points = []
            for context in s.contexts:
                flags = ["--duration", f"{s.duration_s:g}"]
                loads = []
                for kind, tokens in (("prefill", 1), ("generation", s.output_tokens)):
                    self.say(f"  {context:,} tokens of context, {kind}, {_listed(s.batches)} at once")
                    test = self._load(s, context, tokens, flags, server, f"{name}-{index}-{context}-{kind}")
                    loads.append([_as_load(stage, test.generator, meter, self.energy) for stage in test.stages])
                points += [
                    PointRound(*parts) for parts in zip(s.batches, [context] * len(s.batches), *loads, strict=True)
                ]
            ranks = ask(server, "pareto_memory")
            cache = self._kv_cache(name, ranks, test.server.cache_config)
            step = None if meter is None else meter.resolution_s()
        return asdict(Round(index, at, idle, step, memory_of(ranks, self.weight_bytes), cache, points))

    def _idle(self, meter: Meter | None) -> Idle:
        if meter is None:
            return Idle(None, 0.0, self.energy.missing)
        if not self.settings.idle_s:
            return Idle(None, 0.0, "--idle-seconds 0")
        time.sleep(SETTLE_S)
        begin = time.time()
        time.sleep(self.settings.idle_s)
        window, missing = _window(meter, begin, time.time())
        watts = None if window is None else window.total / window.seconds
        return Idle(watts, self.settings.idle_s, missing)

    def _kv_cache(self, name: str, ranks: list[dict[str, Any]], config: dict[str, str]) -> KVCache:
        s = self.settings
        block = int(config["block_size"])
        tokens = config.get("kv_cache_size_tokens", "None")
        return cache_of(
            dtype=name,
            memory_bytes=sum(rank["kv_cache"] for rank in ranks),
            tokens=int(config["num_gpu_blocks"]) * block if tokens == "None" else int(tokens),
            budget_bytes=s.kv_cache_memory_bytes * s.tensor_parallel_size,
            costs=[rank["token_cost"] for rank in ranks],
            block_size=block,
        )


def _listed(numbers: tuple[int, ...]) -> str:
    return " and ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])]) if len(numbers) > 1 else str(numbers[0])


def _source(find: Callable[[int], Counter], gpus: int) -> tuple[Counter | None, EnergySource]:
    try:
        counter = find(gpus)
    except CannotMeasure as error:
        return None, EnergySource(None, [], None, str(error))
    return counter, EnergySource(counter.name, list(counter.devices), None, None)


def _window(meter: Meter, begin: float, end: float) -> tuple[Window | None, str | None]:
    try:
        return meter.window(begin, end), None
    except CannotMeasure as error:
        return None, str(error)


def _as_load(stage: StageResult, generator: Generator, meter: Meter | None, energy: EnergySource) -> Load:
    """Return what a stage measured, with the energy between its first start and its last end."""
    assert stage.throughput is not None
    assert stage.started_unix_s is not None
    window, missing = None, energy.missing
    if meter is not None:
        window, missing = _window(meter, stage.started_unix_s, stage.started_unix_s + stage.throughput.window_s)
    preempted = stage.server_metrics.get("vllm:num_preemptions_total")
    return Load(
        ok=stage.requests.ok,
        failed=stage.requests.failed,
        window_s=stage.throughput.window_s,
        prompt_tokens=stage.prompt_tokens.total if stage.prompt_tokens else 0,
        output_tokens=stage.output_tokens.total if stage.output_tokens else 0,
        preemptions=None if preempted is None else int(preempted.delta),
        ttft_ms=stage.latency.ttft_ms,
        tpot_ms=stage.latency.tpot_ms,
        e2e_ms=stage.latency.e2e_ms,
        generator_lag_ms=generator.loop_lag_ms.p99 if generator.loop_lag_ms else None,
        joules=None if window is None else window.joules,
        missing=missing,
    )
