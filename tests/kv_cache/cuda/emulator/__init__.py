"""Runs the CUDA kernels' own source on a CPU, one fiber for each thread: for their logic, not their speed or races."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kv_cache.cuda import decode, read, store
from kv_cache.cuda.launch import SOURCES
from kv_cache.cuda.runtime import nvrtc

HERE = Path(__file__).parent
PROCESSORS, SHARED_BYTES = 3, 227 << 10
DEVICE = torch.device("cpu")


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="emulated-kernels-"))


@functools.cache
def _compiled(source: str, name: str, macros: tuple[tuple[str, int], ...], folder: Path) -> ctypes.CDLL:
    target = _folder() / f"{name}-{abs(hash((source, macros)))}.so"
    command = [
        "g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-DEMULATED",
        f"-I{HERE}", f"-I{nvrtc.HEADERS}", f"-I{folder}", f'-DKERNEL_SOURCE="{source}"', f"-DKERNEL={name}",
        *(f"-D{key}={value}" for key, value in macros), str(HERE / "emulator.cpp"), "-o", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return ctypes.CDLL(str(target))


class EmulatedKernel:
    """In place of :class:`kv_cache.cuda.runtime.launch.Kernel`."""

    def __init__(self, source, name, macros, device, shared_bytes=0, one_block=False, folder=SOURCES):
        assert shared_bytes <= SHARED_BYTES
        self.library = _compiled(source, name, tuple(macros), folder)

    def blocks_per_multiprocessor(self, threads):
        return 1

    def launch(self, grid, threads, params, device, overlap=False):
        assert self.library.emulate(ctypes.byref(params), *grid, threads) == 0, "threads wait in vain"


@pytest.fixture
def emulated(monkeypatch):
    """Let the kernels' host sides launch emulated kernels on CPU tensors."""
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile the emulated kernels with")
    for module in (store, read, decode):
        monkeypatch.setattr(module, "load_kernel", EmulatedKernel)
    for module in (store, read):
        monkeypatch.setattr(module, "device_limits", lambda device: (PROCESSORS, SHARED_BYTES, True))
    monkeypatch.setattr(decode, "cuda_device", lambda layout, device: (device, (9, 0)))
    properties = SimpleNamespace(multi_processor_count=PROCESSORS, shared_memory_per_block_optin=SHARED_BYTES)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
