"""Studies whose steps are not carried out: results of made-up figures, by a stand-in for the executor."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import yaml

from bench.environment import versions
from bench.quality import units
from bench.speed.served_schema import EnergySource, Idle, ServeBenchReport
from bench.speed.served_summary import summarize
from bench.study.folder import Folder, Outcome
from bench.study.inputs import Inputs
from bench.study.plan import parse_plan
from bench.study.steps import build
from tests.bench.result_files import (
    MACHINE,
    configuration,
    eval_document,
    kv_bench_document,
    load,
    loadtest_document,
    point_round,
    served_round,
)

PLAN = {
    "study": "try",
    "hardware": {"cpu": {}},
    "models": {"ref-7m": "ref-7m"},
    "runs": 3,
    "weights": {"w4": {"recipe": "rtn-w4"}},
    "points": [{"weights": ["none", "w4"], "kv": ["auto", "int4_per_head"]}],
    "quality": {"num_windows": 3, "window_tokens": 128, "needle": False},
    "loads": {"short": {"concurrency": [1, 4], "requests": 8}},
}
NOW = "2026-11-28T12:00:00+00:00"


def graph_of(tmp_path, **changes):
    """The graph of the plan above with other values for some keys, None to leave one out."""
    data = {key: value for key, value in (PLAN | changes).items() if value is not None}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(data))
    inputs = Inputs(tmp_path, None, None, tmp_path / "digests.json", tolerant=False)
    return build(parse_plan(data, "plan"), tmp_path, inputs)


def kl_of(step):
    """A divergence that grows with every compression, and differs a little between seeds."""
    compressed = 0.1 if step.determines["weights"].startswith(("compress", "distill")) else 0.0
    coded = 0.02 if step.determines["kv"] != "bf16" else 0.0
    return compressed + coded + 0.001 * (int(step.key[-2:], 16) % 7) * bool(compressed)


def write_result(step, folder, accuracy=None):
    """Write what a step's command would, with figures that follow from what the step is.

    ``accuracy`` gives the answers to arc_easy's questions, or by task those to each one's.
    """
    out = folder.result(step.key)
    out.mkdir(parents=True, exist_ok=True)
    if step.kind in ("distill", "compress"):
        (out / "config.json").write_text("{}")
    elif step.kind in ("quality", "tasks"):
        accuracy = accuracy if step.kind == "tasks" else None
        kl = kl_of(step)
        coded, compressed = step.determines["kv"] != "bf16", step.determines["weights"].startswith("compress")
        base = configuration()
        tested = configuration(
            step.determines["kv"] if coded else "auto",
            4 if coded else 16,
            kl or 0.01,
            weight_bits=4.5 if compressed else 16,
        )
        both = [base] if step.determines["kv"] == "bf16" and not compressed else [base, tested]
        found = {}
        for one in both:
            loss = 0.0 if one is base else kl
            found[one.name] = {"nll": {f"t/{i}": 3 + 0.1 * i + loss for i in range(6)}}
            if one is not base:
                found[one.name] |= {"kl": {f"t/{i}": kl * (1 + 0.05 * i) for i in range(6)}}
            if accuracy is not None:
                answers = accuracy(step, one is base)
                of_tasks = answers if isinstance(next(iter(answers.values())), dict) else {"arc_easy": answers}
                found[one.name] |= {f"{task}/acc": units for task, units in of_tasks.items()}
        if accuracy is not None:
            from bench.quality.schema import TaskResult
            from bench.statistics import mean_estimate

            def with_task(one):
                tasks = []
                for key, units in found[one.name].items():
                    if key.endswith("/acc"):
                        value = mean_estimate(list(units.values()))
                        name = key.removesuffix("/acc")
                        tasks.append(TaskResult(name, "acc", "more", len(units), value, None, None, None, None, 1.0))
                return replace(one, tasks=tasks)

            both = [with_task(one) for one in both]
        (out / "eval.json").write_text(json.dumps(eval_document(*both)))
        (out / "units.json").write_text(json.dumps({"schema": units.SCHEMA, "configurations": found}))
    elif step.kind == "load":
        faster = 1.5 if step.determines["kv"] != "bf16" else 1.0
        rate = 100 * faster + step.determines["seed"]
        (out / "summary.json").write_text(json.dumps(loadtest_document("x", rates=(rate, 4 * rate))))
    elif step.kind == "served":
        (out / "serve-bench.json").write_text(json.dumps(served_document(step)))
    else:
        document = kv_bench_document(auto=0.01, int4_per_head=0.005)
        (out / "kv-bench.json").write_text(json.dumps(document))


def served_document(step):
    """Two loads of each dtype; codes need half of the energy, and every seed differs by a little."""
    rounds = {}
    for dtype in step.determines["kv"]:
        factor = (0.5 if dtype != "auto" else 1.0) * (1 + 0.01 * step.determines["seed"])
        points = [
            point_round(load(2.0, 1000, 10, 10, [300.0 * factor]), load(4.0, 500, 210, 10, [700.0 * factor]), batch)
            for batch in (1, 8)
        ]
        bits = 4 if dtype != "auto" else 16
        rounds[dtype] = {0: asdict(served_round(*points, idle=Idle(50.0, 5.0), dtype=dtype, bits=bits))}
    dtypes = summarize(SimpleNamespace(names=list(rounds), of=rounds.__getitem__, errors={}))
    source = EnergySource("board", ["a board"], 0.02, None)
    return ServeBenchReport("complete", NOW, "ref-7m", None, "auto", {}, MACHINE, source, dtypes).to_dict()


class Pretended:
    """An executor that writes results at once; ``broken`` says why a step fails, for those that do."""

    def __init__(self, folder, broken=lambda step: "", accuracy=None):
        self.folder, self.broken, self.accuracy = folder, broken, accuracy
        self.waiting, self.done, self.closed = [], [], False

    def submit(self, step):
        assert all((self.folder.result(key)).is_dir() for key in step.after)
        self.waiting.append(step)

    def running(self):
        return self.waiting[:1]

    def ended(self, wait_s):
        if not self.waiting:
            return []
        step = self.waiting.pop(0)
        self.done.append(step.name)
        error = self.broken(step)
        if not error:
            write_result(step, self.folder, self.accuracy)
        outcome = Outcome("failed" if error else "done", error, NOW, 5.0, {"versions": versions()})
        self.folder.finish(step.key, outcome)
        return [(step, outcome)]

    def close(self):
        self.closed = True


def folder_of(tmp_path):
    return Folder(Path(tmp_path) / "out")
