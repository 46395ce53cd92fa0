"""Loads machine code and launches kernels through CUDA's driver API, on PyTorch's context and streams."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from kv_cache.cuda.runtime.device import RESERVED_SHARED, architecture
from kv_cache.cuda.runtime.nvrtc import compile_cubin
from kv_cache.errors import ParetoError

_MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"""
_PREFERRED_CARVEOUT = 9
"""CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT"""
_PROGRAMMATIC_SERIALIZATION = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"""


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ParetoError("no CUDA driver (libcuda.so.1) on this machine") from error


def _check(status: int) -> None:
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(name))
        raise ParetoError(f"CUDA driver: {(name.value or b'unknown error').decode()} ({status})")


class Kernel:
    """One kernel, loaded on one device.

    Args:
        cubin: machine code.
        name: the kernel's.
        device: a CUDA device.
        shared_bytes: dynamic shared memory of a thread block.
        one_block: set no more shared memory aside than one thread block takes, and leave the rest to the L1 cache. By
            default the driver makes room for as many blocks as fit, and a kernel that overlaps keeps that division.

    """

    def __init__(
        self, cubin: bytes, name: str, device: torch.device, shared_bytes: int = 0, one_block: bool = False
    ) -> None:
        self._shared_bytes = shared_bytes
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # Makes PyTorch's context current on this thread.
            torch.empty(1, device=device)
            _check(_driver().cuModuleLoadData(ctypes.byref(self._module), cubin))
            _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))
            if shared_bytes:
                _check(_driver().cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared_bytes))
            if one_block:
                most = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
                percent = min(-(-100 * (shared_bytes + RESERVED_SHARED) // most), 100)
                _check(_driver().cuFuncSetAttribute(self._function, _PREFERRED_CARVEOUT, percent))

    def blocks_per_multiprocessor(self, threads: int) -> int:
        """Return how many thread blocks of that many threads a multiprocessor holds at once."""
        count = ctypes.c_int()
        _check(
            _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(count), self._function, threads, ctypes.c_size_t(self._shared_bytes)
            )
        )
        return count.value

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        params: ctypes.Structure,
        device: torch.device,
        overlap: bool = False,
    ) -> None:
        """Launch on PyTorch's current stream of ``device``, which must be the current device.

        Args:
            grid: thread blocks in x, y, z.
            threads: of a block.
            params: the kernel's one parameter.
            device: that the kernel was loaded on.
            overlap: allow the kernel to start while the one before it in the stream still runs; it waits for its
                results by itself (sm_90 and above).

        """
        attribute = _Attribute(_PROGRAMMATIC_SERIALIZATION, 0, (ctypes.c_int * 16)(1))
        config = _Config(
            grid,
            (threads, 1, 1),
            self._shared_bytes,
            torch.cuda.current_stream(device).cuda_stream,
            ctypes.pointer(attribute),
            int(overlap),
        )
        args = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, args, None))


@functools.cache
def load_kernel(
    source: str,
    name: str,
    macros: tuple[tuple[str, int], ...],
    device: torch.device,
    shared_bytes: int = 0,
    one_block: bool = False,
    *,
    folder: Path,
) -> Kernel:
    """Return a kernel, compiled for a device and loaded on it, the same for the same arguments.

    Args:
        source: the file's name.
        name: the kernel's.
        macros: names and values to define.
        device: a CUDA device.
        shared_bytes: dynamic shared memory of a thread block.
        one_block: see :class:`Kernel`.
        folder: where the source is.

    """
    return Kernel(compile_cubin(source, architecture(device), macros, folder), name, device, shared_bytes, one_block)


def compile_ahead(
    source: str, every: Iterable[tuple[tuple[str, int], ...]], device: torch.device, folder: Path
) -> None:
    """Compile a file with each of several sets of macros, at the same time: :func:`load_kernel` need not then.

    Args:
        source: the file's name.
        every: names and values to define, in each set.
        device: a CUDA device.
        folder: see :func:`load_kernel`.

    """
    arch = architecture(device)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda macros: compile_cubin(source, arch, macros, folder), every))
