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

from kv_cache.rotary import Rotary
from kv_cache.scales import MATRIX_DTYPE, SCALES_FILE, SCHEMA, KVScales, LayerScales
from kv_cache.transforms import hadamard_sums, mirror
from kv_cache.user_cache import cache_dir

if TYPE_CHECKING:
    from vllm_ext.compat import VllmConfig

DUMMY_STD = 1e-3 / math.sqrt(3)
"""Standard deviation of vLLM's dummy weights, drawn evenly from -1e-3 to 1e-3."""


def make(config: VllmConfig) -> Path:
    """Return a folder with random scales for a model's shape, kept between starts."""
    model = config.model_config
    text = model.hf_text_config
    shape = model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size()
    rotary = _rotary(text, shape[-1], model.max_model_len)
    described = f"{SCHEMA} {shape} {text.hidden_size} {rotary.max_position} {rotary.inv_freq.tolist()}"
    folder = cache_dir() / "kv-scales" / f"dummy-{hashlib.sha256(described.encode()).hexdigest()[:24]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / SCALES_FILE).is_file():
            # Keys and values of a dummy model: a normalized input, times the norm's and the projection's weights.
            random_scales(*shape, DUMMY_STD**2 * math.sqrt(text.hidden_size), rotary).save(folder)
    return folder


def _rotary(text: Any, dim: int, max_position: int) -> Rotary:
    parameters = getattr(text, "rope_parameters", None) or {}
    theta = float(parameters.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0)
    share = parameters.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None) or 1.0
    rotated = int(dim * float(share))
    return Rotary.over(dim, theta ** -(torch.arange(0, rotated, 2) / rotated), max_position)


def random_scales(layers: int, heads: int, dim: int, spread: float, rotary: Rotary) -> KVScales:
    """Return scales for layers of ``heads`` KV heads of ``dim`` channels.

    Args:
        layers: of the model.
        heads: KV heads of a layer.
        dim: channels of a head.
        spread: standard deviation of keys and values.
        rotary: of the model.

    """
    draw = torch.Generator().manual_seed(0)
    # Hadamard's matrix times its transpose is the length of a run times the identity, so that inverses need no LAPACK,
    # which this process must not call.
    mixed = hadamard_sums(torch.eye(dim))
    entry = torch.tensor(1 / (spread * math.sqrt(dim & -dim))).to(MATRIX_DTYPE).float()
    made = []
    for _ in range(layers):
        signs = torch.randint(2, (heads, 1, dim), generator=draw) * 2 - 1
        turn = mixed[:, torch.randperm(dim, generator=draw)] * signs
        made.append(
            LayerScales(
                key_mean=spread * torch.randn(heads, dim, generator=draw),
                key_first=spread * torch.randn(heads, dim, generator=draw),
                key_transform=turn * entry,
                key_inverse=(turn / (entry * (dim & -dim))).mT.contiguous(),
                value_mirror=mirror(torch.randn(heads, dim, generator=draw)),
                value_size=spread * (0.9 + 0.2 * torch.rand(heads, generator=draw)),
                rotary=rotary,
            )
        )
    # Every mixed layer is another one than its neighbours: 3.5 bits of codes, as a budget might choose them.
    bits = [((4, 3), (3, 4), (4, 4), (3, 3))[index % 4] for index in range(layers)]
    return KVScales(made, bits, {"dummy": True})
