"""This project's formats, by the arithmetic of kv_cache/codec.py on many tokens at once and on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from kv_cache import codec
from kv_cache.formats import KVFormat
from kv_cache.simulate.coder import Coder, Decoded, Run, Sample, Shape


class Ours(Coder):
    """A format of kv_cache/formats.py.

    Only the transform's sums are taken in another order than the specification takes them, which moves a code by one
    where a number lies within rounding of the middle between two codes.
    """

    def __init__(self, fmt: KVFormat) -> None:
        self.fmt = fmt
        self.samples: dict[int, Sample] = {}

    def fit(self, layer: int, sample: Sample) -> None:
        """Keep the sample, whose scales all of this project's coders share."""
        self.samples[layer] = sample

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Make even, code, and undo both."""
        scales = self.samples[layer].scales
        even_key = self.rounded(layer, "key", self.even_keys(layer, key))
        even_value = self.rounded(layer, "value", codec.even_values(value, scales))
        return Decoded(self.uneven_keys(layer, even_key), codec.uneven_values(even_value, scales))

    def centres(self, layer: int, tokens: int) -> Tensor:
        """Return the keys' centres, [tokens, KV heads, head_dim]."""
        return self.samples[layer].centres(tokens)

    def even_keys(self, layer: int, key: Tensor) -> Tensor:
        """Return keys less their centre, transformed."""
        transform = self.samples[layer].scales.key_transform
        return torch.einsum("hcd,wthd->wthc", transform, key - self.centres(layer, key.shape[1]))

    def uneven_keys(self, layer: int, even: Tensor) -> Tensor:
        """Undo `even_keys`."""
        inverse = self.samples[layer].scales.key_inverse
        return torch.einsum("hcd,wthd->wthc", inverse, even) + self.centres(layer, even.shape[1])

    def rounded(self, layer: int, kind: str, even: Tensor) -> Tensor:
        """Return what is read back of even keys or values [..., heads, channels]."""
        bits = self.fmt.bits(kind)
        return codec.dequantize(*codec.quantize(even, bits), bits)

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return the format's."""
        return self.fmt.bits_per_element(shape.head_dim)
