"""What the decode kernel reads beside pages: scales in the form that folds into queries and outputs, and the tables of
centred keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kv_cache.rotary import MIDDLE, SPAN, CentreTable
from kv_cache.scales import LayerScales


@dataclass(frozen=True)
class Folding:
    """One layer's scales as the kernels fold them into queries and outputs; float32, contiguous, on the device.

    Attributes:
        key: key scales [KV heads, head_dim]; or, of a format whose keys are transformed before they are quantized,
            [KV heads, head_dim (of q), head_dim (of codes)]: logits are q @ key . (codes - zero).
        key_zero: [KV heads, head_dim]; shifts every logit of a row equally, so only a soft cap sees it.
        value_scale: [KV heads, head_dim].
        value_zero: [KV heads, head_dim].
        mean: [KV heads, head_dim], of centred keys their mean before rotary embedding.

    """

    key: torch.Tensor
    key_zero: torch.Tensor
    value_scale: torch.Tensor
    value_zero: torch.Tensor
    mean: torch.Tensor | None = None

    @classmethod
    def of(cls, scales: LayerScales, device: torch.device) -> Folding:
        """Return a layer's scales so folded."""
        key = scales.key_scale if scales.key_decode is None else scales.key_decode
        mean = scales.key_mean
        key, key_zero, value_scale, value_zero = (
            t.to(device).contiguous() for t in (key, scales.key_zero, scales.value_scale, scales.value_zero)
        )
        return cls(key, key_zero, value_scale, value_zero, None if mean is None else mean.to(device).contiguous())


@dataclass(frozen=True)
class PositionTables:
    """A :class:`CentreTable` as ``csrc/bias.cuh`` reads it; one serves all requests, heads and layers.

    Attributes:
        operands: int16 [16, head_dim / 16, 8, 4, 2, 2, 2], cosines and sines of SPAN positions as subnormal float16
            numbers, in the order of the tensor cores' operands.
        far: float32 [anchors, head_dim], cosines, then sines, of every SPAN-th position.
        pairs: of channels that rotary embedding turns; the tables are 0 from there to head_dim / 2.
        interleaved: see :class:`kv_cache.rotary.Rotary`.

    """

    operands: torch.Tensor
    far: torch.Tensor
    pairs: int
    interleaved: bool

    @classmethod
    def of(cls, table: CentreTable, head_dim: int, device: torch.device) -> PositionTables:
        """Return the table for heads of that size."""
        pairs = table.cos_codes.shape[1]

        def side_by_side(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            both = torch.zeros(cos.shape[0], 2, head_dim // 2, dtype=cos.dtype)
            both[:, 0, :pairs], both[:, 1, :pairs] = cos.cpu(), sin.cpu()
            return both.flatten(1)

        near = side_by_side(table.cos_codes.int() - MIDDLE, table.sin_codes.int() - MIDDLE)
        # Subnormal float16 numbers: a sign bit and an integer. Lane (g, t) of a 16 x 16 operand holds channels 4t and
        # 4t + 1 of tokens g and g + 8, then channels 4t + 2 and 4t + 3 of them.
        bits = (near.abs() - 32768 * (near < 0)).to(torch.int16)
        operands = bits.view(SPAN // 16, 2, 8, -1, 4, 2, 2).permute(0, 3, 2, 4, 5, 1, 6).contiguous()
        far = side_by_side(table.anchor_cos, table.anchor_sin)
        return cls(operands.to(device), far.to(device), pairs, table.rotary.interleaved)
