"""The specification of the codes in plain PyTorch: quantize, pack into a page, unpack, dequantize.

Every kernel is tested against this file. It is written to be read, and is slow.

A token's key or value of one head goes three steps, in float32:

1. It is made even (`even_keys`, `even_values`): channels of about equal spread and importance, of size about 1.
2. Its range, widened to hold 0 and cut to ``RANGE_SHARE``, gives the scale and the zero, one byte each (`fit`).
3. Codes are ``clamp(round(GAIN * y / step + zero), 0, 2**bits - 1)`` (`quantize`), read as ``(code - zero) * step``.

The scale's byte is a floating-point number of 4 exponent and 4 mantissa bits, ``(1 + m / 16) * 2**(e - 10)``, in
units of ``2**(2 - bits)``: byte 160 means 1, and what is even has a scale of about 1 whatever the bits. The zero's byte
counts 256ths of the codes' range. Codes are made with the rounded scale and zero, so neither rounding is an error of
its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from kv_cache.formats import GAIN, PLANES, RANGE_SHARE, KVFormat
from kv_cache.layout import META, PageLayout
from kv_cache.scales import LayerScales
from kv_cache.transforms import hadamard_sums

EXPONENT_BIAS, MANTISSA_BITS = 10, 4
"""Of the byte that is a token's scale."""
_UNIT_BYTE = (127 - EXPONENT_BIAS) << MANTISSA_BITS
_MANTISSA_SHIFT = 23 - MANTISSA_BITS


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return ``a * b + c`` in c's dtype, of float32 numbers rounded once.

    Products of float32 are exact in float64; the sum's second rounding differs from a single one once in 2**29.
    """
    return (a.double() * b.double() + c.double()).to(c.dtype)


def encode_scale(scale: Tensor) -> Tensor:
    """Return the nearest byte to a positive float32 scale, in units of the bits; 0 or 255 where it is out of range.

    A float32's bits, rounded half up to MANTISSA_BITS of its mantissa, are the byte but for the exponents' bias.
    """
    bits = scale.float().contiguous().view(torch.int32) + (1 << (_MANTISSA_SHIFT - 1))
    return ((bits >> _MANTISSA_SHIFT) - _UNIT_BYTE).clamp(0, 255).to(torch.uint8)


def decode_scale(byte: Tensor) -> Tensor:
    """Return what a scale's byte means, float32, in units of ``2**(2 - bits)``."""
    return ((byte.to(torch.int32) + _UNIT_BYTE) << _MANTISSA_SHIFT).view(torch.float32)


def factors(bits: int) -> tuple[float, float, float]:
    """Return what `fit` multiplies a range by, and what lies below 0 in steps, and what `quantize` multiplies by."""
    share = RANGE_SHARE[bits] * GAIN[bits]
    return share * 2.0 ** (bits - 2) / (2**bits - 1), share * 2.0 ** (8 - bits), GAIN[bits]


