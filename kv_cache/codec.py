"""The specification of the codes in plain PyTorch: quantize, pack into a page, unpack, dequantize.

Every kernel is tested against this file. It is written to be read, and is slow.
"""

from __future__ import annotations

import torch

from kv_cache.errors import ParetoError
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


def fused_multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return ``a * b + c`` rounded once, float32.

    Products of float32 are exact in float64; the sum's second rounding differs from a single one once in 2**29.
    """
    return (a.double() * b.double() + c.double()).float()


def quantize_with_feedback(scaled: torch.Tensor, feedback: torch.Tensor, bits: int) -> torch.Tensor:
    """Round channels from the last to the first, handing each one's error on to those that follow.

    The rounding of GPTQ (Frantar et al. 2022) and LDLQ (Chee et al. 2023, "QuIP", section 3) applied to a key or value:
    with the feedback of kv_cache/transforms.py for a positive definite H, the sum of ``e^T H e`` over the errors e is
    as small as rounding one channel after the other can make it.

    Args:
        scaled: float32 [..., heads, head_dim], in codes: ``code = round(scaled)`` without feedback.
        feedback: float32 [heads, head_dim, head_dim], strictly lower triangular.
        bits: of a code.

    Returns:
        uint8 codes of the shape of ``scaled``. A NaN makes its channel, and those after it, code 0.

    """
    scaled, codes = scaled.float().clone(), torch.zeros(scaled.shape, dtype=torch.uint8)
    for i in reversed(range(scaled.shape[-1])):
        rounded = scaled[..., i].nan_to_num(0.0).clamp(0, 2**bits - 1).round()
        codes[..., i] = rounded.to(torch.uint8)
        error = (scaled[..., i] - rounded)[..., None]  # of what was fed back too
        scaled[..., :i] = fused_multiply_add(feedback[:, i, :i], error, scaled[..., :i])
    return codes


def quantize_side(
    x: torch.Tensor, scales: LayerScales, kind: str, bits: int, positions: torch.Tensor | None
) -> torch.Tensor:
    """Return the codes of a static format's keys or values, with all that its scales ask for.

    Keys are centred, transformed (sums from the first channel on, starting at the zero, fused), scaled and rounded with
    feedback; each step only if its part is there.

    Args:
        x: [tokens, heads, head_dim], any float dtype.
        scales: the layer's.
        kind: "key" or "value".
        bits: of a code.
        positions: int64 [tokens], for centred keys.

    Returns:
        uint8 codes of x's shape.

    """
    scale, zero = getattr(scales, f"{kind}_scale"), getattr(scales, f"{kind}_zero")
    feedback = getattr(scales, f"{kind}_feedback")
    if feedback is None:
        return quantize(x, scale, zero, bits)
    x = x.float()
    if kind == "value" or scales.key_encode is None:
        return quantize_with_feedback(x * (1.0 / scale) + zero, feedback, bits)
    if scales.key_mean is not None:
        x = x - centres(scales, positions)
    scaled = zero.expand(x.shape)
    for j in range(x.shape[-1]):
        scaled = fused_multiply_add(scales.key_encode[:, :, j], x[..., j, None], scaled)
    return quantize_with_feedback(scaled, feedback, bits)


def dequantize_side(
    codes: torch.Tensor,
    scales: LayerScales,
    kind: str,
    positions: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the keys or values that codes of a static format read as.

    Args:
        codes: uint8 [tokens, heads, head_dim].
        scales: the layer's.
        kind: "key" or "value".
        positions: int64 [tokens], for centred keys.
        dtype: of the arithmetic and the result.

    """
    scale, zero = (getattr(scales, f"{kind}_{part}").to(dtype) for part in ("scale", "zero"))
    x = dequantize(codes, scale, zero)
    if kind == "key" and scales.key_inverse is not None:
        x = torch.einsum("hcd,thd->thc", scales.key_inverse.to(dtype), x)
        if scales.key_mean is not None:
            x = x + centres(scales, positions).to(dtype)
    return x


def centres(scales: LayerScales, positions: torch.Tensor | None) -> torch.Tensor:
    """Return the centres [tokens, heads, head_dim] of centred keys at some positions, float32."""
    assert scales.key_mean is not None
    assert scales.rotary is not None
    if positions is None:
        raise ParetoError("centred keys need their positions")
    return scales.rotary.table(int(positions.max()) + 1).centre(scales.key_mean, positions)


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


def _encode(
    x: torch.Tensor, kind: str, bits: int, fmt: KVFormat, scales: LayerScales | None, positions: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return the rows [tokens, heads, row bytes] of one side's planes; x is [tokens, heads, head_dim]."""
    if scales is not None:
        return _planes(kind, quantize_side(x, scales, kind, bits, positions), bits)
    codes, scale, minimum = quantize_groups(x, bits, fmt.group_size)
    return {f"{kind}_meta": torch.stack([scale, minimum], -1).flatten(2).view(torch.uint8)} | _planes(kind, codes, bits)


def write_pages(
    cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    layout: PageLayout,
    scales: LayerScales | None,
    positions: torch.Tensor | None = None,
) -> None:
    """Quantize tokens and write them into their slots.

    Args:
        cache: uint8 [blocks, KV heads, block_size, bytes per token], of any block and head stride.
        key: [tokens, KV heads, head_dim]; ``value`` likewise.
        slots: int64 [tokens], ``block * block_size + offset``; a negative slot is skipped.
        layout: of the page.
        scales: the layer's scales; None for a ``group`` format.
        positions: int64 [tokens], of each token in its sequence; needed for centred keys.

    """
    fmt = layout.fmt
    rows = _encode(key, "key", fmt.key_bits, fmt, scales, positions)
    rows |= _encode(value, "value", fmt.value_bits, fmt, scales, None)
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, layout.block_size)
        for head in range(key.shape[1]):
            page = cache[block, head].view(-1)
            for plane, row in rows.items():
                _plane_view(page, layout, plane)[offset] = row[token, head]


def read_page(
    page: torch.Tensor,
    layout: PageLayout,
    scales: LayerScales | None,
    head: int,
    dtype: torch.dtype = torch.float32,
    first_position: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values [block_size, head_dim] that a page of one head holds.

    Args:
        page: uint8 [page bytes], contiguous.
        layout: of the page.
        scales: the layer's scales; None for a ``group`` format.
        head: KV head, an index into ``scales``.
        dtype: of the result; float64 makes a reference for kernels.
        first_position: in its sequence, of the page's first token; needed for centred keys.

    """
    fmt, result = layout.fmt, []
    planes = {name: _plane_view(page, layout, name) for name, row in layout.row_bytes().items() if row}
    positions = None if first_position is None else first_position + torch.arange(layout.block_size)
    for kind, bits in (("key", fmt.key_bits), ("value", fmt.value_bits)):
        codes = _codes(kind, planes, bits)
        if scales is None:
            meta = planes[f"{kind}_meta"].contiguous().view(torch.float16).view(layout.block_size, -1, 2)
            result.append(dequantize_groups(codes, meta[..., 0], meta[..., 1], fmt.group_size, dtype))
        else:
            mine = scales.heads(head, head + 1)
            result.append(dequantize_side(codes[:, None], mine, kind, positions, dtype)[:, 0])
    return result[0], result[1]
