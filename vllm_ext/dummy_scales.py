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
from kv_cache.transforms import mixing
from quant_methods.model_source import cache_dir

if TYPE_CHECKING:
    from vllm.config import VllmConfig

DUMMY_STD = 1e-3 / math.sqrt(3)
"""Standard deviation of vLLM's dummy weights, drawn evenly from -1e-3 to 1e-3."""


def make(config: VllmConfig) -> Path:
    """Return a folder with random scales for a model's shape, kept between starts."""
    model = config.model_config
    text = model.hf_text_config
    shape = model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size()
    described = f"{SCHEMA} {shape} {text.hidden_size} {model.max_model_len} {_theta(text)}"
    folder = cache_dir() / "kv-scales" / f"dummy-{hashlib.sha256(described.encode()).hexdigest()[:24]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / SCALES_FILE).is_file():
            # Keys and values of a dummy model: a normalized input, times the norm's and the projection's weights.
            spread = DUMMY_STD**2 * math.sqrt(text.hidden_size)
            random_scales(*shape, spread, model.max_model_len, _theta(text)).save(folder)
    return folder


def _theta(text: Any) -> float:
    parameters = getattr(text, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0)


def random_scales(layers: int, heads: int, dim: int, spread: float, max_position: int, theta: float) -> KVScales:
    """Return scales for layers of ``heads`` KV heads of ``dim`` channels.

    Args:
        layers: of the model.
        heads: KV heads of a layer.
        dim: channels of a head.
        spread: standard deviation of keys and values.
        max_position: tokens of the longest context.
        theta: base of the rotary embedding.

    """
    draw = torch.Generator().manual_seed(0)
    rotary = Rotary.over(dim, theta ** -(torch.arange(0, dim, 2) / dim), max_position)
    transform = (mixing(dim) / spread).to(MATRIX_DTYPE).double().expand(heads, dim, dim).contiguous()
    # Orthogonal but for its scale and its rounding. LAPACK's threads do not stand a process that starts workers.
    inverse = (transform.mT * spread**2).float().contiguous()

    def layer() -> LayerScales:
        mean, first = (spread * torch.randn(heads, dim, generator=draw) for _ in range(2))
        return LayerScales(mean, first, transform.float(), inverse, torch.full((heads,), spread), rotary)

    # Every mixed layer is another one than its neighbours: 3.5 bits of codes, as a budget might choose them.
    bits = [((4, 3), (3, 4), (4, 4), (3, 3))[index % 4] for index in range(layers)]
    return KVScales(layers, heads, dim, [layer() for _ in range(layers)], bits, {"dummy": True})