def fit(y: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Choose the scale and the zero of each token.

    Args:
        y: float32 [..., channels], made even, without NaN.
        bits: of a code.

    Returns:
        The bytes of scale and zero, uint8 [...].

    """
    low, high = y.amin(-1).clamp_max(0.0), y.amax(-1).clamp_min(0.0)
    to_scale, to_zero, _ = factors(bits)
    scale = encode_scale((high - low) * torch.tensor(to_scale))
    zero = -low * inverse_step(scale, bits) * torch.tensor(to_zero)
    return scale, zero.nan_to_num(0.0).round().clamp(0, 255).to(torch.uint8)


def inverse_step(scale: Tensor, bits: int) -> Tensor:
    """Return 1 / step of a scale's byte, float32, rounded once."""
    return 2.0 ** (bits - 2) / decode_scale(scale)


def quantize(y: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, and the scale and the zero that they are read with.

    Args:
        y: float32 [..., channels], made even; NaN counts as 0.
        bits: of a code.

    Returns:
        uint8 codes of y's shape, and uint8 scales and zeros [...].

    """
    y = torch.where(y.isnan(), 0.0, y.float())
    scale, zero = fit(y, bits)
    inverse, shift = inverse_step(scale, bits) * torch.tensor(factors(bits)[2]), zero.float() * 2.0 ** (bits - 8)
    scaled = fused_multiply_add(y, inverse[..., None], shift[..., None])
    return scaled.clamp(0, 2**bits - 1).round().to(torch.uint8), scale, zero


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``(code - zero) * step``, still even, in ``dtype``; shapes as `quantize` returns them."""
    step, shift = decode_scale(scale).to(dtype) * 2.0 ** (2 - bits), zero.to(dtype) * 2.0 ** (bits - 8)
    return (codes.to(dtype) - shift[..., None]) * step[..., None]


def centres(scales: LayerScales, positions: Tensor | None) -> Tensor:
    """Return the centres of keys at some positions, float32 [tokens, heads, head_dim], on the device of the scales.

    Raises:
        ParetoError: no positions.

    """
    if positions is None:
        raise ParetoError("keys need their positions")
    table = scales.rotary.table(int(positions.max()) + 1 if len(positions) else 1)
    positions = positions.to(scales.key_mean.device)
    centre = table.centre(scales.key_mean, positions)
    centre[positions == 0] = scales.key_first
    return centre


def even_keys(key: Tensor, scales: LayerScales, positions: Tensor | None) -> Tensor:
    """Return keys less their centre, transformed: sums from the first channel on, fused.

    Args:
        key: [tokens, heads, head_dim], any float dtype, after rotary embedding.
        scales: the layer's.
        positions: int64 [tokens], in the sequence.

    """
    x = key.float() - centres(scales, positions)
    y = torch.zeros_like(x)
    for j in range(x.shape[-1]):
        y = fused_multiply_add(scales.key_transform[:, :, j], x[..., j, None], y)
    return y


def reflect(x: Tensor, mirror: Tensor) -> Tensor:
    """Return ``x - mirror (mirror . x)`` of [..., heads, channels] and [heads, channels], in x's dtype.

    Products are summed fused over the channels c, c + w, c + 2 w and so on, then the w sums by neighbours, with w a
    quarter of the number of channels, made up to a power of two.
    """
    dim = x.shape[-1]
    width = max(1 << (dim - 1).bit_length() >> 2, 1)
    sums = torch.zeros(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    for part, normal in zip(x.split(width, -1), mirror.split(width, -1), strict=True):
        count = part.shape[-1]
        sums[..., :count] = fused_multiply_add(normal, part, sums[..., :count])
    while sums.shape[-1] > 1:
        sums = sums[..., ::2] + sums[..., 1::2]
    return fused_multiply_add(-sums, mirror, x)


def even_values(value: Tensor, scales: LayerScales) -> Tensor:
    """Return values, [tokens, heads, head_dim] of any float dtype, reflected, mixed and brought to size 1."""
    return hadamard_sums(reflect(value.float(), scales.value_mirror)) * scales.value_encode[:, None]


def uneven_keys(y: Tensor, scales: LayerScales, positions: Tensor | None) -> Tensor:
    """Undo `even_keys`, in y's dtype."""
    return torch.einsum("hcd,thd->thc", scales.key_inverse.to(y.dtype), y) + centres(scales, positions).to(y.dtype)


def uneven_values(y: Tensor, scales: LayerScales) -> Tensor:
    """Undo `even_values`, in y's dtype."""
    return reflect(hadamard_sums(y) * scales.value_decode[:, None].to(y.dtype), scales.value_mirror)


def pack_plane(part: Tensor, width: int) -> Tensor:
    """Pack numbers below ``2**width``: bits k * width of byte j are channel ``j + k * bytes`` (kv_cache/layout.py).

    Args:
        part: uint8 [..., channels], channels a multiple of 8 / width.
        width: 1, 2, 4 or 8.

    Returns:
        uint8 [..., channels * width / 8].

    """
    runs = part.unflatten(-1, (8 // width, -1)).to(torch.int32)
    shifts = torch.arange(0, 8, width, dtype=torch.int32)
    return (runs << shifts[:, None]).sum(-2).to(torch.uint8)


def unpack_plane(packed: Tensor, width: int) -> Tensor:
    """Undo `pack_plane`."""
    shifts = torch.arange(0, 8, width, dtype=torch.int32)
    runs = (packed.to(torch.int32)[..., None, :] >> shifts[:, None]) & (2**width - 1)
    return runs.flatten(-2).to(torch.uint8)


def split_planes(codes: Tensor, bits: int) -> list[Tensor]:
    """Return the packed planes of codes of ``bits`` bits, from the lowest bits to the highest."""
    planes, at = [], 0
    for width in PLANES[bits]:
        planes.append(pack_plane(codes >> at & (2**width - 1), width))
        at += width
    return planes


def join_planes(planes: list[Tensor], bits: int) -> Tensor:
    """Undo `split_planes`."""
    codes, at = torch.zeros((), dtype=torch.uint8), 0
    for plane, width in zip(planes, PLANES[bits], strict=True):
        codes = codes | (unpack_plane(plane, width) << at)
        at += width
    return codes


def _plane_view(page: Tensor, layout: PageLayout, plane: str) -> Tensor:
    """Return a view [tokens, row bytes] of one plane of a page ([page bytes] uint8, contiguous)."""
    offset, row = layout.offsets[plane], layout.row_bytes[plane]
    return page[offset : offset + row * layout.block_size].view(layout.block_size, row)


def encode(key: Tensor, value: Tensor, fmt: KVFormat, scales: LayerScales, positions: Tensor) -> dict[str, Tensor]:
    """Return what tokens leave in each plane, uint8 [tokens, heads, row bytes] by the plane's name."""
    rows: dict[str, Tensor] = {}
    meta = []
    for kind, y in (("key", even_keys(key, scales, positions)), ("value", even_values(value, scales))):
        codes, scale, zero = quantize(y, fmt.bits(kind))
        rows |= {f"{kind}.{index}": plane for index, plane in enumerate(split_planes(codes, fmt.bits(kind)))}
        meta += [scale, zero]
    return rows | {META: torch.stack(meta, -1)}


def write_pages(
    cache: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    layout: PageLayout,
    scales: LayerScales,
    positions: Tensor,
) -> None:
    """Quantize tokens and write them into their slots.

    Args:
        cache: uint8 [blocks, KV heads, block_size, bytes per token], of any block and head stride.
        key: [tokens, KV heads, head_dim], after rotary embedding; ``value`` likewise.
        value: see ``key``.
        slots: int64 [tokens], ``block * block_size + offset``; a negative slot is skipped.
        layout: of the page.
        scales: the layer's.
        positions: int64 [tokens], of each token in its sequence.

    """
    rows = encode(key, value, layout.fmt, scales, positions)
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, layout.block_size)
        for head in range(key.shape[1]):
            page = cache[block, head].view(-1)
            for plane, row in rows.items():
                _plane_view(page, layout, plane)[offset] = row[token, head]


def read_page(
    page: Tensor,
    layout: PageLayout,
    scales: LayerScales,
    head: int,
    first_position: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return the keys and values [block_size, head_dim] that a page of one head holds.

    Args:
        page: uint8 [page bytes], contiguous.
        layout: of the page.
        scales: the layer's.
        head: KV head, an index into ``scales``.
        first_position: in its sequence, of the page's first token.
        dtype: of the result; float64 makes a reference for kernels.

    """
    mine = scales.heads(head, head + 1)
    meta = _plane_view(page, layout, META)
    even = []
    for index, kind in enumerate(("key", "value")):
        bits = layout.fmt.bits(kind)
        planes = [_plane_view(page, layout, name) for name in layout.row_bytes if name.startswith(kind)]
        even.append(dequantize(join_planes(planes, bits), meta[:, 2 * index], meta[:, 2 * index + 1], bits, dtype))
    positions = first_position + torch.arange(layout.block_size)
    return uneven_keys(even[0][:, None], mine, positions)[:, 0], uneven_values(even[1][:, None], mine)[:, 0]
