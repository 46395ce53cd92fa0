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

from kv_cache.formats import KVFormat
from kv_cache.rotary import Rotary
from kv_cache.scales import MATRIX_DTYPE, SCALES_FILE, KVScales, LayerScales
from quant_methods.model_source import cache_dir

if TYPE_CHECKING:
    from vllm.config import VllmConfig

DUMMY_STD = 1e-3 / math.sqrt(3)
"""Standard deviation of vLLM's dummy weights, drawn evenly from -1e-3 to 1e-3."""


def make(config: VllmConfig, fmt: KVFormat) -> Path:
    """Return a folder with random scales of one format for a model's shape, kept between starts."""
    model = config.model_config
    text = model.hf_text_config
    shape = model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size()
    described = f"{fmt.name} {shape} {text.hidden_size} {model.max_model_len} {_theta(text)}"
    folder = cache_dir() / "kv-scales" / f"dummy-{hashlib.sha256(described.encode()).hexdigest()[:24]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / SCALES_FILE).is_file():
            # Keys and values of a dummy model: a normalized input, times the norm's and the projection's weights.
            spread = DUMMY_STD**2 * math.sqrt(text.hidden_size)
            random_scales(fmt, *shape, spread, model.max_model_len, _theta(text)).save(folder)
    return folder


def _theta(text: Any) -> float:
    parameters = getattr(text, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0)


def random_scales(
    fmt: KVFormat, layers: int, heads: int, dim: int, spread: float, max_position: int, theta: float
) -> KVScales:
    """Return scales of one static format for layers of ``heads`` KV heads of ``dim`` channels.

    Args:
        fmt: the format.
        layers: of the model.
        heads: KV heads of a layer.
        dim: channels of a head.
        spread: standard deviation of keys and values.
        max_position: tokens of the longest context.
        theta: base of the rotary embedding.

    """
    draw = torch.Generator().manual_seed(0)

    def side(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Three standard deviations to either side of zero, a little different for each channel."""
        step = 6 * spread / (2**bits - 1) * (0.9 + 0.2 * torch.rand(heads, dim, generator=draw))
        return step, (2**bits - 1) / 2 + torch.rand(heads, dim, generator=draw) - 0.5

    def feedback() -> torch.Tensor:
        return torch.randn(heads, dim, dim, generator=draw).mul(0.05).tril(-1).to(MATRIX_DTYPE).float()

    rotary = None
    if fmt.granularity == "head" and fmt.key_bits == 4:
        rotary = Rotary(theta ** -(torch.arange(0, dim, 2) / dim), max_position)
    made = []
    for _ in range(layers):
        parts: dict[str, Any] = dict(zip(("key_scale", "key_zero"), side(fmt.key_bits), strict=True))
        parts |= dict(zip(("value_scale", "value_zero"), side(fmt.value_bits), strict=True))
        if rotary is not None:
            same = torch.eye(dim).expand(heads, dim, dim).contiguous()
            mean = spread * torch.randn(heads, dim, generator=draw)
            parts |= {"key_transform": same, "key_inverse": same, "key_mean": mean, "key_feedback": feedback()}
        if fmt.granularity == "head" and fmt.value_bits == 4:
            parts["value_feedback"] = feedback()
        made.append(LayerScales(**parts, rotary=rotary))
    return KVScales(layers, heads, dim, {fmt.name: made}, {"dummy": True}, rotary)
