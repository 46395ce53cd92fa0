"""The specification of the codes in plain PyTorch: quantize, pack into a page, unpack, dequantize.

Every kernel is tested against this file. It is written to be read, and is slow.
"""

from __future__ import annotations

import torch

from kv_cache.formats import KVFormat
from kv_cache.layout import PageLayout
from kv_cache.scales import LayerScales

FLOAT16_MAX = 65504.0


def quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes of a static format.

    ``code = clamp(round(x * (1 / scale) + zero), 0, 2**bits - 1)``, in float32, ties to even; NaN becomes code 0.

    Args:
        x: [..., heads, head_dim], any float dtype.
        scale: [heads, head_dim] float32, positive.
        zero: [heads, head_dim] float32.
        bits: of a code.

    Returns:
        uint8 codes of x's shape.

    """
    codes = torch.round(x.float() * (1.0 / scale) + zero)
    return codes.nan_to_num(0.0).clamp(0, 2**bits - 1).to(torch.uint8)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return ``(code - zero) * scale`` in the dtype of ``scale``."""
    return (codes.to(scale.dtype) - zero) * scale


def quantize_groups(x: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize each token's groups of channels with a scale and minimum of their own.

    ``minimum = float16(min)``, ``scale = float16((max - minimum) / (2**bits - 1))``, and
    ``code = clamp(round((x - minimum) * (1 / scale)), 0, 2**bits - 1)``; a group whose scale rounds to 0 has codes 0.

    Args:
        x: [..., head_dim], any float dtype; magnitudes above float16's are cut to it.
        bits: of a code.
        group_size: channels of a group; the last group may be shorter.

    Returns:
        uint8 codes of x's shape, float16 scales and float16 minima of shape [..., groups].

    """
    x = x.float().nan_to_num(0.0).clamp(-FLOAT16_MAX, FLOAT16_MAX)
    top = 2**bits - 1
    codes, scales, minima = [], [], []
    for group in x.split(group_size, dim=-1):
        minimum = group.amin(-1, keepdim=True).half()
        spread = group.amax(-1, keepdim=True) - minimum.float()
        scale = (spread * (1.0 / top)).clamp(0.0, FLOAT16_MAX).half()
        inverse = torch.where(scale > 0, 1.0 / scale.float(), 0.0)
        codes.append(torch.round((group - minimum.float()) * inverse).clamp(0, top).to(torch.uint8))
        scales.append(scale)
        minima.append(minimum)
    return torch.cat(codes, -1), torch.cat(scales, -1), torch.cat(minima, -1)


def dequantize_groups(
    codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return ``code * scale + minimum`` of each group, in ``dtype``."""
    width = codes.shape[-1]
    spread = [t.to(dtype).repeat_interleave(group_size, -1)[..., :width] for t in (scales, minima)]
    return codes.to(dtype) * spread[0] + spread[1]


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes [..., D] into bytes [..., D/2]: channel j low, channel j + D/2 high."""
    low, high = codes.chunk(2, dim=-1)
    return (low & 15) | (high << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack_nibbles`."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Pack 2-bit codes [..., D] into bytes [..., D/4]: channels j, j + D/4, j + D/2, j + 3D/4, lowest bits first."""
    a, b, c, d = codes.chunk(4, dim=-1)
    return (a & 3) | ((b & 3) << 2) | ((c & 3) << 4) | ((d & 3) << 6)


def unpack_pairs(packed: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack_pairs`."""
    return torch.cat([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)


def _planes(kind: str, codes: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    if bits == 8:
        return {kind: codes}
    if bits == 6:
        return {kind: pack_nibbles(codes & 15), f"{kind}_high": pack_pairs(codes >> 4)}
    return {kind: pack_nibbles(codes)}


def _codes(kind: str, planes: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    if bits == 8:
        return planes[kind]
    codes = unpack_nibbles(planes[kind])
    return codes | (unpack_pairs(planes[f"{kind}_high"]) << 4) if bits == 6 else codes


def _plane_view(page: torch.Tensor, layout: PageLayout, plane: str) -> torch.Tensor:
    """Return a view [tokens, row bytes] of one plane of a page ([page bytes] uint8, contiguous)."""
    offset, row = layout.offsets()[plane], layout.row_bytes()[plane]
    return page[offset : offset + row * layout.block_size].view(layout.block_size, row)


def encode_token(
    key: torch.Tensor, value: torch.Tensor, fmt: KVFormat, scales: LayerScales | None, head: int
) -> dict[str, torch.Tensor]:
    """Return the rows of every plane for one token of one head.

    Args:
        key: [head_dim], any float dtype; ``value`` likewise.
        fmt: the format.
        scales: the layer's scales; None for a ``group`` format.
        head: KV head, an index into ``scales``.

    """
    rows: dict[str, torch.Tensor] = {}
    for kind, x, bits in (("key", key, fmt.key_bits), ("value", value, fmt.value_bits)):
        if scales is None:
            codes, scale, minimum = quantize_groups(x, bits, fmt.group_size)
            rows[f"{kind}_meta"] = torch.stack([scale, minimum], -1).flatten().view(torch.uint8)
        else:
            scale, zero = getattr(scales, f"{kind}_scale")[head], getattr(scales, f"{kind}_zero")[head]
            codes = quantize(x, scale, zero, bits)
        rows |= _planes(kind, codes, bits)
    return rows


def write_pages(
    cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    layout: PageLayout,
    scales: LayerScales | None,
) -> None:
    """Quantize tokens and write them into their slots.

    Args:
        cache: uint8 [blocks, KV heads, block_size, bytes per token], of any block and head stride.
        key: [tokens, KV heads, head_dim]; ``value`` likewise.
        slots: int64 [tokens], ``block * block_size + offset``; a negative slot is skipped.
        layout: of the page.
        scales: the layer's scales; None for a ``group`` format.

    """
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, layout.block_size)
        for head in range(key.shape[1]):
            page = cache[block, head].view(-1)
            for plane, row in encode_token(key[token, head], value[token, head], layout.fmt, scales, head).items():
                _plane_view(page, layout, plane)[offset] = row


def read_page(
    page: torch.Tensor, layout: PageLayout, scales: LayerScales | None, head: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values [block_size, head_dim] that a page of one head holds.

    Args:
        page: uint8 [page bytes], contiguous.
        layout: of the page.
        scales: the layer's scales; None for a ``group`` format.
        head: KV head, an index into ``scales``.
        dtype: of the result; float64 makes a reference for kernels.

    """
    fmt, result = layout.fmt, []
    planes = {name: _plane_view(page, layout, name) for name, row in layout.row_bytes().items() if row}
    for kind, bits in (("key", fmt.key_bits), ("value", fmt.value_bits)):
        codes = _codes(kind, planes, bits)
        if scales is None:
            meta = planes[f"{kind}_meta"].contiguous().view(torch.float16).view(layout.block_size, -1, 2)
            result.append(dequantize_groups(codes, meta[..., 0], meta[..., 1], fmt.group_size, dtype))
        else:
            scale, zero = getattr(scales, f"{kind}_scale")[head], getattr(scales, f"{kind}_zero")[head]
            result.append(dequantize(codes, scale.to(dtype), zero.to(dtype)))
    return result[0], result[1]
