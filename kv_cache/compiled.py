"""Loads the C libraries that setup.py compiles as extension modules; they are reached through ctypes."""

from __future__ import annotations

import ctypes
import functools
import importlib.util


@functools.cache
def compiled_library(module: str) -> ctypes.CDLL | None:
    """Return the library of an extension module, ``kv_cache._cpu`` for one, or None if it was not compiled.

    The libraries leave their OpenMP calls open. PyTorch's runtime answers them, so that one pool of threads, with the
    pinning that vLLM gave it, runs both.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(spec.origin)
