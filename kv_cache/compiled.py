"""Loads the C libraries that setup.py compiles as extension modules; they are reached through ctypes."""

from __future__ import annotations

import ctypes
import functools
import importlib.util

from kv_cache.errors import ParetoError


@functools.cache
def compiled_library(module: str, **parameters: type[ctypes.Structure]) -> ctypes.CDLL | None:
    """Return the library of an extension module, ``kv_cache._cpu`` for one, or None if it was not compiled.

    The libraries leave their OpenMP calls open. PyTorch's runtime answers them, so that one pool of threads, with the
    pinning that vLLM gave it, runs both.

    Args:
        module: the extension module.
        parameters: structures that its functions take, by the name under which the library says their size
            (``pareto_bytes_of_<name>``).

    Raises:
        ParetoError: a structure has another size there: the library was compiled from other sources than these, and
            would take one number for another.

    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(spec.origin)
    for name, structure in parameters.items():
        try:
            size = ctypes.c_size_t.in_dll(library, f"pareto_bytes_of_{name}").value
        except ValueError:  # a library from before it said sizes
            size = None
        if size != ctypes.sizeof(structure):
            raise ParetoError(
                f"{spec.origin} was compiled from other sources than this version of vllm-pareto has (parameters of "
                f"{name}: {size} bytes instead of {ctypes.sizeof(structure)}); run 'pip install' again"
            )
    return library
