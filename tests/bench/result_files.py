"""Small result documents of every kind, built from the schemas."""

import hashlib
from dataclasses import asdict
from types import SimpleNamespace

from bench.quality.schema import ConfigurationResult, EvalReport, Needle, NeedleCell, TextQuality
from bench.schema import KVCache, ModelInfo
from bench.speed.kv_bench import Settings, summarize
from bench.speed.schema import KVBenchReport
from bench.speed.served_schema import EnergySource, Idle, Load, Memory, PointRound, Round, ServeBenchReport
from bench.speed.served_summary import summarize as summarize_served
from bench.statistics import exp_estimate, mean_estimate, proportion
from loadtest.results.schema import (
    Distribution,
    Generator,
    Latency,
    RequestCounts,
    Server,
    StageResult,
    Summary,
    Throughput,
)

MACHINE = {"versions": {"python": "3.11"}, "machine": {"cpu": "test"}, "commit": "abc"}


def kv_cache(dtype, bits):
    per_token = 6 * 2 * 64 * 2 * bits / 8
    return KVCache(dtype, 1 << 30, int((1 << 30) / per_token), 1 << 30, per_token, bits, 128)


def configuration(dtype="auto", bits=16, kl=None, needle=1.0, model="ref-7m", weight_bits=16.0):
    base = kl is None
    text = TextQuality(
        "words.txt", 3, 300, mean_estimate([3.0, 3.1, 3.2]), exp_estimate(mean_estimate([3.0, 3.1, 3.2])),
        None if base else exp_estimate(mean_estimate([kl / 2] * 3), -1.0),
        None if base else mean_estimate([kl * 0.9, kl, kl * 1.1]), None if base else kl * 10,
        None if base else mean_estimate([0.9, 0.91, 0.92]),
    )  # fmt: skip
    cells = [NeedleCell(n, d, proportion(round(4 * needle), 4)) for n in (2048, 8192) for d in (0.0, 0.5)]
    fingerprint = hashlib.sha256(f"{model} {weight_bits}".encode()).hexdigest()
    info = ModelInfo(model, fingerprint, int(6_800_000 * weight_bits / 8), 6_800_000, weight_bits, None)
    kv = "bf16" if dtype == "auto" else dtype
    return ConfigurationResult(
        f"{model}, {kv} KV", base, info, kv_cache(dtype, bits), [text], text,
        Needle(proportion(round(16 * needle), 16), cells), 64,
    )  # fmt: skip


def eval_document(*configurations):
    return EvalReport(
        "complete", "2026-11-21T10:00:00+00:00", {"model": "ref-7m"}, MACHINE, list(configurations)
    ).to_dict()


def distribution(middle):
    return Distribution(40, middle, 1.0, middle / 2, middle, middle * 1.2, middle * 1.3, middle * 1.5, middle * 2)


def stage(index, concurrency, ttft, rate):
    latency = Latency(distribution(ttft), distribution(ttft / 5), None, None, None)
    return StageResult(
        index, "closed", concurrency, None, None, None, None, None, True, RequestCounts(40, 40, 0, 0, 0, 0), {}, {},
        latency, Throughput(10.0, rate / 20, rate, rate * 2, rate / 20, 1.0), None, None, None, None, {}, {}, [],
    )  # fmt: skip


def loadtest_document(label, model="ref-7m", dtype="auto", ttft=50.0, rates=(100.0, 400.0)):
    return Summary(
        label, "complete", "2026-11-21T11:00:00+00:00", 10.0, {}, {"python": "3.11", "system": "Linux"},
        Server("http://127.0.0.1:8000", model, [model], None, True, {"cache_dtype": dtype}), {},
        [stage(i, 4**i, ttft * (i + 1), rate) for i, rate in enumerate(rates)], Generator(None, 1.0), {},
    ).to_dict()  # fmt: skip


def kv_bench_document(fingerprint=None, **step_s):
    """Return a document of one round from decode seconds by dtype, the first the baseline."""
    settings = Settings(
        model="ref-7m", kv_cache_dtypes=tuple(step_s), shapes=((8, 4096),), rounds=1, steps=64,
        max_num_batched_tokens=2048, dtype="auto", kv_cache_memory_bytes=1 << 30, enforce_eager=True,
        tensor_parallel_size=1, seed=0,
    )  # fmt: skip
    samples = {
        f"0 {dtype}": {
            "kv_cache": asdict(kv_cache(dtype, 16 if dtype == "auto" else 4)),
            "points": {"8x16": {"step_s": 0.001, "prefill_s": 0.01}, "8x4096": {"step_s": s, "prefill_s": 10.0}},
        }
        for dtype, s in step_s.items()
    }
    return KVBenchReport(
        "complete", "2026-11-21T12:00:00+00:00", "ref-7m", next(iter(step_s)), asdict(settings), MACHINE,
        summarize(settings, samples, {}, {} if fingerprint is None else {"ref-7m": fingerprint}),
    ).to_dict()  # fmt: skip


def load(window_s, prompt_tokens, output_tokens, ok, joules, missing=None, failed=0, lag_ms=1.0):
    times = [distribution(middle) for middle in (50.0, 10.0, 400.0)]
    return Load(ok, failed, window_s, prompt_tokens, output_tokens, 0, *times, lag_ms, joules, missing)


def point_round(prefill, generation, batch=8, context=2048):
    return PointRound(batch, context, prefill, generation)


def served_round(*points, idle=Idle(50.0, 5.0), dtype="auto", bits=16):  # noqa: B008, Idle is frozen
    memory = Memory(13_600_000, 1 << 30, 1 << 20, 1 << 21, (1 << 30) + (1 << 24), None)
    return Round(0, 0.0, idle, 0.02, memory, kv_cache(dtype, bits), list(points))


def turns(**rounds):
    """Return what was measured in a serve-bench, by dtype, as it keeps it."""
    own = {name: dict(enumerate(asdict(r) for r in measured)) for name, measured in rounds.items()}
    return SimpleNamespace(names=list(rounds), of=own.__getitem__, errors={})


def serve_bench_document(fingerprint=None, **joules):
    """Return a document of one round from the generation load's joules by dtype, the first the baseline."""
    rounds = {}
    for dtype, total in joules.items():
        generation = load(
            4.0, 500, 210, 10, None if total is None else [total], "no counter" if total is None else None
        )
        few = point_round(load(2.0, 1000, 10, 10, [300.0]), generation, batch=1)
        many = point_round(load(2.0, 1000, 10, 10, [300.0]), load(2.0, 500, 2100, 100, generation.joules), batch=8)
        rounds[dtype] = [served_round(few, many, dtype=dtype, bits=16 if dtype == "auto" else 4)]
    return ServeBenchReport(
        "complete", "2026-11-28T12:00:00+00:00", "ref-7m", fingerprint, next(iter(joules)), {"output_tokens": 21},
        MACHINE, EnergySource("NVML", ["H100"], 0.1, None), summarize_served(turns(**rounds)),
    ).to_dict()  # fmt: skip
