"""What the kernels that write and read pages know of one side, keys or values, of a layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from kv_cache.errors import ParetoError
from kv_cache.formats import KVFormat
from kv_cache.layout import PageLayout
from kv_cache.rotary import CentreTable
from kv_cache.scales import LayerScales

BAND = 16
"""Channels that csrc/rounding.cuh rounds at a time."""
CENTRES = ("mean", "fine", "anchors")
"""Tensors of centred keys, in the order of ``Centres`` in csrc/centre.cuh."""
MAX_TILED = 128
"""Largest head whose transform fits in shared memory, and whose codes in a warp's registers."""


@functools.lru_cache(maxsize=8)
def _tables(table: CentreTable, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fine and the coarse cosines and sines, [positions, 2, pairs] each; one pair for all layers."""
    fine = torch.stack([CentreTable.read(table.cos_codes), CentreTable.read(table.sin_codes)], 1)
    return fine.to(device), torch.stack([table.anchor_cos, table.anchor_sin], 1).to(device)


@dataclass(frozen=True)
class Side:
    """Keys or values of one layer on a device.

    Attributes:
        macros: that the kernels are compiled with.
        offsets: ``plane``, ``high_plane`` and ``meta_plane`` of the page of one head, in bytes.
        tensors: on the device, contiguous: ``scale``, ``inverse`` (1 / scale) and ``zero`` [KV heads, head_dim];
            ``feedback``, ``decode`` [KV heads, head_dim of codes, head_dim of x] (scales included) and ``encode``, its
            counterpart for writing, where the format has them; ``mean``, ``fine`` and ``anchors`` of centred keys.
            Where ``tiled``, ``feedback`` and, in place of ``encode``, ``transform`` are tensor-core operands
            (:func:`operands`), and ``own`` is [KV heads, bands, BAND, BAND], the feedback within each band. Where
            ``read_tiled``, ``decode`` is operands too, and ``bias`` [KV heads, head_dim] is what codes of 0 read as.

    """

    macros: dict[str, int]
    offsets: dict[str, int]
    tensors: dict[str, torch.Tensor]

    @functools.cached_property
    def _addresses(self) -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in self.tensors.items()}

    def pointers(self, *names: str) -> dict[str, int]:
        """Return the addresses of those of the named tensors that this side has."""
        return {name: self._addresses[name] for name in names if name in self._addresses}

    @functools.cached_property
    def matrix_bytes(self) -> int:
        """Bytes of one head's matrices and of the scales after a transform, as ``csrc/store_tiles.cu`` keeps them."""
        kept = ["feedback", "own", *(("transform", "inverse", "zero") if "transform" in self.tensors else ())]
        return sum(self.tensors[name][0].nbytes for name in kept if name in self.tensors)

    @property
    def tiled(self) -> bool:
        """Whether csrc/store_tiles.cu writes this side; csrc/store.cu serves what it does not."""
        return "own" in self.tensors or ("scale" in self.tensors and "feedback" not in self.tensors)

    @property
    def read_tiled(self) -> bool:
        """Whether csrc/read_tiles.cu reads this side; csrc/read.cu serves what it does not."""
        return "bias" in self.tensors or ("scale" in self.tensors and "decode" not in self.tensors)

    @property
    def centred(self) -> bool:
        """Whether the kernels need positions."""
        return "mean" in self.tensors


def tile_macros(sides: tuple[Side, Side]) -> tuple[tuple[str, int], ...]:
    """Return what ``csrc/store_tiles.cu`` and ``csrc/read_tiles.cu`` both ask of keys and values."""
    keys, values = (side.macros for side in sides)
    shared = ("HEAD_DIM", "BLOCK_SIZE", "TRANSFORM", "PAIRS", "INTERLEAVED")
    return *((name, keys[name]) for name in shared), ("KEY_BITS", keys["BITS"]), ("VALUE_BITS", values["BITS"])


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int, bool]:
    """Return a device's multiprocessors, the shared memory of a block, and whether launches may overlap."""
    properties = torch.cuda.get_device_properties(device)
    overlap = torch.cuda.get_device_capability(device) >= (9, 0)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin, overlap


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return [tokens, heads, channels] with rows at multiples of four elements: ``x``, or a copy."""
    four = 4 * x.element_size()
    return x if x.stride(0) % 4 == x.stride(1) % 4 == x.data_ptr() % four == 0 else x.contiguous()


def operands(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix as right-hand operands of 16 x 8 x 16 products (PTX ISA, mma.m16n8k16), in bfloat16.

    Args:
        matrix: float32 [heads, K, N], K a multiple of 16 and N of 8.

    Returns:
        int32 [heads, K / 16, N / 8, 32 lanes, 2]: lane 4g + t holds rows 2t and 2t + 1, then 2t + 8 and 2t + 9, of
        column g of each tile.

    """
    heads, k, n = matrix.shape
    tiles = matrix.bfloat16().view(heads, k // 16, 2, 4, 2, n // 8, 8).permute(0, 1, 5, 6, 3, 2, 4)
    return tiles.contiguous().view(torch.int32).reshape(heads, k // 16, n // 8, 32, 2)


def _split_operands(matrix: torch.Tensor) -> torch.Tensor:
    """Return the operands [heads, K / 16, N / 8, 32, 4] of a matrix as the sum of two of bfloat16."""
    rest = matrix - matrix.bfloat16().float()
    return torch.cat([operands(matrix), operands(rest)], -1)


def _exact(matrix: torch.Tensor, fmt: KVFormat) -> torch.Tensor:
    if not torch.equal(matrix.bfloat16().float(), matrix):
        raise ParetoError(f"{fmt.name}: matrices must be of bfloat16 numbers, as a scales file keeps them")
    return matrix


def _feedback_operands(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tiles below the bands [heads, tiles, 32, 2], band after band, and the bands' own blocks."""
    tiles, bands = operands(matrix), matrix.shape[1] // BAND
    below = [tiles[:, band, : band * BAND // 8] for band in range(bands)]
    own = matrix.unflatten(2, (bands, BAND)).unflatten(1, (bands, BAND)).diagonal(dim1=1, dim2=3)
    return torch.cat(below, 1), own.permute(0, 3, 1, 2).contiguous()


def make_side(
    kind: str,
    layout: PageLayout,
    kv_heads: int,
    scales: LayerScales | None,
    device: torch.device,
    max_tokens: int | None = None,
) -> Side:
    """Return one side of a layer.

    Args:
        kind: "key" or "value".
        layout: of a page.
        kv_heads: of the layer, on this device.
        scales: the layer's; None for a ``group`` format.
        device: CUDA device.
        max_tokens: of the longest sequence, for centred keys; None means what their rotary embedding says.

    Raises:
        ParetoError: scales are missing, or their shape is wrong.

    """
    fmt, tensors = layout.fmt, dict[str, torch.Tensor]()
    if fmt.static and scales is None:
        raise ParetoError(f"{fmt.name} needs calibrated scales")
    macros = {
        "HEAD_DIM": layout.head_dim,
        "BLOCK_SIZE": layout.block_size,
        "BITS": fmt.key_bits if kind == "key" else fmt.value_bits,
        "GROUP_SIZE": fmt.group_size,
        "PAIRS": 0,
        "INTERLEAVED": 0,
    }
    if fmt.static and scales is not None:
        if tuple(scales.key_scale.shape) != (kv_heads, layout.head_dim):
            raise ParetoError(f"{fmt.name}: scales must have shape {(kv_heads, layout.head_dim)}")
        scale = getattr(scales, f"{kind}_scale").float()
        tensors |= {"scale": scale, "inverse": 1.0 / scale, "zero": getattr(scales, f"{kind}_zero").float()}
        tiled = layout.head_dim <= MAX_TILED
        if (matrix := getattr(scales, f"{kind}_feedback")) is not None:
            tensors["feedback"] = matrix
            if tiled:
                tensors["feedback"], tensors["own"] = _feedback_operands(_exact(matrix, fmt))
        if kind == "key" and scales.key_transform is not None and scales.key_decode is not None:
            decode = tensors["decode"] = scales.key_decode.mT.contiguous()
            if tiled:
                tensors["transform"] = operands(_exact(scales.key_transform, fmt).mT.contiguous())
            elif scales.key_encode is not None:
                tensors["encode"] = scales.key_encode.mT.contiguous()
            if tiled and layout.head_dim % 32 == 0:
                tensors["decode"] = _split_operands(decode)
                tensors["bias"] = -torch.einsum("hjc,hj->hc", decode, tensors["zero"])
        if kind == "key" and scales.key_mean is not None and scales.rotary is not None:
            rotary = scales.rotary
            macros |= {"PAIRS": rotary.inv_freq.numel(), "INTERLEAVED": int(rotary.interleaved)}
            tensors["mean"] = torch.stack([scales.key_mean[:, channels] for channels in rotary.channels()], 1)
            tensors["fine"], tensors["anchors"] = _tables(rotary.table(max_tokens or rotary.max_position), device)
    macros |= {"FEEDBACK": int("feedback" in tensors), "TRANSFORM": int("decode" in tensors)}
    offsets = layout.offsets()
    places = {"plane": kind, "high_plane": f"{kind}_high", "meta_plane": f"{kind}_meta"}
    return Side(
        macros,
        {name: offsets[plane] for name, plane in places.items()},
        {name: tensor.to(device).contiguous() for name, tensor in tensors.items()},
    )
