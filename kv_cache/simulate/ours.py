"""This project's formats, by the arithmetic of kv_cache/codec.py as kv_cache/batched.py does it.

A token's own key and value are taken as they are, as kv_cache/reference.py says: they have just been computed.
"""

from __future__ import annotations

from torch import Tensor

from kv_cache import batched, codec
from kv_cache.formats import KVFormat
from kv_cache.simulate.coder import Coder, Decoded, Run, Sample, Shape, all_but_newest


class Ours(Coder):
    """A format of kv_cache/formats.py."""

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
        past = all_but_newest(key, 1)
        return Decoded(self.uneven_keys(layer, even_key), codec.uneven_values(even_value, scales), past, past)

    def centres(self, layer: int, tokens: int) -> Tensor:
        """Return the keys' centres, [tokens, KV heads, head_dim]."""
        return batched.centres(self.samples[layer].scales, tokens)

    def even_keys(self, layer: int, key: Tensor) -> Tensor:
        """Return keys less their centre, transformed."""
        return batched.even_keys(key, self.samples[layer].scales, self.centres(layer, key.shape[1]))

    def uneven_keys(self, layer: int, even: Tensor) -> Tensor:
        """Undo `even_keys`."""
        return batched.uneven_keys(even, self.samples[layer].scales, self.centres(layer, even.shape[1]))

    def rounded(self, layer: int, kind: str, even: Tensor) -> Tensor:
        """Return what is read back of even keys or values [..., heads, channels]."""
        return batched.read_back(even, self.fmt.bits(kind))

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return the format's."""
        return self.fmt.bits_per_element(shape.head_dim)
