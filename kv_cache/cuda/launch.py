"""Loads the kernels of ``csrc/``, as :mod:`kv_cache.cuda.runtime` loads any."""

import functools
from pathlib import Path

from kv_cache.cuda.runtime import launch

SOURCES = Path(__file__).parent / "csrc"

load_kernel = functools.partial(launch.load_kernel, folder=SOURCES)
"""See :func:`kv_cache.cuda.runtime.launch.load_kernel`; sources are files of ``csrc/``."""
