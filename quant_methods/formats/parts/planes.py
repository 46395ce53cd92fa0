"""Codes of 2 to 8 bits cut into bit planes: int32 words in which no bit is wasted and shifts find each code.

``weight_plane8``, ``_plane4``, ``_plane2``, ``_plane1`` hold codes from 0 to 2^bits - 1, the code's lowest bits in the
widest plane: int32 [rows, inputs * width / 32]; the lowest bits of a word belong to the first of its input channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.part import Shapes, Stored

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Bits of a code to the widths of its planes, that of the lowest bits first."""
PREFIX = "weight_plane"
INPUT_MULTIPLE = 32
"""Input channels come in multiples of this, so that every plane's rows are whole words."""


def pack_codes(codes: Tensor, bits: int) -> dict[int, Tensor]:
    """Cut codes into bit planes.

    Args:
        codes: [rows, inputs] integers from 0 to 2^bits - 1; 32 divides ``inputs``.
        bits: of a code.

    Returns:
        A plane's width to its words, int32 [rows, inputs * width / 32].

    """
    planes, shift = {}, 0
    for width in PLANES[bits]:
        part = (codes.int() >> shift) & ((1 << width) - 1)
        places = torch.arange(0, 32, width, dtype=torch.int32, device=codes.device)
        # The places do not overlap, so the sum sets their bits; int32 wraps around into the sign bit as it should.
        words = (part.unflatten(1, (-1, 32 // width)) << places).sum(-1, dtype=torch.int32)
        planes[width] = words
        shift += width
    return planes


def unpack_codes(planes: Mapping[int, Tensor], bits: int) -> Tensor:
    """Put codes together again; the inverse of :func:`pack_codes`.

    Returns:
        uint8 [rows, inputs].

    """
    codes: Tensor | None = None
    shift = 0
    for width in PLANES[bits]:
        words = planes[width]
        places = torch.arange(0, 32, width, dtype=torch.int32, device=words.device)
        part = ((words[:, :, None] >> places) & ((1 << width) - 1)).to(torch.uint8).flatten(1) << shift
        codes = part if codes is None else codes | part
        shift += width
    assert codes is not None
    return codes


def plane_tensors(bits: int, rows: int, inputs: int) -> dict[str, Stored]:
    """Return the planes of codes [rows, inputs] by local name."""
    return {f"{PREFIX}{width}": Stored((rows, inputs * width // 32), torch.int32) for width in PLANES[bits]}


def packed_planes(codes: Tensor, bits: int) -> dict[str, Tensor]:
    """Return the planes of codes [rows, inputs] from 0, by local name.

    Raises:
        ParetoError: the input channels are no multiple of 32, or a code needs more bits.

    """
    if codes.shape[1] % INPUT_MULTIPLE:
        raise ParetoError(f"{codes.shape[1]} input channels; this format holds multiples of {INPUT_MULTIPLE}")
    if codes.min() < 0 or codes.max() >> bits:
        raise ParetoError(f"codes that do not fit into {bits} bits")
    return {f"{PREFIX}{width}": words for width, words in pack_codes(codes, bits).items()}


def unpacked_planes(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """Return the codes, uint8 [rows, inputs] from 0, of planes by local name."""
    return unpack_codes({width: tensors[f"{PREFIX}{width}"] for width in PLANES[bits]}, bits)


def plane_widths(shapes: Shapes) -> tuple[int, ...]:
    """Return the widths of the planes among a module's tensors, the widest first."""
    return tuple(width for width in (8, 4, 2, 1) if f"{PREFIX}{width}" in shapes)


def plane_size(shapes: Shapes) -> tuple[int, int]:
    """Return the rows and inputs of the codes in a module's planes."""
    widest = plane_widths(shapes)[0]
    shape = shapes[f"{PREFIX}{widest}"]
    return shape[0], shape[-1] * 32 // widest
