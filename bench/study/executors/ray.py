"""Spreads steps over the GPUs and machines of a Ray cluster; OUT, models and data must be seen by every machine.

Ray is imported here and nowhere else: only ``--executor ray`` needs it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from bench.study.executors.local import ended, performing
from bench.study.folder import Folder, Outcome
from bench.study.step import Step
from kv_cache.errors import ParetoError

LOOPBACK = "127.0.0.1"


def perform(out: str, step: Step) -> Outcome:
    """Do a step on the machine that Ray chose, in a process of its own that ends when Ray cancels the task.

    Args:
        out: the study's folder, as every machine sees it.
        step: what to do.

    """
    folder = Folder(Path(out))
    if not (folder.of(step.key) / "step.json").is_file():
        return Outcome(
            "failed", f"{out} of the study is not seen on this machine; OUT must be on shared storage", "", 0.0
        )
    with performing(folder, step) as process:
        # A wait without an end would not see that Ray wants this task to stop.
        while (status := process.poll()) is None:
            time.sleep(0.2)
    return ended(folder, step, status)


class RayExecutor:
    """Hands every step to Ray with the GPUs, cores and resources that its hardware label names.

    Args:
        folder: of the study.
        address: of a running cluster, ``auto`` to find it; None starts one of this machine alone, on loopback.

    Raises:
        ParetoError: Ray is not installed, or the cluster cannot be reached.

    """

    def __init__(self, folder: Folder, address: str | None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ParetoError("--executor ray needs Ray: pip install 'vllm-pareto[ray]'") from error
        self.ray: Any = ray
        self.folder = folder
        # What this process imports is what the workers are to import, from a checkout too.
        variables = {name: os.environ[name] for name in ("PYTHONPATH", "PARETO_CACHE") if name in os.environ}
        options: dict[str, Any] = {"runtime_env": {"env_vars": variables}, "log_to_driver": False}
        if address is None:
            options |= {"_node_ip_address": LOOPBACK, "include_dashboard": False}
        else:
            options["address"] = address
            host = address.rpartition(":")[0]
            if host.startswith("127."):
                # Else Ray looks for a node of the cluster at this machine's address in its network.
                options["_node_ip_address"] = host
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ParetoError(
                f"--ray-address {address}: no cluster there ({' '.join(str(error).split())[:200]})"
            ) from error
        self._tasks: dict[Any, Step] = {}

    def submit(self, step: Step) -> None:
        """Take a step whose dependencies are done."""
        need = {"CPU": step.cpus, "GPU": float(step.gpus), **step.resources}
        total = self.ray.cluster_resources()
        lacking = [name for name, count in need.items() if count > total.get(name, 0)]
        if lacking:
            # Ray would wait forever for a machine that may yet come.
            has = ", ".join(
                f"{name} {count:g}" for name, count in sorted(total.items()) if not name.startswith("node:")
            )
            wanted = ", ".join(f"{name} {need[name]:g}" for name in lacking)
            outcome = Outcome("failed", f"no machine of the cluster has {wanted}; all together have {has}", "", 0.0)
            self._tasks[self.ray.put(outcome)] = step
            return
        remote = self.ray.remote(perform).options(
            num_cpus=step.cpus, num_gpus=step.gpus, resources=step.resources or None, max_retries=0, name=step.name
        )
        self._tasks[remote.remote(str(self.folder.out.resolve()), step)] = step

    def running(self) -> list[Step]:
        """Return the steps that are being done now, as their folders show it."""
        return [step for step in self._tasks.values() if (self.folder.of(step.key) / "errors.txt").exists()]

    def ended(self, wait_s: float) -> list[tuple[Step, Outcome]]:
        """Return the steps that ended meanwhile, after waiting at most so long for one."""
        if not self._tasks:
            return []
        ready, _ = self.ray.wait(list(self._tasks), num_returns=1, timeout=wait_s)
        made = []
        for reference in ready:
            step = self._tasks.pop(reference)
            try:
                outcome = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                outcome = Outcome("failed", f"Ray lost the step: {' '.join(str(error).split())[:300]}", "", 0.0)
            made.append((step, outcome))
        return made

    def close(self) -> None:
        """Interrupt what runs, as Ctrl-C does, and leave the cluster."""
        for reference in self._tasks:
            self.ray.cancel(reference, force=False)
        if self._tasks:
            self.ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=30)
        self._tasks = {}
        self.ray.shutdown()
