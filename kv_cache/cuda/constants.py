"""What the kernels that write and read pages know of a layer beside its pages."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from kv_cache.errors import ParetoError
from kv_cache.formats import PLANES
from kv_cache.layout import META, PageLayout
from kv_cache.rotary import CentreTable
from kv_cache.scales import LayerScales

TOKENS = 16
"""That the kernels take at a time: rows of the tensor cores' left operand."""
_ptr = ctypes.c_void_p


class Centres(ctypes.Structure):
    """``Centres`` of ``csrc/centre.cuh``."""

    _fields_ = (("mean", _ptr), ("first", _ptr), ("fine", _ptr), ("anchors", _ptr))


class PlaneOffsets(ctypes.Array):
    """The planes of keys or values in the page of one head, in bytes."""

    _type_ = ctypes.c_int32
    _length_ = max(len(planes) for planes in PLANES.values())


@functools.lru_cache(maxsize=8)
def _tables(table: CentreTable, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fine and the coarse cosines and sines, [positions, 2, pairs] each; one pair for all layers."""
    fine = torch.stack([CentreTable.read(table.cos_codes), CentreTable.read(table.sin_codes)], 1)
    return fine.to(device), torch.stack([table.anchor_cos, table.anchor_sin], 1).to(device)


@dataclass(frozen=True)
class LayerConstants:
    """One layer's scales on a device, in the form that the kernels take. Make it with `of`.

    Attributes:
        layout: of a page.
        tensors: by their names in the kernels: ``mean`` and ``first`` [KV heads, 2, pairs], first and second channels
            of each pair; ``fine`` and ``anchors`` (:func:`_tables`); ``transform`` and ``inverse``, operands of the
            tensor cores (:func:`operands`), the latter as the sum of two matrices; ``row_sums`` [KV heads, head_dim] of
            the inverse; ``value_encode`` and ``value_decode`` [KV heads]; ``value_mirror`` [KV heads, head_dim].
        pairs_apart: pairs of channels i and i + ``pairs_apart``; the others are neighbours.

    """

    layout: PageLayout
    tensors: dict[str, torch.Tensor]
    pairs_apart: int

    @classmethod
    def of(
        cls, layout: PageLayout, scales: LayerScales, device: torch.device, max_tokens: int | None = None
    ) -> LayerConstants:
        """Return a layer's constants.

        Args:
            layout: of a page.
            scales: the layer's, of this device's KV heads.
            device: CUDA device.
            max_tokens: of the longest sequence; None means what the rotary embedding says.

        Raises:
            ParetoError: scales of another head size, or a transform that is not of bfloat16 numbers.

        """
        dim = scales.key_mean.shape[-1]
        if dim != layout.head_dim:
            raise ParetoError(f"{layout.fmt.name}: scales of head size {dim} do not fit head size {layout.head_dim}")
        transform, rotary = scales.key_transform.float(), scales.rotary
        if not torch.equal(transform.bfloat16().float(), transform):
            raise ParetoError(f"{layout.fmt.name}: a transform must be of bfloat16 numbers, as a scales file keeps it")
        inverse = scales.key_inverse.float()
        head = inverse.bfloat16().float()
        tail = (inverse - head).bfloat16().float()
        fine, anchors = _tables(rotary.table(max_tokens or rotary.max_position), device)
        tensors = {
            "mean": torch.stack([scales.key_mean[:, channels] for channels in rotary.channels()], 1),
            "first": torch.stack([scales.key_first[:, channels] for channels in rotary.channels()], 1),
            "fine": fine,
            "anchors": anchors,
            "transform": operands(transform.mT),
            "inverse": torch.cat([operands(part.mT) for part in (head, tail)], -1),
            # Of the numbers that are multiplied, so that their rounding shifts no key.
            "row_sums": (head.double() + tail.double()).sum(-1).float(),
            "value_encode": scales.value_encode,
            "value_decode": scales.value_decode,
            "value_mirror": scales.value_mirror,
        }
        on_device = {name: tensor.to(device).contiguous() for name, tensor in tensors.items()}
        return cls(layout, on_device, 0 if rotary.interleaved else rotary.rotated)

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer on this device."""
        return self.tensors["mean"].shape[0]

    @functools.cached_property
    def addresses(self) -> dict[str, int]:
        """The tensors' addresses."""
        return {name: tensor.data_ptr() for name, tensor in self.tensors.items()}

    @functools.cached_property
    def centres(self) -> Centres:
        """What a key's centre is computed from."""
        return Centres(*(self.addresses[name] for name, _ in Centres._fields_))

    @functools.cached_property
    def planes(self) -> tuple[PlaneOffsets, PlaneOffsets]:
        """The planes of keys and of values."""
        keys, values = (
            PlaneOffsets(*(offset for name, offset in self.layout.offsets.items() if name.startswith(f"{kind}.")))
            for kind in ("key", "value")
        )
        return keys, values

    @property
    def meta(self) -> int:
        """Offset of the scales and zeros in the page of one head, in bytes."""
        return self.layout.offsets[META]

    @functools.cached_property
    def macros(self) -> tuple[tuple[str, int], ...]:
        """What both kernels are compiled with."""
        return (
            ("HEAD_DIM", self.layout.head_dim),
            ("BLOCK_SIZE", self.layout.block_size),
            ("KEY_BITS", self.layout.fmt.key_bits),
            ("VALUE_BITS", self.layout.fmt.value_bits),
            ("PAIRS_APART", self.pairs_apart),
        )

    def verify(self, cache: torch.Tensor) -> None:
        """Check the pages.

        Raises:
            ParetoError: they are not those of the layout and of these heads.

        """
        page = (self.kv_heads, self.layout.block_size, self.layout.bytes_per_token)
        aligned = cache.stride(0) % 4 == cache.stride(1) % 4 == cache.data_ptr() % 4 == 0
        contiguous = cache.stride()[2:] == (self.layout.bytes_per_token, 1)
        if cache.dtype != torch.uint8 or tuple(cache.shape[1:]) != page or not contiguous or not aligned:
            raise ParetoError(f"{self.layout.fmt.name}: pages must be uint8 [blocks, {', '.join(map(str, page))}]")


def aligned(x: torch.Tensor, elements: int = 4) -> torch.Tensor:
    """Return [tokens, heads, channels] with rows at multiples of so many elements: ``x``, or a copy."""
    size = elements * x.element_size()
    fits = x.stride(0) % elements == x.stride(1) % elements == x.data_ptr() % size == 0 and x.stride(2) == 1
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def operands(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix as right-hand operands of 16 x 8 x 16 products (PTX ISA, mma.m16n8k16), in bfloat16.

    Args:
        matrix: float32 [heads, K, N], K a multiple of 16 and N of 8.

    Returns:
        int32 [heads, K / 16, N / 8, 32 lanes, 2]: lane 4g + t holds rows 2t and 2t + 1, then 2t + 8 and 2t + 9, of
        column g of each tile.

    """
    heads, k, n = matrix.shape
    tiles = matrix.bfloat16().reshape(heads, k // 16, 2, 4, 2, n // 8, 8).permute(0, 1, 5, 6, 3, 2, 4)
    return tiles.contiguous().view(torch.int32).reshape(heads, k // 16, n // 8, 32, 2)
