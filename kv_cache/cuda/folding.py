"""What the decode kernel reads beside pages: a layer's scales as they fold into queries and outputs, and tables of the
centres by position."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from kv_cache.rotary import MIDDLE, SPAN, CentreTable
from kv_cache.scales import LayerScales


@dataclass(frozen=True)
class PositionTables:
    """A :class:`CentreTable` as ``csrc/bias.cuh`` reads it; one serves all requests, heads and layers.

    Attributes:
        operands: int16 [16, head_dim / 16, 8, 4, 2, 2, 2], cosines and sines of SPAN positions as subnormal float16
            numbers, in the order of the tensor cores' operands.
        far: float32 [anchors, head_dim], cosines, then sines, of every SPAN-th position.
        rotated: pairs of channels i and i + rotated; the rest are neighbours (:class:`kv_cache.rotary.Rotary`).
        interleaved: all pairs are neighbours.

    """

    operands: torch.Tensor
    far: torch.Tensor
    rotated: int
    interleaved: bool

    @classmethod
    def of(cls, table: CentreTable, device: torch.device) -> PositionTables:
        """Return the table on a device."""
        near = torch.cat([table.cos_codes, table.sin_codes], 1).int() - MIDDLE
        # Subnormal float16 numbers: a sign bit and an integer. Row g of a 16 x 16 operand is token g / 2 + 4 * (g % 2)
        # of its eight (`token_of` in csrc/codes.cuh). Lane (g, t) holds channels 4t and 4t + 1 of rows g and g + 8,
        # then channels 4t + 2 and 4t + 3 of them.
        bits = (near.abs() - 32768 * (near < 0)).to(torch.int16)
        rows = bits.view(SPAN // 16, 2, 2, 4, -1).transpose(2, 3)
        operands = rows.reshape(SPAN // 16, 2, 8, -1, 4, 2, 2).permute(0, 3, 2, 4, 5, 1, 6).contiguous()
        far = torch.cat([table.anchor_cos, table.anchor_sin], 1)
        return cls(operands.to(device), far.to(device), table.rotary.rotated, table.rotary.interleaved)


_position_tables = functools.lru_cache(maxsize=8)(PositionTables.of)


@dataclass(frozen=True)
class Folding:
    """One layer's scales as the kernels fold them into queries and outputs; float32, contiguous, on the device.

    Attributes:
        key_inverse: [KV heads, head_dim (of q), head_dim (of codes)]; logits are
            q @ key_inverse . (codes - zero) * step + q . centre.
        key_mean: [KV heads, head_dim], before rotary embedding.
        key_first: [KV heads, head_dim], the centre at position 0.
        value_output: [KV heads, head_dim + 4], what outputs need: ``value_mirror`` of
            :class:`kv_cache.scales.LayerScales`, then its ``value_decode``, then zeros up to a multiple of 16 bytes.
        positions: the centres' tables.

    """

    key_inverse: torch.Tensor
    key_mean: torch.Tensor
    key_first: torch.Tensor
    value_output: torch.Tensor
    positions: PositionTables

    @classmethod
    def of(cls, scales: LayerScales, max_tokens: int, device: torch.device) -> Folding:
        """Return a layer's scales so folded.

        Args:
            scales: the layer's.
            max_tokens: of the longest sequence.
            device: CUDA device.

        """
        decode = torch.nn.functional.pad(scales.value_decode[:, None], (0, 3))
        output = torch.cat([scales.value_mirror, decode], 1)
        folded = (scales.key_inverse, scales.key_mean, scales.key_first, output)
        inverse, mean, first, output = (tensor.float().to(device).contiguous() for tensor in folded)
        return cls(inverse, mean, first, output, _position_tables(scales.rotary.table(max_tokens), device))
