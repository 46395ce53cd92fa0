import argparse
import io
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from bench.study import command as study_command
from bench.study import perform as performing
from bench.study.command import run as study
from bench.study.estimate import done_steps, show, similar_seconds
from bench.study.executors import local
from bench.study.executors.local import LocalExecutor
from bench.study.outcome import conclude
from bench.study.run import look, run
from bench.study.step import Step
from kv_cache.errors import ParetoError
from tests.bench.study.studies import NOW, Pretended, folder_of, graph_of


def carried_out(graph, folder, executor):
    progress = look(graph, folder, list(graph.plan.hardware))
    run(progress, executor, Console(file=io.StringIO()))
    return progress


def test_nothing_is_done_twice(tmp_path):
    graph, folder = graph_of(tmp_path), folder_of(tmp_path)
    first = Pretended(folder)
    progress = carried_out(graph, folder, first)
    assert len(first.done) == len(graph.steps) == 23
    assert first.closed
    assert progress.counts() == "23 of 23 steps done"
    again = Pretended(folder)
    carried_out(graph, folder, again)
    assert again.done == []
    # Another plan that shares the folder does only what is new.
    other = graph_of(tmp_path, study="other", runs=4)
    carried_out(other, folder, again)
    assert len(again.done) == len(other.steps) - 23
    # A result that is gone is made again.
    step = next(step for step in graph.steps.values() if step.kind == "load")
    (folder.result(step.key) / "summary.json").unlink()
    carried_out(graph, folder, last := Pretended(folder))
    assert last.done == [step.name]


def test_a_failure_skips_what_needs_it_and_nothing_else(tmp_path):
    graph, folder = graph_of(tmp_path), folder_of(tmp_path)
    fails = "compress ref-7m, w4, seed 1"
    progress = carried_out(graph, folder, Pretended(folder, lambda step: "no memory" if step.name == fails else ""))
    states = {graph.steps[key].name: state for key, state in progress.states.items()}
    assert (states[fails].status, states[fails].reason) == ("failed", "no memory")
    skipped = [name for name, state in states.items() if state.status == "skipped"]
    # Quality and load of two dtypes with that checkpoint.
    assert len(skipped) == 4
    assert states[skipped[0]].reason == f"needs {fails}, which failed"
    assert sum(state.status == "done" for state in states.values()) == 23 - 5
    page = conclude(graph, folder, tmp_path / "plan.yaml", progress)
    text = page.read_text()
    assert "no memory" in text
    assert "2 of at least 3 runs with other seeds" in text
    # The same command tries it again, and what was skipped.
    carried_out(graph, folder, again := Pretended(folder))
    assert len(again.done) == 5


def test_a_terminal_gets_a_table_that_changes(tmp_path):
    graph, folder = graph_of(tmp_path, runs=1), folder_of(tmp_path)
    console = Console(file=io.StringIO(), force_terminal=True, width=160, height=40)
    fails = Pretended(folder, lambda step: "no memory" if step.kind == "compress" else "")
    run(progress := look(graph, folder, ["cpu"]), fails, console)
    shown = console.file.getvalue()
    assert "compress ref-7m, w4: failed: no memory" in shown
    assert "steps done, 1 failed, 4 skipped" in shown
    assert progress.line().startswith("0:0")


def test_hardware_that_is_elsewhere_is_left_out(tmp_path):
    hardware = {"a100": {"gpu": "A100", "gpus": 1}, "l4": {"gpu": "L4", "gpus": 1}}
    graph, folder = graph_of(tmp_path, hardware=hardware, runs=1), folder_of(tmp_path)
    executor = Pretended(folder)
    run(progress := look(graph, folder, ["a100"]), executor, Console(file=io.StringIO()))
    left = {state.reason for state in progress.states.values() if state.status == "skipped"}
    assert left == {"is for l4, which --hardware leaves out"}
    assert not any(name.endswith("on l4") for name in executor.done)
    assert any(name.startswith("quality") for name in executor.done)


