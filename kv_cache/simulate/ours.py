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
        centre = self.samples[layer].centres(key.shape[1])
        even = torch.einsum("hcd,wthd->wthc", scales.key_transform, key - centre)
        even = self.rounded(even, self.fmt.key_bits)
        read_key = torch.einsum("hcd,wthd->wthc", scales.key_inverse, even) + centre
        read_value = self.rounded(codec.even_values(value, scales), self.fmt.value_bits)
        return Decoded(read_key, codec.uneven_values(read_value, scales))

    @staticmethod
    def rounded(even: Tensor, bits: int) -> Tensor:
        """Return what is read back of even keys or values [..., channels]."""
        return codec.dequantize(*codec.quantize(even, bits), bits)

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return the format's."""
        return self.fmt.bits_per_element(shape.head_dim)
