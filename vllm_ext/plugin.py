"""vLLM's entry point: called in every process, more than once."""

from __future__ import annotations

from vllm_ext.versions import check_vllm_version


def register() -> None:
    """Make the KV-cache dtypes and the checkpoint format known to vLLM; calling it again changes nothing.

    Raises:
        ParetoError: an unsupported vLLM.

    """
    check_vllm_version()
    # Importing the second registers the checkpoint format.
    from vllm_ext import patches, weights_config  # noqa: F401

    patches.apply()
