"""What drafts tokens in speculative decoding, and what its own layers code their keys and values with.

A draft's layers are numbered anew, or after those of the model that answers: a draft model's first layer is layer 0 as
well, and would be read and written with scales that were made for another layer, without an error. So they are told
apart here, by the prefix that vLLM gives the layers of a draft model.

A draft model is a model like any other and has scales of its own. What drafts from the answering model's hidden states
(EAGLE, MTP) is no model by itself that a calibration could run: its few layers keep 16 bits. Which tokens are answered
does not depend on either; only how many drafts are accepted does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kv_cache.errors import ParetoError
from kv_cache.formats import DTYPES, LAYER_FORMATS

if TYPE_CHECKING:
    from vllm_ext.compat import Attention, LoadConfig, ModelConfig, VllmConfig

DRAFT_MODEL = "draft_model"
"""vLLM's name of the method, and the prefix of the layers that it builds."""
CODED = frozenset((*DTYPES, *LAYER_FORMATS))
"""What layers with scales have for a dtype."""
WITHOUT_LAYERS = ("ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator")
"""Methods that have no attention of their own."""


def is_draft(layer_name: str) -> bool:
    """Return whether a layer belongs to a draft model."""
    return layer_name.startswith(f"{DRAFT_MODEL}.")


def draft_config(config: VllmConfig) -> tuple[ModelConfig, LoadConfig]:
    """Return the draft model of an engine that has one, and how it is loaded."""
    speculative = config.speculative_config
    return speculative.draft_model_config, speculative.draft_load_config or config.load_config


def draft_dtype(config: VllmConfig) -> str | None:
    """Return the dtype of ours that what drafts would code its own keys and values with; None if there is none."""
    speculative = config.speculative_config
    if speculative is None or speculative.method in WITHOUT_LAYERS:
        return None
    dtype: str = speculative.kv_cache_dtype or config.cache_config.cache_dtype
    return dtype if dtype in DTYPES else None


def check_apart(layer: Attention) -> None:
    """Raise if a layer that was just built would share its scales with another one.

    The prefix tells a draft model's layers from the others. What else vLLM may build beside the model, now or in a
    version to come, may number its layers from 0 as well.
    """
    from vllm_ext.compat import extract_layer_index, get_current_vllm_config

    mine = is_draft(layer.layer_name), extract_layer_index(layer.layer_name)
    for name, other in get_current_vllm_config().compilation_config.static_forward_context.items():
        if other is layer or getattr(other, "kv_cache_dtype", None) not in CODED:
            continue
        if (is_draft(name), extract_layer_index(name)) == mine:
            raise ParetoError(
                f"{layer.layer_name} would be read with the KV scales of {name}: --kv-cache-dtype "
                f"{layer.kv_cache_dtype} does not serve this model, use --kv-cache-dtype auto"
            )
