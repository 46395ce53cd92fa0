"""Compiles CUDA C++ at run time with the NVRTC library that PyTorch's CUDA builds bring along.

The sources include no CUDA header but ``csrc/ptx.cuh``, so neither a toolkit nor a compiler has to be installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from kv_cache.cuda.runtime.cubins import kept
from kv_cache.errors import ParetoError

HEADERS = Path(__file__).parent / "csrc"
"""The folder of the header that all kernels share."""
_FLAGS = ("-std=c++17", "-default-device", "-lineinfo")


def _candidates() -> Iterator[str]:
    """Yield where NVRTC may be: NVIDIA's wheels (``nvidia/cu13``, ``nvidia/cuda_nvrtc``), then the loader's path."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(root).glob("*/lib/libnvrtc.so*"), reverse=True):
            if "builtins" not in path.name:
                yield str(path)
    for major in (13, 12):
        yield f"libnvrtc.so.{major}"
        yield f"/usr/local/cuda/lib64/libnvrtc.so.{major}"


@functools.cache
def _library() -> ctypes.CDLL:
    for name in _candidates():
        # Where the wheel's folder is not on the loader's path, NVRTC would not find its own second library.
        for beside in sorted(Path(name).parent.glob("libnvrtc-builtins.so*")):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(beside), ctypes.RTLD_GLOBAL)
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise ParetoError("NVRTC (libnvrtc.so) is missing: install the CUDA build of PyTorch, or nvidia-cuda-nvrtc")


def _check(status: int) -> None:
    if status:
        raise ParetoError(f"NVRTC: {_library().nvrtcGetErrorString(status).decode()}")


def version() -> tuple[int, int]:
    """Return NVRTC's version.

    Raises:
        ParetoError: NVRTC is missing.

    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@functools.cache
def compile_cubin(source: str, arch: str, macros: tuple[tuple[str, int], ...], folder: Path) -> bytes:
    """Return a file's machine code: of this process, of the user's cache folder, or compiled now.

    Args:
        source: the file's name.
        arch: ``sm_80``, ``sm_90``, ...
        macros: names and values to define.
        folder: where the file and the headers beside it are.

    Raises:
        ParetoError: NVRTC is missing or rejects the source; the message has its log.

    """
    flags = (f"-arch={arch}", *_FLAGS, *(f"-D{name}={value}" for name, value in macros))
    headers = [path for place in (HEADERS, folder) for path in sorted(place.glob("*.cuh"))]
    parts = [repr((version(), source, flags)).encode()]
    for path in (folder / source, *headers):
        parts += [path.name.encode(), path.read_bytes()]
    # Lengths keep the key apart from that of other parts with the same bytes in all.
    key = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return kept(key, lambda: _compile(source, (*flags, f"-I{HEADERS}", f"-I{folder}"), folder))


def _compile(source: str, flags: tuple[str, ...], folder: Path) -> bytes:
    library, program = _library(), ctypes.c_void_p()
    text = (folder / source).read_bytes()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text, source.encode(), 0, None, None))
    try:
        options = [flag.encode() for flag in flags]
        status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        size = ctypes.c_size_t()
        if status:
            _check(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            _check(library.nvrtcGetProgramLog(program, log))
            raise ParetoError(f"{source} does not compile ({' '.join(flags)}):\n{log.value.decode()}")
        _check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
