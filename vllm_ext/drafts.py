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

from kv_cache.formats import DTYPES

if TYPE_CHECKING:
    from vllm_ext.compat import LoadConfig, ModelConfig, VllmConfig

DRAFT_MODEL = "draft_model"
"""vLLM's name of the method, and the prefix of the layers that it builds."""
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
