"""vLLM's attention backend for the quantized KV-cache dtypes on CUDA, over the kernels of :mod:`kv_cache.cuda`.

A request with one new token (or, with speculative decoding, a few) attends over the codes of earlier tokens, and each
token over its own key and value as they are. Pieces of a prompt attend over their fresh keys and values in full
precision through vLLM's FlashAttention; what came before them is read back from codes first.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kv_cache.cuda.constants import LayerConstants
from kv_cache.cuda.decode import DecodeAttention
from kv_cache.cuda.folding import Folding
from kv_cache.cuda.read import gather, plan
from kv_cache.cuda.read import preload as preload_read
from kv_cache.cuda.store import preload as preload_store
from kv_cache.cuda.store import store
from kv_cache.errors import ParetoError
from kv_cache.layout import PageLayout
from vllm_ext.codes_backend import CodesBackend, CodesLayer, for_each_format, path_of_layer
from vllm_ext.compat import (
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionSpec,
    CommonAttentionMetadata,
    VllmConfig,
    flash_attn_supports_sinks,
    flash_attn_varlen_func,
    get_flash_attn_version,
    split_decodes_and_prefills,
)
from vllm_ext.names import CUDA_BACKEND


@dataclass(frozen=True)
class Prompts:
    """The batch's long pieces of prompts, its last requests.

    Attributes:
        first_request: of them in the batch.
        first_token: of them in the batch.
        query_start: int32 [pieces + 1], from 0.
        key_start: int32 [pieces + 1]: where each request's keys, earlier ones and fresh ones, start.
        max_query: most tokens of a piece.
        max_keys: most keys of a request.
        tiles: of `kv_cache.cuda.read.plan`; None if there are no earlier tokens, and fresh keys are all keys.
        keys: of all requests together.

    """

    first_request: int
    first_token: int
    query_start: torch.Tensor
    key_start: torch.Tensor
    max_query: int
    max_keys: int
    tiles: torch.Tensor | None
    keys: int


@dataclass
class CodesMetadata:
    """One step's batch, in the tensors that the kernels take; persistent ones, so that CUDA graphs may hold them.

    Attributes:
        num_tokens: tokens of the batch; padding may be among them.
        query_start: int32 [requests + 1].
        seq_lens: int32 [requests], new tokens included.
        block_table: int32 [requests, blocks].
        positions: int64 [num_tokens], of each token in its sequence.
        slot_mapping: int64 [num_tokens], where each token is stored; negative: nowhere.
        num_short: requests, the batch's first, with at most `CodesMetadataBuilder.reorder_batch_threshold` new tokens.
        num_short_tokens: theirs.
        prompts: the other requests.
        awaits_store: int32 [1], see :meth:`kv_cache.cuda.decode.DecodeAttention.prepare`.

    """

    num_tokens: int
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    num_short: int
    num_short_tokens: int
    prompts: Prompts | None
    awaits_store: torch.Tensor


class CodesMetadataBuilder(AttentionMetadataBuilder[CodesMetadata]):
    """Splits a batch into requests that attend over codes and pieces of prompts that FlashAttention serves."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        # One tensor for good: CUDA graphs hold its address.
        self._awaits_store, self._waiting = torch.ones(1, dtype=torch.int32, device=device), True

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CodesMetadata:
        """Return the batch's tensors."""
        batch = common_attn_metadata
        if batch.causal is not True:
            raise ParetoError("quantized KV-cache dtypes serve causal attention only: use --kv-cache-dtype auto")
        if batch.positions is None:
            raise ParetoError("quantized KV-cache dtypes need vLLM's model runner V2 on CUDA")
        assert self.reorder_batch_threshold is not None
        short, long, short_tokens, _ = split_decodes_and_prefills(batch, self.reorder_batch_threshold)
        return CodesMetadata(
            batch.num_actual_tokens,
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_table_tensor,
            batch.positions,
            batch.slot_mapping,
            short,
            short_tokens,
            self._prompts(batch, short, short_tokens) if long else None,
            self._waits(batch, short),
        )

    def _waits(self, batch: CommonAttentionMetadata, short: int) -> torch.Tensor:
        """Say whether a request reads pages that this very step writes for another one.

        vLLM counts a block as cached as soon as the step that fills it is scheduled. A request that comes in the same
        step may begin with such a block: of the other answers to a prompt, say, all but the first have but their last
        few tokens left to compute. A request whose prompt is over began in an earlier step.
        """
        beginning = batch.is_prefilling
        waits = beginning is None or bool(beginning[:short].any())
        if waits != self._waiting and not torch.cuda.is_current_stream_capturing():
            self._awaits_store.fill_(int(waits))
            self._waiting = waits
        return self._awaits_store

    def _prompts(self, batch: CommonAttentionMetadata, first: int, first_token: int) -> Prompts:
        starts = batch.query_start_loc_cpu[first : batch.num_reqs + 1].tolist()
        queries = [stop - start for start, stop in itertools.pairwise(starts)]
        lens = batch.seq_lens_cpu_upper_bound
        if lens is None:
            lens = batch.seq_lens.cpu()
        # A padded request has no tokens.
        keys = [n if q else 0 for q, n in zip(queries, lens[first : batch.num_reqs].tolist(), strict=True)]
        earlier = [k - q for q, k in zip(queries, keys, strict=True)]
        query_start, key_start = [0], [0]
        for q, k in zip(queries, keys, strict=True):
            query_start.append(query_start[-1] + q)
            key_start.append(key_start[-1] + k)

        def there(values: torch.Tensor) -> torch.Tensor:
            return values.pin_memory().to(self.device, non_blocking=True)

        return Prompts(
            first,
            first_token,
            there(torch.tensor(query_start, dtype=torch.int32)),
            there(torch.tensor(key_start, dtype=torch.int32)),
            max(queries),
            max(keys),
            there(plan(earlier, queries)) if any(earlier) else None,
            key_start[-1],
        )