def test_kinds_of_steps_can_wait(tmp_path, capsys):
    graph, folder = graph_of(tmp_path, runs=1), folder_of(tmp_path)
    first, second = Pretended(folder), Pretended(folder)
    run(progress := look(graph, folder, ["cpu"], ["compress", "quality"]), first, Console(file=io.StringIO()))
    kinds = {step.name: step.kind for step in graph.steps.values()}
    assert {kinds[name] for name in first.done} == {"compress", "quality"}
    left = {state.reason for state in progress.states.values() if state.status == "skipped"}
    assert left == {"is a load step, which --steps leaves out"}
    show(graph, folder, [], ["cpu"], ["load"])
    loads = sum(kind == "load" for kind in kinds.values())
    assert f"{len(kinds)} steps, {loads} to do" in capsys.readouterr().out
    # Nothing is done twice.
    run(look(graph, folder, ["cpu"]), second, Console(file=io.StringIO()))
    assert {kinds[name] for name in second.done} == {"load"}


def test_what_needs_a_kind_that_waits_says_so(tmp_path):
    graph, folder = graph_of(tmp_path, runs=1), folder_of(tmp_path)
    executor = Pretended(folder)
    run(progress := look(graph, folder, ["cpu"], ["load"]), executor, Console(file=io.StringIO()))
    kinds = {step.name: step.kind for step in graph.steps.values()}
    assert {kinds[name] for name in executor.done} == {"load"}
    reasons = {state.reason for state in progress.states.values() if state.status == "skipped"}
    assert any("needs compress" in reason and "was skipped" in reason for reason in reasons)


def test_estimates_come_from_earlier_steps(tmp_path):
    graph, folder = graph_of(tmp_path), folder_of(tmp_path)
    load = next(step for step in graph.steps.values() if step.kind == "load")
    assert similar_seconds(load, done_steps(folder)) is None
    carried_out(graph, folder, Pretended(folder))
    assert similar_seconds(load, done_steps(folder)) == 5.0


SCRIPT = """
import json, pathlib, signal, sys, time
words = sys.argv[1:]
out = pathlib.Path(next(w for w in words if w.startswith("--out=")).removeprefix("--out="))
out.mkdir(parents=True, exist_ok=True)
print("asked", *words, flush=True)
if "stubborn" in words:
    signal.signal(signal.SIGINT, lambda *_: (time.sleep(3), sys.exit(130)))
if "slow" in words or "stubborn" in words:
    (out / "began").write_text("1")
    time.sleep(60)
if "fails" in words:
    print("pareto eval: error: the model is too large", flush=True)
    print("bye", flush=True)
    sys.exit(2)
if "partly" in words or "wholly" in words:
    points = [{"batch": 1}] if "partly" in words else []
    result = {"status": "complete", "dtypes": [{"points": points}, {"points": [], "error": "no kernel for it"}]}
    (out / "kv-bench.json").write_text(json.dumps(result))
    print("pareto kv-bench: failed: fp8: no kernel for it", flush=True)
    sys.exit(1)
if "dies" in words:
    print("RuntimeError: boom", flush=True)
    sys.exit(1)
if "empty" not in words:
    (out / "eval.json").write_text("{}")
"""


@pytest.fixture
def pareto(tmp_path, monkeypatch):
    """In place of the ``pareto`` command a script that does what its words say."""
    script = tmp_path / "pareto.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(performing, "PARETO", (sys.executable, str(script)))
    return script


def step_of(folder, *words, **others):
    step = Step("quality-1", "quality", "a step", ("eval", *words, "--out={out}"), **others)
    folder.prepare(step)
    return step


def test_a_step_is_done_with_its_real_paths(tmp_path, pareto):
    folder = folder_of(tmp_path)
    step = step_of(folder, "{checkpoint:compress-7}")
    outcome = performing.perform(folder, step.key)
    assert (outcome.status, outcome.error) == ("done", "")
    assert folder.outcome(step) == outcome
    assert outcome.environment["versions"]["python"]
    assert f"asked eval {folder.result('compress-7').resolve()} --out={folder.result(step.key)}" in (
        folder.of(step.key) / "log.txt"
    ).read_text()  # fmt: skip


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("fails", "the model is too large"),
        ("dies", "pareto eval: status 1: RuntimeError: boom"),
        ("empty", "the command ended well and left no eval.json"),
    ],
)
def test_a_failed_step_has_its_reason_in_one_line(tmp_path, pareto, word, reason):
    folder = folder_of(tmp_path)
    step = step_of(folder, word)
    outcome = performing.perform(folder, step.key)
    assert outcome.status == "failed"
    assert outcome.error.startswith(reason)
    assert "\n" not in outcome.error


