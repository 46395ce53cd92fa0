"""Gives a loaded model what small models lack: key biases as Qwen2 has them, and values with outlier channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kv_cache.errors import ParetoError
from quant_methods.calibration.kv_observer import kv_geometry, kv_rotary

BIASED_PAIRS = 3
"""Pairs of channels of each head that get a bias: 6 channels."""
OUTLIER_CHANNELS = 2
"""Value channels of each head that are made large."""


def _projections(model: Any, *names: str) -> list[list[nn.Linear]]:
    found = []
    for block in model.get_decoder().layers:
        layers = [getattr(getattr(block, "self_attn", None), name, None) for name in names]
        if not all(isinstance(layer, nn.Linear) for layer in layers):
            raise ParetoError(f"this model's attention has no {' and '.join(names)} of its own to plant anything in")
        found.append(layers)
    return found


def plant_key_bias(model: Any, size: float) -> None:
    """Add a bias of plus and minus ``size`` to 6 key channels of every head, before rotary embedding.

    The channels are the pairs that rotary embedding turns slowest, where Qwen2's large biases lie too: a bias in a fast
    pair would be another kind of position embedding, and the model another model. Attention hardly changes, since what
    the bias adds to a logit is nearly the same for all tokens, but each key's channels now differ in size by far.

    Raises:
        ParetoError: the model is not built like a Llama.

    """
    _, kv_heads, head_dim = kv_geometry(model.config)
    rotary = kv_rotary(model.get_decoder(), model.config)
    if rotary is None:
        raise ParetoError("--key-bias needs a model with rotary embedding")
    first, second = rotary.channels()
    slowest = torch.arange(rotary.rotated)[-BIASED_PAIRS:]
    bias = torch.zeros(head_dim)
    bias[first[slowest]], bias[second[slowest]] = size, -size
    for (projection,) in _projections(model, "k_proj"):
        added = bias.repeat(kv_heads).to(projection.weight)
        given = 0 if projection.bias is None else projection.bias.detach()
        projection.bias = nn.Parameter(added + given, requires_grad=False)


def plant_value_outliers(model: Any, factor: float, seed: int) -> None:
    """Multiply 2 value channels of every head by ``factor``, and divide what the output projection makes of them.

    The model computes what it did before. Outlier channels are what large models have by themselves (Dettmers et al.
    2022, "LLM.int8()").

    Raises:
        ParetoError: the model is not built like a Llama.

    """
    _, kv_heads, head_dim = kv_geometry(model.config)
    generator = torch.Generator().manual_seed(seed)
    for values, output in _projections(model, "v_proj", "o_proj"):
        scale = torch.ones(kv_heads, head_dim)
        for head in range(kv_heads):
            scale[head, torch.randperm(head_dim, generator=generator)[:OUTLIER_CHANNELS]] = factor
        scale = scale.to(values.weight)
        values.weight.data *= scale.flatten()[:, None]
        if values.bias is not None:
            values.bias.data *= scale.flatten()
        heads = output.in_features // head_dim
        output.weight.data /= scale.repeat_interleave(heads // kv_heads, 0).flatten()