class CUDACodesBackend(CodesBackend):
    """The backend of all dtypes on CUDA."""

    # Decode prepares its queries beside the store.
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        """Return the name under which vLLM's registry knows the backend."""
        return CUDA_BACKEND

    @staticmethod
    def get_impl_cls() -> type[CUDACodesImpl]:
        """Return the layer implementation."""
        return CUDACodesImpl

    @staticmethod
    def get_builder_cls() -> type[CodesMetadataBuilder]:
        """Return the metadata builder."""
        return CodesMetadataBuilder


_BACKENDS = for_each_format(CUDACodesBackend)
globals().update({cls.__name__: cls for cls in _BACKENDS.values()})


def backend_path(selected: Any) -> str:
    """Return the import path of the backend of a layer with one of our dtypes.

    Args:
        selected: vLLM's AttentionSelectorConfig.

    Raises:
        ParetoError: the layer is of a kind that the dtype cannot serve on this device.

    """
    # Our decode kernel serves sinks everywhere, but prompts go through FlashAttention, which does from version 3 on.
    if selected.has_sink and not flash_attn_supports_sinks():
        raise ParetoError(
            f"--kv-cache-dtype {selected.kv_cache_dtype} serves attention sinks on CUDA only with FlashAttention 3, "
            "which needs compute capability 9.0: use --kv-cache-dtype auto"
        )
    return path_of_layer(_BACKENDS, selected)


@dataclass(frozen=True)
class _Parts:
    """What one layer's kernels need, made when its cache is known."""

    constants: LayerConstants
    folding: Folding
    decode: DecodeAttention
    flash_version: int | None


# Scratch of the decode kernel, one for all layers of a shape: layers run one after the other.
_DECODE: dict[tuple[Any, ...], DecodeAttention] = {}


