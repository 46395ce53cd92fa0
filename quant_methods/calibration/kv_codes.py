"""What reading keys and values from codes adds to them, by the arithmetic of kv_cache/codec.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from kv_cache import batched, codec
from kv_cache.scales import LayerScales

KINDS = ("key", "value")


class LayerCodes:
    """One layer's codes.

    Args:
        scales: the layer's.
        device: of the keys and values.
        read_back: what is read from codes of even keys or values [..., channels] of so many bits.

    """

    def __init__(
        self,
        scales: LayerScales,
        device: torch.device,
        read_back: Callable[[Tensor, int], Tensor] = batched.read_back,
    ) -> None:
        self.scales, self.read_back = scales.to(device), read_back

    def errors(self, kind: str, x: Tensor, widths: Iterable[int]) -> Iterator[Tensor]:
        """Yield what is read from codes of each width less what was stored.

        Args:
            kind: "key" or "value".
            x: [sequences, tokens, KV heads, head_dim], floating point; keys after rotary embedding; sequences from
                their first position on.
            widths: bits of a code.

        Yields:
            float32 of x's shape.

        """
        if kind == "key":
            even = batched.even_keys(x, self.scales, batched.centres(self.scales, x.shape[1]))
        else:
            even = codec.even_values(x, self.scales)
        for bits in widths:
            lost = self.read_back(even, bits) - even
            if kind == "key":
                yield batched.uneven_keys(lost, self.scales, None)
            else:
                yield codec.uneven_values(lost, self.scales)
