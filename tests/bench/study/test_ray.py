"""Steps over a Ray cluster of two nodes of this machine, which stand for two machines; only where Ray is installed."""

import io
import os
import time

import pytest
from rich.console import Console

from bench.study.executors.ray import RayExecutor
from bench.study.run import look, run
from bench.study.step import Step
from kv_cache.errors import ParetoError
from tests.bench.study.studies import folder_of, graph_of

ray = pytest.importorskip("ray")
# Ray takes 127.0.0.1 to mean this machine's address in its network; of the rest of the loopback it makes nothing else.
LOOPBACK = "127.0.0.2"
HARDWARE = {"one": {"resources": {"one": 1}}, "two": {"resources": {"two": 1}}}


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of one core, each with a resource that the other lacks; torn down afterwards."""
    from ray.cluster_utils import Cluster

    # The workers import what this process imports.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"one": 1}, "node_ip_address": LOOPBACK}
    )
    made.add_node(num_cpus=1, resources={"two": 1}, node_ip_address=LOOPBACK)
    yield made
    ray.shutdown()
    made.shutdown()


def compression(label, *words, after=()):
    flags = ("--recipe=rtn-w4", "--no-kv-scales", "--out={out}", *words)
    return Step(
        f"compress-{label}", "compress", f"compress for {label}", ("compress", "ref-7m", *flags), after=after,
        hardware=label, resources=HARDWARE.get(label, {}).get("resources", {}),
    )  # fmt: skip


def test_steps_go_to_the_machines_that_have_what_they_ask_for(cluster, tmp_path):
    folder = folder_of(tmp_path)
    graph = graph_of(tmp_path)
    steps = [
        compression("one"),
        compression("two", "--bits=3"),
        compression("broken", "--bits=77"),
        compression("after", after=("compress-broken",)),
    ]
    graph.steps = {step.key: step for step in steps}
    executor = RayExecutor(folder, cluster.address)
    progress = look(graph, folder, ["one", "two", "broken", "after"])
    run(progress, executor, Console(file=io.StringIO()))
    states = [progress.states[step.key] for step in steps]
    assert [state.status for state in states] == ["done", "done", "failed", "skipped"], states
    assert "bits" in states[2].reason
    for label in ("one", "two"):
        assert (folder.result(f"compress-{label}") / "model.safetensors").is_file()
    # They ran beside each other.
    first, second = (folder.recorded(f"compress-{label}") for label in ("one", "two"))
    assert first.seconds > 0
    assert second.seconds > 0


def test_what_no_machine_has_is_said_at_once_and_a_stop_leaves_nothing(cluster, tmp_path):
    folder = folder_of(tmp_path)
    executor = RayExecutor(folder, cluster.address)
    nowhere = Step("load-1", "load", "l", ("loadtest",), gpus=1)
    folder.prepare(nowhere)
    executor.submit(nowhere)
    ((step, outcome),) = executor.ended(10)
    assert step is nowhere
    assert outcome.error.startswith("no machine of the cluster has GPU 1; all together have CPU 2")
    slow = compression("one", "--num-calibration-samples=64")
    folder.prepare(slow)
    executor.submit(slow)
    for _ in range(300):
        if (folder.of(slow.key) / "log.txt").exists():
            break
        time.sleep(0.1)
    assert executor.running() == [slow]
    executor.close()
    assert folder.outcome(slow) is None
    assert not folder.result(slow.key).exists()


def test_a_cluster_that_is_not_there_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **options: (_ for _ in ()).throw(ConnectionError("could not find\nany")))
    with pytest.raises(ParetoError, match=r"--ray-address auto: no cluster there .could not find any."):
        RayExecutor(folder_of(tmp_path), "auto")
