"""The files of a run, and what is noted about the machine that made them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from loadtest.errors import LoadTestError

RECORDS, SUMMARY, SERVER_METRICS, RUN = "records.jsonl", "summary.json", "server_metrics.jsonl", "run.json"
_PACKAGES = ("vllm-pareto", "locust", "gevent", "geventhttpclient", "numpy", "prometheus-client")


def check_output(out: Path, overwrite: bool) -> list[str]:
    """Return the names of the results in ``out`` that would be replaced.

    Raises:
        LoadTestError: there are some and ``overwrite`` is not given.

    """
    existing = [name for name in (RECORDS, SUMMARY, SERVER_METRICS, RUN) if (out / name).exists()]
    if existing and not overwrite:
        raise LoadTestError(f"--out {out}: {existing[0]} exists; give another directory or --overwrite")
    return existing


def prepare_output(out: Path, overwrite: bool) -> None:
    """Make the directory ``out``, and remove earlier results from it if ``overwrite``.

    Raises:
        LoadTestError: there are results and ``overwrite`` is not given, or the directory cannot be written.

    """
    existing = check_output(out, overwrite)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in existing:
            # An old summary must never be taken for that of a run that was cut short.
            (out / name).unlink()
    except OSError as error:
        raise LoadTestError(f"--out {out}: {error.strerror or error}") from error
    if not os.access(out, os.W_OK):
        raise LoadTestError(f"--out {out}: not writable")


def environment_info() -> dict[str, Any]:
    """Return versions and machine of the load generator."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "packages": versions,
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }
