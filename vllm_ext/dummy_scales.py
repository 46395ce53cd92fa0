"""Scales for ``--load-format dummy``, where vLLM draws weights at random to measure a model's shape.

There is nothing to calibrate then, so scales are drawn as well, with every part that calibrated ones have: the kernels
do all their work, and the answers mean as little as the weights.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from kv_cache.decoder_layers import keeps_keys
from kv_cache.formats import unserved_head_size
from kv_cache.rotary import Rotary
from kv_cache.scales import MATRIX_DTYPE, SCALES_FILE, SCHEMA_OF_GROUPS, KVScales, LayerScales
from kv_cache.transforms import hadamard_sums, mirror
from kv_cache.user_cache import cache_dir
from vllm_ext.layers import layer_shape

if TYPE_CHECKING:
    from vllm_ext.compat import ModelConfig

DUMMY_STD = 1e-3 / math.sqrt(3)
"""Standard deviation of vLLM's dummy weights, drawn evenly from -1e-3 to 1e-3."""


def make(model: ModelConfig) -> Path:
    """Return a folder with random scales for a model's shape, kept between starts."""
    text = model.hf_text_config
    count = model.get_total_num_hidden_layers()
    shapes = [layer_shape(model, index) if keeps_keys(text, index) else None for index in range(count)]
    rotaries = {dim: _rotary(text, dim, model.max_model_len) for _, dim in filter(None, shapes)}
    turned = [(dim, rotary.max_position, rotary.inv_freq.tolist()) for dim, rotary in rotaries.items()]
    described = f"{SCHEMA_OF_GROUPS} {shapes} {text.hidden_size} {turned}"
    folder = cache_dir() / "kv-scales" / f"dummy-{hashlib.sha256(described.encode()).hexdigest()[:24]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / SCALES_FILE).is_file():
            # Keys and values of a dummy model: a normalized input, times the norm's and the projection's weights.
            random_scales(shapes, DUMMY_STD**2 * math.sqrt(text.hidden_size), rotaries).save(folder)
    return folder


def _rotary(text: Any, dim: int, max_position: int) -> Rotary:
    parameters = getattr(text, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in parameters.values()):  # one for each type of layer: any of them will do
        parameters = next(value for value in parameters.values() if isinstance(value, dict))
    theta = float(parameters.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0)
    share = parameters.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None) or 1.0
    rotated = int(dim * float(share))
    return Rotary.over(dim, theta ** -(torch.arange(0, rotated, 2) / rotated), max_position)


def random_scales(shapes: list[tuple[int, int] | None], spread: float, rotaries: dict[int, Rotary]) -> KVScales:
    """Return scales for layers of some shapes; none for heads of a size that no kernel serves.

    Args:
        shapes: of each layer, (KV heads, channels of a head); None for one that keeps no keys.
        spread: standard deviation of keys and values.
        rotaries: the rotary embedding of heads of each size.

    """
    draw = torch.Generator().manual_seed(0)
    made = [
        None if shape is None or unserved_head_size(shape[1]) else _random_layer(shape, spread, rotaries, draw)
        for shape in shapes
    ]
    # Every mixed layer is another one than its neighbours: 3.5 bits of codes, as a budget might choose them.
    bits = [((4, 3), (3, 4), (4, 4), (3, 3))[index % 4] for index in range(len(shapes))]
    return KVScales(made, bits, {"dummy": True})


def _random_layer(
    shape: tuple[int, int], spread: float, rotaries: dict[int, Rotary], draw: torch.Generator
) -> LayerScales:
    heads, dim = shape
    # Hadamard's matrix times its transpose is the length of a run times the identity, so that inverses need no LAPACK,
    # which this process must not call.
    mixed = hadamard_sums(torch.eye(dim))
    entry = torch.tensor(1 / (spread * math.sqrt(dim & -dim))).to(MATRIX_DTYPE).float()
    signs = torch.randint(2, (heads, 1, dim), generator=draw) * 2 - 1
    turn = mixed[:, torch.randperm(dim, generator=draw)] * signs
    return LayerScales(
        key_mean=spread * torch.randn(heads, dim, generator=draw),
        key_first=spread * torch.randn(heads, dim, generator=draw),
        key_transform=turn * entry,
        key_inverse=(turn / (entry * (dim & -dim))).mT.contiguous(),
        value_mirror=mirror(torch.randn(heads, dim, generator=draw)),
        value_size=spread * (0.9 + 0.2 * torch.rand(heads, generator=draw)),
        rotary=rotaries[dim],
    )
