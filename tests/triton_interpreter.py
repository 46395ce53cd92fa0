"""Tests of Triton kernels where there is no CUDA device."""

import os
import subprocess
import sys


def run_interpreted(file: str) -> str:
    """Run a file of tests in Triton's interpreter and return what pytest printed; a failure of them is one here.

    Triton chooses its interpreter when it is imported, so this takes a process of its own.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-2000:]
    return result.stdout
