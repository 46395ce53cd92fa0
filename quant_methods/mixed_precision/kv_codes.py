"""What reading keys and values from codes adds to them, by the arithmetic of kv_cache/codec.py, on any device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kv_cache import codec
from kv_cache.scales import TENSORS, LayerScales

KINDS = ("key", "value")


class LayerCodes:
    """One layer's codes.

    Args:
        scales: the layer's, on the CPU.
        device: of the keys and values.

    """

    def __init__(self, scales: LayerScales, device: torch.device) -> None:
        self.host = scales
        moved = {name: getattr(scales, name).to(device) for name in TENSORS}
        self.scales = dataclasses.replace(scales, **moved)

    def errors(self, kind: str, x: Tensor, widths: Iterable[int]) -> Iterator[Tensor]:
        """Yield what is read from codes of each width less what was stored.

        Only the transform's sums are taken in another order than the specification takes them.

        Args:
            kind: "key" or "value".
            x: [sequences, tokens, KV heads, head_dim], floating point; keys after rotary embedding; sequences from
                their first position on.
            widths: bits of a code.

        Yields:
            float32 of x's shape.

        """
        even = self._even_keys(x) if kind == "key" else codec.even_values(x, self.scales)
        for bits in widths:
            lost = codec.dequantize(*codec.quantize(even, bits), bits) - even
            if kind == "key":
                yield torch.einsum("hcd,sthd->sthc", self.scales.key_inverse, lost)
            else:
                yield codec.uneven_values(lost, self.scales)

    def _even_keys(self, key: Tensor) -> Tensor:
        centre = codec.centres(self.host, torch.arange(key.shape[1])).to(key.device)
        return torch.einsum("hcd,sthd->sthc", self.scales.key_transform, key.float() - centre)
