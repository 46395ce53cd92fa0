"""vLLM's attention backend for the quantized KV-cache dtypes on CPU, over the kernels of :mod:`kv_cache`.

A token's own key and value are taken as they are; all others are read back from codes, a prompt's too. A token's output
then depends on the token itself and on the codes before it alone: not on how the scheduler cut the prompt, what the
prefix cache held, what else was in the batch, or whether a preempted request was computed again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kv_cache.cpu_kernels import PagedCache
from kv_cache.errors import ParetoError
from kv_cache.layout import PageLayout
from vllm_ext.codes_backend import CodesBackend, CodesLayer, for_each_format, path_of_layer
from vllm_ext.compat import (
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionSpec,
    CommonAttentionMetadata,
    VllmConfig,
    get_forward_context,
)
from vllm_ext.names import CPU_BACKEND


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


class CPUCodesBackend(CodesBackend):
    """The backend of all dtypes on CPU."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

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


_BACKENDS = for_each_format(CPUCodesBackend)
globals().update({cls.__name__: cls for cls in _BACKENDS.values()})


backend_path = functools.partial(path_of_layer, _BACKENDS)


class CPUCodesImpl(CodesLayer, AttentionImpl[CodesMetadata]):
    """One layer's attention over codes."""

    _pages: PagedCache | None = None

    def _paged(self, layer: Any, kv_cache: torch.Tensor) -> PagedCache:
        """Return the layer's pages, bound again when vLLM has allocated another cache."""
        if self._pages is None or self._pages.cache.data_ptr() != kv_cache.data_ptr():
            layout = PageLayout(self.fmt, self.head_size, kv_cache.shape[2])
            self._pages = PagedCache(kv_cache, layout, self.scales_of(layer), self.config.model_config.max_model_len)
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
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):  # a warm-up run has no batch
            return
        positions = metadata[str(layer.layer_name)].positions
        self._paged(layer, kv_cache).store(key, value, slot_mapping[: len(positions)], positions)

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
        """Attend over the pages; ``query`` and ``output`` are [tokens, heads, head size].

        A token's own key and value are taken as they are, but in a layer that has none of its own.
        """
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
            own=None if self.kv_sharing_target_layer_name else (key[:tokens], value[:tokens]),
            sinks=self.sinks,
        )
        return output
