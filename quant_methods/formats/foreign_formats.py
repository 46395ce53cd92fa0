"""Layers in the layouts of other tools, read back: GPTQ (AutoGPTQ, GPTQModel), AWQ (AutoAWQ) and MXFP4 (gpt-oss).

GPTQ and AWQ store a linear layer as ``qweight``, ``qzeros`` and ``scales``, transposed: input channels along the rows.
Codes are unsigned; a weight is ``(code - zero) * scale`` with the zero-point and scale of its input channel's group.

GPTQ packs the codes of neighbouring input channels into int32 words as one little-endian stream of bits (so that a
3-bit code may straddle two words), and zero-points likewise along the output channels. ``g_idx`` names each input
channel's group: groups are not runs of channels where activations were sorted (``desc_act``). What
``checkpoint_format: gptq`` (v1, AutoGPTQ) stores as a zero-point is one less than it; ``gptq_v2`` stores it plainly.
Sources: AutoGPTQ 0.7.1, ``nn_modules/qlinear/qlinear_cuda.py``; GPTQModel, ``utils/model.py``,
``convert_gptq_v1_to_v2_format_module``.

AWQ's gemm layout packs eight output channels into an int32 word in the order 0, 2, 4, 6, 1, 3, 5, 7 (AutoAWQ 0.2.9,
``modules/linear/gemm.py``), zero-points too; groups are runs of input channels.

MXFP4 (OCP Microscaling Formats 1.0, 2023) stores 32 numbers of four bits, which share a power of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.grid_codes import GridCodes

GPTQ_BITS = (2, 3, 4, 8)
# Which output channel of eight lies in which four bits of a word, the lowest first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower three bits of a four-bit floating-point number (E2M1) mean; the highest one is the sign."""


def unpack_stream(words: Tensor, bits: int, count: int | None = None) -> Tensor:
    """Return the codes of a little-endian stream of bits.

    Args:
        words: int32 [n, columns]; each column is a stream, its first word lowest.
        bits: of a code.
        count: codes of a stream; None: as many as the words hold, of which ``32 * n`` is a multiple of ``bits``.

    Returns:
        int32 [count, columns], unsigned codes.

    Raises:
        ParetoError: the words hold no whole number of codes.

    """
    rows = words.shape[0]
    if count is None and 32 * rows % bits:
        raise ParetoError(f"{rows} words of 32 bits do not hold a whole number of {bits}-bit codes")
    # Python's >> on a negative int32 drags the sign along; int64 with the sign cleared does not.
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    first = torch.arange(32 * rows // bits if count is None else count, device=words.device) * bits
    word, offset = first // 32, first % 32
    joined = unsigned[word] | (unsigned[(word + 1).clamp(max=rows - 1)] << 32)
    return ((joined >> offset[:, None]) & ((1 << bits) - 1)).to(torch.int32)


def unpack_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int
) -> GridCodes:
    """Return the codes of a layer in the GPTQ layout.

    Args:
        qweight: int32 [in * bits / 32, out].
        qzeros: int32 [groups, out * bits / 32].
        scales: [groups, out] floating point.
        g_idx: int32 [in], the group of each input channel; None: groups are runs of equal length.
        bits: of a code: 2, 3, 4 or 8.
        zero_offset: 1 for v1, whose stored zero-points are one less than they mean; 0 for v2. The sum is not wrapped to
            ``bits`` bits (a stored 15 means 16), as in vLLM's kernels (csrc, gptq/q_gemm.cu).

    Raises:
        ParetoError: the shapes contradict each other.

    """
    codes = unpack_stream(qweight, bits)
    zeros = unpack_stream(qzeros.T, bits).T + zero_offset
    return _transposed(codes, zeros, scales, g_idx, bits)


