"""What the attention backends of the quantized KV-cache dtypes have in common, whatever the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch

from kv_cache.errors import ParetoError
from kv_cache.formats import CODED, FORMATS, HEAD_SIZES, LAYER_FORMATS, MIXED, KVFormat, get_format
from kv_cache.layout import TOKEN_MULTIPLE
from kv_cache.scales import LayerScales
from vllm_ext.compat import (
    AttentionBackend,
    AttentionSpec,
    AttentionType,
    KVCacheLayout,
    MultipleOf,
    get_current_vllm_config,
)
from vllm_ext.scale_source import layer_scales


class CodesBackend(AttentionBackend):
    """What vLLM asks of a backend before it builds layers; each device and dtype has a subclass."""

    forward_includes_kv_cache_update = False
    fmt: ClassVar[KVFormat]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = sorted(CODED)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Return the page sizes in tokens that keep planes aligned."""
        return [MultipleOf(TOKEN_MULTIPLE)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Return the head sizes that the kernels are compiled for."""
        return list(HEAD_SIZES)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the layouts in which the bytes of one block and head are contiguous."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows are masked in the kernel."""
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Make a quantized layer's page hold this format's bytes; layers that keep vLLM's own dtype are left alone."""
        if spec.dtype != torch.uint8:
            return spec
        return replace(spec, state_content_bytes=cls.fmt.bytes_per_token(spec.head_size))


def for_each_format(base: type[CodesBackend]) -> dict[str, type[CodesBackend]]:
    """Return a subclass of ``base`` for each dtype, and for the bits of each layer of a mixed one, by name.

    vLLM asks about ``mixed_per_head`` as a whole before there are layers, for its block size; the widest bits answer.
    """
    return {
        name: type(
            f"{base.__name__}_{name}",
            (base,),
            {"fmt": fmt, "__doc__": f"The backend of {name}.", "__module__": base.__module__},
        )
        for name, fmt in (FORMATS | LAYER_FORMATS | {MIXED: KVFormat(MIXED, 8, 8)}).items()
    }


def path_of_layer(backends: dict[str, type[CodesBackend]], selected: Any) -> str:
    """Return the import path of the backend of a layer with one of our dtypes.

    Args:
        backends: of a device, by dtype.
        selected: vLLM's AttentionSelectorConfig.

    Raises:
        ParetoError: the layer is of a kind that the dtype cannot serve.

    """
    name = selected.kv_cache_dtype
    reasons = {
        f"head size {selected.head_size}": selected.head_size not in HEAD_SIZES,
        "multi-head latent attention": selected.use_mla,
        "sparse attention": selected.use_sparse,
        "bidirectional multimodal prefixes (--language-model-only leaves them out)": selected.use_mm_prefix,
        f"{selected.attn_type} attention": selected.attn_type != AttentionType.DECODER,
        "non-causal attention": selected.use_non_causal,
        "decode context parallelism": selected.use_dcp or selected.use_pcp,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ParetoError(f"--kv-cache-dtype {name} does not serve {reason}: use --kv-cache-dtype auto")
    return ".".join(backends[name].full_cls_name())


class CodesLayer:
    """What the implementation of one layer knows, whatever the device; vLLM calls the constructor.

    Attributes:
        num_heads: query heads of this rank.
        head_size: channels of a head.
        scale: factor of q.k.
        num_kv_heads: KV heads of this rank.
        window: a token sees the last ``window`` tokens, itself included; 0 means all.
        soft_cap: c in ``c * tanh(score / c)``; 0 means none.
        sinks: float32 [num_heads] once weights are loaded, a logit of each head that joins the sum in the softmax and
            brings no value; None: there is none.
        sinks_parameter: the same as the model has it, in its dtype.
        fmt: the format.

    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise ParetoError(f"--kv-cache-dtype {kv_cache_dtype} does not serve ALiBi: use --kv-cache-dtype auto")
        if sinks is not None and tuple(sinks.shape) != (num_heads,):
            raise ParetoError(
                f"--kv-cache-dtype {kv_cache_dtype}: attention sinks of shape {tuple(sinks.shape)} do not fit "
                f"{num_heads} query heads, which have one each"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.window = sliding_window or 0
        self.soft_cap = logits_soft_cap or 0.0
        # The model's parameter, which has no values yet.
        self.sinks_parameter = None if sinks is None else sinks.detach()
        self.sinks: torch.Tensor | None = None
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.fmt = get_format(kv_cache_dtype)
        self.config = get_current_vllm_config()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take over the sinks, which are the model's parameter, as the kernels read them; vLLM calls this."""
        loaded = self.sinks_parameter
        if loaded is None:
            return
        if self.sinks is None or self.sinks.device != loaded.device:
            self.sinks = torch.empty(self.num_heads, dtype=torch.float32, device=loaded.device)
        self.sinks.copy_(loaded)  # When weights are loaded again too: CUDA graphs hold the address.

    def scales_of(self, layer: Any) -> LayerScales:
        """Return the scales that the layer's pages are read with."""
        name = self.kv_sharing_target_layer_name or layer.layer_name
        return layer_scales(self.config, name, self.num_kv_heads)
