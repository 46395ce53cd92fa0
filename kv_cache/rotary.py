"""Rotary position embedding, as far as keys in a cache need it: turning them, and the centres of turned keys.

Keys of one head scatter around a mean. Rotary embedding turns that mean with the position and so spreads a constant
over each channel's whole range, where it takes most of the codes. Pages hold ``key - centre(position)``, and
``query . centre(position)`` is added to the logits. The first token's key, which draws much of the attention, is of
another kind than all others and nearly the same in every text; it has a centre of its own (kv_cache/scales.py).

A kernel computes that product on integers, from one small table for all requests, heads and layers: a position is
``SPAN * n + j``; the mean is turned by ``SPAN * n`` positions in floating point (once for SPAN tokens) and by the
remaining j with cosines and sines rounded to one byte. Store and attention use the same rounded numbers, so the
rounding cancels: ``centre`` below is the definition, and it need only be near the turned mean.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_cache.errors import ParetoError

SPAN = 256
"""Positions of the table of one-byte cosines and sines."""
HALF, MIDDLE = 127, 128
"""A byte b of the table means ``(b - MIDDLE) / HALF``."""


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotary position embedding of a model's attention, over all channels of a head.

    Channels that the model does not rotate are pairs of frequency 0, so that a centre covers them too; a model without
    rotary embedding has no others. Make one with `over`.

    Attributes:
        inv_freq: float [head_dim / 2], radians per position of each pair, scaled as the model scales it (transformers:
            ``model.rotary_emb.inv_freq``); 0 from pair ``rotated`` on.
        max_position: tokens of the longest context that the scales shall serve.
        rotated: pairs that the model rotates.
        interleaved: a rotated pair is channels 2i and 2i + 1 (GPT-J) rather than i and i + rotated (Llama).

    """

    inv_freq: Tensor
    max_position: int
    rotated: int
    interleaved: bool = False

    @classmethod
    def over(cls, head_dim: int, inv_freq: Tensor | None, max_position: int, interleaved: bool = False) -> Rotary:
        """Return the embedding of heads of ``head_dim`` channels, of which the first 2 * len(inv_freq) are rotated.

        Raises:
            ParetoError: more frequencies than pairs of channels, or no position.

        """
        given = torch.zeros(0) if inv_freq is None else inv_freq.detach().float().cpu()
        if max_position < 1 or given.dim() != 1 or 2 * given.numel() > head_dim:
            raise ParetoError(
                f"rotary frequencies {tuple(given.shape)} for {max_position} positions do not fit heads of {head_dim} "
                "channels"
            )
        padded = torch.nn.functional.pad(given, (0, head_dim // 2 - len(given)))
        return cls(padded, max_position, len(given), interleaved)

    def channels(self) -> tuple[Tensor, Tensor]:
        """Return the first and the second channel of every pair, int64 [head_dim / 2] each.

        Pairs that are not rotated are the neighbours 2i and 2i + 1, which lie behind the rotated channels.
        """
        pairs = torch.arange(self.inv_freq.numel())
        if self.interleaved:
            return 2 * pairs, 2 * pairs + 1
        turned = pairs < self.rotated
        return torch.where(turned, pairs, 2 * pairs), torch.where(turned, pairs + self.rotated, 2 * pairs + 1)

    def turn(self, x: Tensor, offset: int | Tensor) -> Tensor:
        """Return queries or keys moved ``offset`` positions on.

        Args:
            x: float32 [tokens, heads, head_dim], after rotary embedding.
            offset: positions to move by; one for all tokens, or int64 [tokens].

        """
        # Angles in float64: float32 holds a late position's angle to a few thousandths of a radian only.
        steps = torch.as_tensor(offset, dtype=torch.float64, device=x.device)
        angle = steps[..., None, None] * self.inv_freq.to(x.device, torch.float64)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = (channels.to(x.device) for channels in self.channels())
        turned = x.clone()
        turned[..., first] = x[..., first] * cos - x[..., second] * sin
        turned[..., second] = x[..., second] * cos + x[..., first] * sin
        return turned

    def table(self, tokens: int) -> CentreTable:
        """Return the table for positions below ``tokens``; the same object for the same number."""
        return _table(self, -(-tokens // SPAN))


@dataclass(frozen=True, eq=False)
class CentreTable:
    """Cosines and sines of SPAN positions in bytes, and of every SPAN-th position in float32.

    Attributes:
        rotary: what they are of.
        cos_codes: uint8 [SPAN, pairs]; ``sin_codes`` likewise.
        anchor_cos: float32 [anchors, pairs], of position SPAN * n; ``anchor_sin`` likewise.

    """

    rotary: Rotary
    cos_codes: Tensor
    sin_codes: Tensor
    anchor_cos: Tensor
    anchor_sin: Tensor

    @staticmethod
    def read(codes: Tensor) -> Tensor:
        """Return what bytes of the table mean, float32."""
        return (codes.float() - MIDDLE) / HALF

    def centre(self, mean: Tensor, positions: Tensor) -> Tensor:
        """Return the centres of keys at some positions, in float32 without fused operations.

        Args:
            mean: float32 [heads, head_dim], the keys' mean before rotary embedding, on any device.
            positions: int64 [tokens], below SPAN times the number of anchors, on the same device.

        Returns:
            float32 [tokens, heads, head_dim].

        """
        device, anchor, fine = mean.device, positions // SPAN, positions % SPAN
        first, second = (channels.to(device) for channels in self.rotary.channels())
        x, y = mean[:, first], mean[:, second]
        cos, sin = (table.to(device)[anchor, None] for table in (self.anchor_cos, self.anchor_sin))
        x, y = x * cos - y * sin, y * cos + x * sin
        # Read before they are moved: CUDA divides by a number by multiplying by its reciprocal, which rounds otherwise.
        cos, sin = (self.read(table).to(device)[fine, None] for table in (self.cos_codes, self.sin_codes))
        result = torch.zeros(len(positions), *mean.shape, device=device)
        result[..., first] = cos * x - sin * y
        result[..., second] = cos * y + sin * x
        return result


@functools.lru_cache(maxsize=8)
def _table(rotary: Rotary, anchors: int) -> CentreTable:
    frequencies = rotary.inv_freq.double().cpu()
    fine = torch.arange(SPAN, dtype=torch.float64)[:, None] * frequencies
    coarse = torch.arange(anchors, dtype=torch.float64)[:, None] * SPAN * frequencies
    codes = [(HALF * x).round().add(MIDDLE).to(torch.uint8) for x in (fine.cos(), fine.sin())]
    return CentreTable(rotary, codes[0], codes[1], coarse.cos().float(), coarse.sin().float())
