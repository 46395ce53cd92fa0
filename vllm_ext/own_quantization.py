"""What all quantization configs of this package answer vLLM alike."""

from __future__ import annotations

from vllm_ext.compat import QuantizationConfig


class OwnConfig(QuantizationConfig):
    """A quantization that config.json describes, for the GPUs that this package's kernels are for."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest CUDA capability: Ampere, the first with bfloat16."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file: config.json has it all."""
        return []
