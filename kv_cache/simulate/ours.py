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
        sample = self.samples[layer]
        even_key = self.rounded(sample, "key", self.even_keys(sample, key))
        even_value = self.rounded(sample, "value", codec.even_values(value, sample.scales))
        return Decoded(self.uneven_keys(sample, even_key), codec.uneven_values(even_value, sample.scales))

    def even_keys(self, sample: Sample, key: Tensor) -> Tensor:
        """Return keys less their centre, transformed."""
        return torch.einsum("hcd,wthd->wthc", sample.scales.key_transform, key - sample.centres(key.shape[1]))

    def uneven_keys(self, sample: Sample, even: Tensor) -> Tensor:
        """Undo `even_keys`."""
        return torch.einsum("hcd,wthd->wthc", sample.scales.key_inverse, even) + sample.centres(even.shape[1])

    def rounded(self, sample: Sample, kind: str, even: Tensor) -> Tensor:
        """Return what is read back of even keys or values [..., heads, channels]."""
        bits = self.fmt.bits(kind)
        return codec.dequantize(*codec.quantize(even, bits), bits)

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return the format's."""
        return self.fmt.bits_per_element(shape.head_dim)