def test_what_one_dtype_lacks_does_not_cost_the_others_their_figures(tmp_path, pareto):
    folder = folder_of(tmp_path)
    step = Step("speed-1", "speed", "s", ("kv-bench", "partly", "--out={out}"))
    folder.prepare(step)
    outcome = performing.perform(folder, step.key)
    assert (outcome.status, outcome.error) == ("done", "fp8: no kernel for it")
    nothing = Step("speed-2", "speed", "s", ("kv-bench", "wholly", "--out={out}"))
    folder.prepare(nothing)
    assert performing.perform(folder, nothing.key).status == "failed"


def test_another_machine_than_the_plan_says_is_refused(tmp_path, pareto):
    folder = folder_of(tmp_path)
    step = step_of(folder, hardware="big", gpu="H900", gpus=1)
    assert "hardware big of the plan is a H900" in performing.perform(folder, step.key).error


def test_a_whole_checkpoint_without_its_note_is_done(tmp_path, pareto):
    folder = folder_of(tmp_path)
    step = Step("compress-1", "compress", "c", ("compress", "dies", "--out={out}"))
    folder.prepare(step)
    folder.result(step.key).mkdir(parents=True)
    (folder.result(step.key) / "config.json").write_text("{}")
    assert performing.perform(folder, step.key).status == "done"


def wait_for(path):
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


def performer(folder, step, pareto):
    """A process that does a step with the script in place of pareto."""
    code = (
        "import sys; from bench.study import perform; perform.PARETO = (sys.executable, sys.argv.pop()); "
        "sys.exit(perform.main())"
    )
    return (sys.executable, "-c", code, str(folder.out), step.key, str(pareto))


def test_an_interrupted_step_is_not_done_and_leaves_no_process(tmp_path, pareto):
    folder = folder_of(tmp_path)
    step = step_of(folder, "slow")
    process = subprocess.Popen(performer(folder, step, pareto), start_new_session=True)
    wait_for(folder.result(step.key) / "began")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert folder.outcome(step) is None
    found = subprocess.run(["pgrep", "-f", str(pareto)], capture_output=True, text=True, check=False)
    assert found.stdout == ""


@pytest.mark.parametrize("steps", [0, 9])
def test_an_interrupted_study_has_its_page_and_can_be_looked_at(tmp_path, monkeypatch, capsys, steps):
    folder = folder_of(tmp_path)
    graph_of(tmp_path)

    def stop(step):
        if len(executor.done) > steps:
            raise KeyboardInterrupt
        return ""

    executor = Pretended(folder, stop)
    monkeypatch.setattr(study_command, "_executor", lambda args, folder: executor)
    parser = argparse.ArgumentParser()
    study_command.add_arguments(parser)
    args = [str(tmp_path / "plan.yaml"), "--out", str(folder.out)]
    with pytest.raises(KeyboardInterrupt):
        study(parser.parse_args(args))
    assert executor.closed
    assert f"{steps} of 23 steps done\npage of what is done: " in capsys.readouterr().err
    page = folder.plan("try") / "study.html"
    before = page.read_bytes()
    page.unlink()
    assert study(parser.parse_args([*args, "--page-only"])) == 0
    assert page.read_bytes() == before
    assert len(executor.done) == steps + 1
    # A machine with other versions would do the steps anew, and still makes the page of these.
    monkeypatch.setattr("bench.study.steps.versions", lambda: {"torch": "9.9", "vllm-pareto": "9.9"})
    capsys.readouterr()
    assert study(parser.parse_args([*args, "--page-only"])) == 0
    assert f"{steps} of 23 steps done" in capsys.readouterr().out


def test_a_second_signal_leaves_no_command_behind(tmp_path, pareto):
    folder = folder_of(tmp_path)
    step = step_of(folder, "stubborn")
    process = subprocess.Popen(performer(folder, step, pareto), start_new_session=True)
    wait_for(folder.result(step.key) / "began")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.4)
    assert process.wait(timeout=30) == 130
    found = subprocess.run(["pgrep", "-f", str(pareto)], capture_output=True, text=True, check=False)
    assert found.stdout == ""


def test_a_study_that_is_killed_takes_its_step_along(tmp_path, pareto):
    folder = folder_of(tmp_path)
    step = step_of(folder, "slow")
    code = "import subprocess, sys; subprocess.run(sys.argv[1:], start_new_session=True)"
    parent = subprocess.Popen([sys.executable, "-c", code, *performer(folder, step, pareto)])
    wait_for(folder.result(step.key) / "began")
    parent.kill()
    parent.wait()
    for _ in range(100):
        found = subprocess.run(["pgrep", "-f", str(pareto)], capture_output=True, text=True, check=False)
        if not found.stdout:
            return
        time.sleep(0.1)
    raise AssertionError("the step outlived its study")


