"""What the kernels that write and read pages know of one side, keys or values, of a layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from kv_cache.errors import ParetoError
from kv_cache.layout import PageLayout
from kv_cache.rotary import CentreTable
from kv_cache.scales import LayerScales


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
        tensors: on the device, contiguous: ``scale``, ``inverse`` and ``zero`` [KV heads, head_dim]; ``encode`` [KV
            heads, head_dim of x, head_dim of codes], ``decode`` (the other way round, scales included) and ``feedback``
            where the format has them; ``mean``, ``fine`` and ``anchors`` of centred keys.

    """

    macros: dict[str, int]
    offsets: dict[str, int]
    tensors: dict[str, torch.Tensor]

    @property
    def centred(self) -> bool:
        """Whether the kernels need positions."""
        return "mean" in self.tensors


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
        if (matrix := getattr(scales, f"{kind}_feedback")) is not None:
            tensors["feedback"] = matrix
        if kind == "key" and scales.key_encode is not None and scales.key_decode is not None:
            tensors |= {"encode": scales.key_encode.mT, "decode": scales.key_decode.mT}
        if kind == "key" and scales.key_mean is not None and scales.rotary is not None:
            rotary = scales.rotary
            macros |= {"PAIRS": rotary.inv_freq.numel(), "INTERLEAVED": int(rotary.interleaved)}
            tensors["mean"] = torch.stack([scales.key_mean[:, channels] for channels in rotary.channels()], 1)
            tensors["fine"], tensors["anchors"] = _tables(rotary.table(max_tokens or rotary.max_position), device)
    macros |= {"FEEDBACK": int("feedback" in tensors), "TRANSFORM": int("encode" in tensors)}
    offsets = layout.offsets()
    places = {"plane": kind, "high_plane": f"{kind}_high", "meta_plane": f"{kind}_meta"}
    return Side(
        macros,
        {name: offsets[plane] for name, plane in places.items()},
        {name: tensor.to(device).contiguous() for name, tensor in tensors.items()},
    )