class CUDACodesImpl(CodesLayer, AttentionImpl[CodesMetadata]):
    """One layer's attention over codes."""

    _parts: _Parts | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.kv_sharing_target_layer_name is not None:
            raise ParetoError(
                f"--kv-cache-dtype {self.kv_cache_dtype} does not serve layers that share a KV cache on CUDA: use "
                "--kv-cache-dtype auto"
            )

    def _made(self, layer: Any, cache: torch.Tensor, dtype: torch.dtype) -> _Parts:
        if self._parts is None or self._parts.constants.layout.block_size != cache.shape[2]:
            self._parts = self._make(layer, cache, dtype)
        return self._parts

    def _make(self, layer: Any, cache: torch.Tensor, dtype: torch.dtype) -> _Parts:
        layout, device = PageLayout(self.fmt, self.head_size, cache.shape[2]), cache.device
        scales = self.scales_of(layer)
        limit = self.config.model_config.max_model_len
        constants = LayerConstants.of(layout, scales, device, limit)
        for preload in (preload_store, preload_read):
            preload(constants, dtype, device)
        decode = self._decode(layout, dtype, device)
        version = get_flash_attn_version(head_size=self.head_size, has_sinks=self.sinks is not None)
        return _Parts(constants, Folding.of(scales, limit, device), decode, version)

    def _decode(self, layout: PageLayout, dtype: torch.dtype, device: torch.device) -> DecodeAttention:
        speculative = self.config.speculative_config
        length = 1 + (speculative.num_speculative_tokens if speculative else 0)  # Start-up has refused too many.
        requests, capped = self.config.scheduler_config.max_num_seqs, self.soft_cap > 0
        shape = (layout, self.num_kv_heads, self.num_heads, dtype, device, requests, requests * length, length, capped)
        if shape not in _DECODE:
            _DECODE[shape] = DecodeAttention(*shape)
        return _DECODE[shape]

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
        """Quantize the step's keys and values into the pages, then attend.

        Args:
            layer: vLLM's attention layer.
            query: [tokens, heads, head size]; ``output`` likewise.
            key: [tokens, KV heads, head size]; ``value`` likewise.
            value: see ``key``.
            kv_cache: uint8 [blocks, KV heads, tokens, bytes per token].
            attn_metadata: of :class:`CodesMetadataBuilder`; None in a warm-up run.
            output: written.
            output_scale: of fused quantization, which is not supported.
            output_block_scale: likewise.

        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not supported")
        if attn_metadata is None:  # the warm-up run has neither batch nor cache
            return output.fill_(0)
        batch, parts = attn_metadata, self._made(layer, kv_cache, query.dtype)
        tokens, requests = batch.num_short_tokens, batch.num_short
        count = batch.num_tokens
        beside = store(parts.constants, kv_cache, key[:count], value[:count], batch.slot_mapping, batch.positions)
        if requests:
            pages = kv_cache, batch.block_table[:requests], batch.seq_lens[:requests], batch.query_start[: requests + 1]
            own = key[:tokens], value[:tokens]
            parts.decode.prepare(query[:tokens], parts.folding, self.scale, beside, own, batch.awaits_store)
            parts.decode.attend(output[:tokens], *pages, parts.folding, self.window, self.soft_cap, self.sinks)
        if batch.prompts is not None:
            fresh = slice(batch.prompts.first_token, batch.num_tokens)
            self._attend_prompts(batch, parts, query[fresh], key[fresh], value[fresh], kv_cache, output[fresh])
        return output

    def _attend_prompts(
        self,
        batch: CodesMetadata,
        parts: _Parts,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        prompts = batch.prompts
        assert prompts is not None
        if prompts.tiles is not None:
            table = batch.block_table[prompts.first_request :]
            whole = key.new_empty(prompts.keys, *key.shape[1:]), value.new_empty(prompts.keys, *value.shape[1:])
            gather(parts.constants, cache, whole, (key, value), table, prompts.tiles)
            key, value = whole
        flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            out=output,
            cu_seqlens_q=prompts.query_start,
            max_seqlen_q=prompts.max_query,
            cu_seqlens_k=prompts.key_start,
            max_seqlen_k=prompts.max_keys,
            softmax_scale=self.scale,
            causal=True,
            window_size=[self.window - 1, 0] if self.window else None,
            softcap=self.soft_cap,
            fa_version=parts.flash_version,
            # In bfloat16 alone, whatever the model's dtype; a bfloat16 model's are not copied.
            s_aux=None if self.sinks_parameter is None else self.sinks_parameter.bfloat16(),
        )