STAND_IN = f"""
import json, os, sys, time
*wait, out, key = sys.argv[1:]
time.sleep(float(*wait or [0]))
if key == "quality-2":
    sys.exit(print("out of luck", file=sys.stderr) or 7)
place = os.path.join(out, "steps", key)
with open(os.path.join(place, "gpu"), "w") as file:
    file.write(os.environ.get("{local.VISIBLE_GPUS}", "all"))
with open(os.path.join(place, "done.json"), "w") as file:
    json.dump({{"status": "done", "error": "", "started_at": "{NOW}", "seconds": 1.0, "environment": {{}}}}, file)
"""
"""What stands in for a step's process: it notes its GPU and is done, or dies without a word of the study's."""


def test_the_local_executor_does_one_after_the_other(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    monkeypatch.setattr(local, "PERFORM", (sys.executable, "-c", STAND_IN))
    steps = [Step(f"quality-{i}", "quality", f"step {i}", ("eval",)) for i in range(3)]
    executor = LocalExecutor(folder)
    for step in steps:
        folder.prepare(step)
        executor.submit(step)
    ended = []
    while len(ended) < 3:
        assert len(executor.running()) == 1
        ended += executor.ended(5)
    assert [(step.name, outcome.status) for step, outcome in ended] == [
        ("step 0", "done"), ("step 1", "done"), ("step 2", "failed"),
    ]  # fmt: skip
    assert ended[2][1].error == "its process ended with status 7: out of luck"
    executor.close()


@pytest.mark.parametrize(
    ("gpus", "most", "timed"), [([], 3, 1), (["0"], 3, 1), (["0", "GPU-b"], 3, 2)], ids=["none", "one", "two"]
)
def test_steps_that_are_not_timed_run_beside_each_other(tmp_path, monkeypatch, gpus, most, timed):
    folder = folder_of(tmp_path)
    monkeypatch.setattr(local, "PERFORM", (sys.executable, "-c", STAND_IN, "0.3"))
    kinds = ["compress", "quality", "tasks", "tasks", "served", "served", "load"]
    executor = LocalExecutor(folder, 3, gpus)
    for i, kind in enumerate(kinds):
        step = Step(f"{kind}-{i}", kind, f"step {i}", (kind,), gpus=1)
        folder.prepare(step)
        executor.submit(step)
    ended, seen = [], []
    while len(ended) < len(kinds):
        seen.append([step.kind for step in executor.running()])
        ended += executor.ended(5)
    assert {outcome.status for _, outcome in ended} == {"done"}
    untimed = [sum(kind in local.UNTIMED for kind in kinds) for kinds in seen]
    others = [len(kinds) - count for kinds, count in zip(seen, untimed, strict=True)]
    assert (max(untimed), max(others)) == (most, timed)
    assert not any(a and b for a, b in zip(untimed, others, strict=True))
    used = [(folder.of(step.key) / "gpu").read_text() for step, _ in ended]
    assert set(used) == (set(gpus) if len(gpus) > 1 else {os.environ.get(local.VISIBLE_GPUS, "all")})


def test_two_studies_do_not_share_a_folder_at_once(tmp_path):
    folder = folder_of(tmp_path)
    with folder.alone(), pytest.raises(ParetoError, match="is in use by another study"), folder_of(tmp_path).alone():
        pass
    with folder.alone():
        pass


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"plan": None}, "which plan"),
        ({"hardware": ["gpu"]}, "--hardware gpu: the plan has cpu"),
        ({"ray_address": "auto"}, "--ray-address is of --executor ray"),
        ({"jobs": 0}, "--jobs 0: 1 or more"),
        ({"jobs": 2, "executor": "ray"}, "--jobs 2: 1 or more, and of --executor local"),
        ({"verify": "x.tar"}, "--verify takes a pack and no PLAN"),
    ],
)
def test_flags_that_contradict_are_refused(words, line):
    import argparse

    args = {"plan": "smoke", "out": "o", "data": None, "models": None, "dry_run": True, "hardware": None,
            "executor": "local", "jobs": 1, "ray_address": None, "pack": False, "verify": None,
            "steps": ["load"]}  # fmt: skip
    with pytest.raises(ParetoError, match=line):
        study(argparse.Namespace(**(args | words)))
