"""vLLM's attention backend for the quantized KV-cache dtypes on CPU, over the kernels of :mod:`kv_cache`.

Every key and value is read back from codes, a prompt's own included. A token's output then depends on the codes up to
it alone: not on how the scheduler cut the prompt, what the prefix cache held, what else was in the batch, or whether a
preempted request was computed again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from kv_cache.cpu_kernels import PagedCache
from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS, HEAD_SIZES, KVFormat, get_format
from kv_cache.layout import TOKEN_MULTIPLE, PageLayout
from vllm_ext.names import CPU_BACKEND
from vllm_ext.scale_source import layer_scales


@dataclass
class CodesMetadata:
    """One step's batch, in the tensors that the kernels take.

    Attributes:
        num_tokens: tokens of the batch, padding left out.
        query_start: int32 [requests + 1].
        seq_lens: int32 [requests], new tokens included.
        block_table: int32 [requests, blocks].
        positions: int64 [num_tokens], of each token in its sequence.

    """

    num_tokens: int
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    positions: torch.Tensor


class CodesMetadataBuilder(AttentionMetadataBuilder[CodesMetadata]):
    """Passes vLLM's batch on; the kernels plan for themselves."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CodesMetadata:
        """Return the batch's tensors."""
        batch = common_attn_metadata
        if batch.causal is not True:
            raise ParetoError("quantized KV-cache dtypes serve causal attention only: use --kv-cache-dtype auto")
        tokens, start = batch.num_actual_tokens, batch.query_start_loc
        # A request's new tokens are the last of its sequence.
        ends = start[1 : len(batch.seq_lens) + 1]
        shift = (batch.seq_lens - ends).long().repeat_interleave((ends - start[: len(ends)]).long())
        positions = torch.arange(tokens) + shift[:tokens]
        return CodesMetadata(tokens, start, batch.seq_lens, batch.block_table_tensor, positions)


class CPUCodesBackend(AttentionBackend):
    """What vLLM asks of a backend before it builds layers; each dtype has a subclass that names its format."""

    forward_includes_kv_cache_update = False
    fmt: ClassVar[KVFormat]
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(FORMATS)

    @staticmethod
    def get_name() -> str:
        """Return the name under which vLLM's registry knows the backend."""
        return CPU_BACKEND

    @staticmethod
    def get_impl_cls() -> type[CPUCodesImpl]:
        """Return the layer implementation."""
        return CPUCodesImpl

    @staticmethod
    def get_builder_cls() -> type[CodesMetadataBuilder]:
        """Return the metadata builder."""
        return CodesMetadataBuilder

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


_BACKENDS = {
    name: type(f"CPUCodesBackend_{name}", (CPUCodesBackend,), {"fmt": fmt, "__doc__": f"The backend of {name}."})
    for name, fmt in FORMATS.items()
}
globals().update({cls.__name__: cls for cls in _BACKENDS.values()})


def backend_path(selected: Any) -> str:
    """Return the import path of the backend of a layer with one of our dtypes.

    Args:
        selected: vLLM's AttentionSelectorConfig.

    Raises:
        ParetoError: the layer is of a kind that the dtype cannot serve.

    """
    name = selected.kv_cache_dtype
    reasons = {
        f"head size {selected.head_size}": selected.head_size not in HEAD_SIZES,
        "multi-head latent attention": selected.use_mla,
        "attention sinks": selected.has_sink,
        "sparse attention": selected.use_sparse,
        "bidirectional multimodal prefixes": selected.use_mm_prefix,
        f"{selected.attn_type} attention": selected.attn_type != AttentionType.DECODER,
        "non-causal attention": selected.use_non_causal,
        "decode context parallelism": selected.use_dcp or selected.use_pcp,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ParetoError(f"--kv-cache-dtype {name} does not serve {reason}: use --kv-cache-dtype auto")
    return f"{__name__}.{_BACKENDS[name].__name__}"


class CPUCodesImpl(AttentionImpl[CodesMetadata]):
    """One layer's attention over codes."""

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
        if alibi_slopes is not None or sinks is not None:
            what = "attention sinks" if sinks is not None else "ALiBi"
            raise ParetoError(f"--kv-cache-dtype {kv_cache_dtype} does not serve {what}: use --kv-cache-dtype auto")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.window = sliding_window or 0
        self.soft_cap = logits_soft_cap or 0.0
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.fmt = get_format(kv_cache_dtype)
        self._config = get_current_vllm_config()
        self._pages: PagedCache | None = None

    def _paged(self, layer: Any, kv_cache: torch.Tensor) -> PagedCache:
        """Return the layer's pages, bound again when vLLM has allocated another cache."""
        if self._pages is None or self._pages.cache.data_ptr() != kv_cache.data_ptr():
            layout = PageLayout(self.fmt, self.head_size, kv_cache.shape[2])
            name = self.kv_sharing_target_layer_name or layer.layer_name
            scales = (
                layer_scales(self._config, self.fmt, extract_layer_index(name), self.num_kv_heads)
                if self.fmt.static
                else None
            )
            self._pages = PagedCache(kv_cache, layout, scales, self._config.model_config.max_model_len)
        return self._pages

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Quantize the step's keys and values ([tokens, KV heads, head size]) and write their codes into the pages."""
        pages, positions = self._paged(layer, kv_cache), None
        if pages.centred:
            metadata = get_forward_context().attn_metadata
            if not isinstance(metadata, dict):  # the warm-up run has no batch
                return
            positions = metadata[str(layer.layer_name)].positions
            slot_mapping = slot_mapping[: len(positions)]
        pages.store(key, value, slot_mapping, positions)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CodesMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over the pages; ``query`` and ``output`` are [tokens, heads, head size]."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not supported")
        if attn_metadata is None:  # the warm-up run has neither batch nor cache
            return output
        tokens = attn_metadata.num_tokens
        self._paged(layer, kv_cache).attend(
            query[:tokens],
            output[:tokens],
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start,
            self.scale,
            self.window,
            self.soft_cap,
        )
        return output
