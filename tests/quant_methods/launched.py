"""A command of ours in two processes of accelerate's launcher."""

import os
import subprocess
import sys

import pytest
import torch

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.long),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")],
    ),
]


def in_two_processes(device: str, *words: object) -> str:
    """Run ``pareto WORDS`` in two processes, on a device each; return what it printed."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu" if device == "cpu" else "--multi_gpu"]
    command = [*launcher, "-m", "vllm_ext.cli", *map(str, words), "--device", device]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