def unpack_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> GridCodes:
    """Return the codes of a layer in AWQ's gemm layout (4 bits).

    Args:
        qweight: int32 [in, out / 8].
        qzeros: int32 [groups, out / 8].
        scales: [groups, out] floating point.

    Raises:
        ParetoError: the shapes contradict each other.

    """
    return _transposed(_unpack_awq_words(qweight), _unpack_awq_words(qzeros), scales, None, 4)


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return weights in the MXFP4 layout.

    Args:
        blocks: uint8 [..., rows, groups, 16], 32 numbers of a row two in a byte, the first one in the lower bits.
        scales: uint8 [..., rows, groups], the exponent of a group's power of two plus 127.

    Returns:
        bfloat16 [..., rows, 32 * groups], which holds them exactly.

    Raises:
        ParetoError: the shapes or dtypes contradict each other.

    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.shape != (*scales.shape, 16):
        raise ParetoError(
            f"MXFP4 blocks {blocks.dtype} {list(blocks.shape)} and scales {scales.dtype} {list(scales.shape)} do not "
            "belong together: a group has 16 bytes and one scale"
        )
    positive = torch.tensor(FP4, dtype=torch.bfloat16, device=blocks.device)
    table = torch.cat([positive, -positive])
    result = torch.empty(*blocks.shape, 2, dtype=torch.bfloat16, device=blocks.device)
    # One matrix at a time: an index takes eight bytes a number.
    rows, groups = scales.shape[-2:]
    matrices = (
        result.view(-1, rows, groups, 16, 2),
        blocks.reshape(-1, rows, groups, 16),
        scales.reshape(-1, rows, groups),
    )
    for part, bytes_, exponents in zip(*matrices, strict=True):
        power = torch.exp2(exponents.float() - 127).to(torch.bfloat16)[..., None]
        for place, codes in enumerate((bytes_ & 15, bytes_ >> 4)):
            torch.mul(table[codes.long()], power, out=part[..., place])
    return result.flatten(-3)


def regrouped(grid: GridCodes, g_idx: Tensor) -> GridCodes:
    """Return codes whose input channels belong to the groups that ``g_idx`` [in] names, as runs of equal length.

    Where they are none, each channel becomes a group of its own.

    Raises:
        ParetoError: a channel's group does not exist.

    """
    channels, groups = grid.codes.shape[1], grid.scale.shape[1]
    if g_idx.shape != (channels,) or not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise ParetoError(f"g_idx {list(g_idx.shape)} does not name one of {groups} groups for {channels} channels")
    index = g_idx.long()
    if channels % groups == 0 and torch.equal(
        index, torch.arange(channels, device=index.device) // (channels // groups)
    ):
        return grid
    return GridCodes(grid.codes, grid.scale[:, index], grid.zero_point[:, index], grid.bits)


def _unpack_awq_words(words: Tensor) -> Tensor:
    """Return int32 [rows, 8 * columns] of int32 [rows, columns]."""
    shifts = torch.arange(8, dtype=torch.int32, device=words.device) * 4
    stored = (words[:, :, None] >> shifts) & 0xF
    plain = torch.empty_like(stored)
    plain[:, :, list(AWQ_ORDER)] = stored
    return plain.flatten(1)


def _transposed(codes: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int) -> GridCodes:
    """Return the grid of unsigned codes [in, out], zero-points and scales [groups, out]."""
    channels, groups = codes.shape[0], scales.shape[0]
    whole = g_idx is not None or channels % groups == 0
    if codes.shape[1] != scales.shape[1] or zeros.shape != scales.shape or not whole:
        raise ParetoError(
            f"codes {list(codes.shape)}, zero-points {list(zeros.shape)} and scales {list(scales.shape)} do not belong "
            "together"
        )
    half = 1 << (bits - 1)
    # A zero-point of v1 may be 2^bits, one more than a signed code of 8 bits holds.
    zero = (zeros.T - half).to(torch.int16).contiguous()
    grid = GridCodes((codes.T - half).to(torch.int8), scales.T.contiguous(), zero, bits)
    return grid if g_idx is None else regrouped(grid, g_idx)
