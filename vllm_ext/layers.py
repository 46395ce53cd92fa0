"""What vLLM says of a model's single layers, and which of them keep vLLM's own cache under a dtype of ours.

Layers may differ: Gemma 4 has heads of 256 channels in sliding layers and of 512 in the others, which no kernel of ours
serves. Such layers stay in the model's dtype, and the others are coded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kv_cache.formats import unserved_head_size

if TYPE_CHECKING:
    from vllm_ext.compat import AttentionSpec, ModelConfig, VllmConfig


def layer_shape(model: ModelConfig, index: int) -> tuple[int, int]:
    """Return (KV heads before any tensor parallelism, channels of a head) of a layer."""
    arch = model.model_arch_config[index]
    return arch.total_num_kv_heads, arch.head_size


def unserved_layers(model: ModelConfig) -> list[int]:
    """Return the layers whose heads are of a size that no kernel of ours serves; they keep vLLM's own cache."""
    count = model.get_total_num_hidden_layers()
    return [index for index in range(count) if unserved_head_size(layer_shape(model, index)[1])]


def fitted(spec: AttentionSpec, backend: Any, config: VllmConfig) -> AttentionSpec:
    """Return a coded sliding layer's spec with as many tokens in a block as the pages of uncoded layers have room for.

    vLLM lets layers of several kinds share one pool of pages, all as large as the largest. It takes more tokens into
    smaller ones only where their size divides that of the largest, and else fills them up with nothing: coded pages of
    Gemma 4 would be as large as uncoded ones. So their blocks here are made as long as just exceeds an uncoded page,
    to which vLLM then adds the difference.

    Args:
        spec: as vLLM made it.
        backend: the layer's.
        config: the engine's.

    """
    model, cache = config.model_config, config.cache_config
    apart = getattr(spec, "sliding_window", None) and not config.scheduler_config.disable_hybrid_kv_cache_manager
    unserved = unserved_layers(model)
    if not apart or not unserved or cache.skip_page_size_padded is not None:
        return spec
    heads = [
        model.get_num_kv_heads(config.parallel_config, model.model_arch_config[index]) * layer_shape(model, index)[1]
        for index in unserved
    ]
    uncoded = cache.block_size * max(heads) * 2 * model.dtype.itemsize
    coded = backend.customize_spec(spec).page_size_bytes
    return replace(spec, block_size=spec.block_size * max(1, -(-uncoded // coded)))
