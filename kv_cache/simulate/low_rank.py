"""Low-rank keys and values: each token keeps its coordinates in a subspace that all heads share, or all of two layers.

`LowRank` is Palu (Chang et al. 2024, "Palu: compressing KV-cache with low-rank projection") with all heads in one
group: the best subspace of keys before rotary embedding, and of values, on calibration text. Coordinates are kept in
bfloat16, or mixed and coded between a token's ends, as Palu has it. `PairedLowRank` is xKV (Chang et al. 2025): two
neighbouring layers' keys share one set of coordinates, and so do their values. xKV finds the subspace for each prompt;
here it is that of the calibration text. Coordinates of a pair need both layers' keys, so they come from a pass in full
precision, as xKV makes them after a prompt.

Why it costs: values' half can go into the output projection, but keys must be rebuilt and turned to their positions
whenever they are read. For Mistral-7B's shape and rank 128 that is 0.26 MFLOP a token and layer, 2.2 TFLOP a decode
step at 32 x 8,192 tokens. A pair's coordinates lie in pages that two layers read, and a token's are known only after
the second.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from kv_cache.rotary import Rotary
from kv_cache.simulate.coder import FULL, Coder, Decoded, Run, Sample, Shape, rotated, unrotated
from kv_cache.simulate.uniform import HALF_PAIR_BITS, between_ends
from kv_cache.transforms import hadamard_sums


class _Subspace:
    """The mean of some vectors and their main directions."""

    def __init__(self, x: Tensor, rank: int) -> None:
        """Find them in vectors [..., channels]."""
        x = x.flatten(0, -2)
        self.mean = x.mean(0)
        moment = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        for part in x.split(8192):
            centred = (part - self.mean).double()
            moment += centred.T @ centred
        # LAPACK orders eigenvalues from the smallest on.
        self.basis = torch.linalg.eigh(moment).eigenvectors[:, -min(rank, len(moment)) :].float()

    def read(self, x: Tensor, bits: int) -> Tensor:
        """Return what is read back of vectors [..., channels]."""
        coordinates = (x - self.mean) @ self.basis
        if bits == FULL:
            coordinates = coordinates.bfloat16().float()
        else:
            count = coordinates.shape[-1]
            run = math.sqrt(count & -count)
            coordinates = hadamard_sums(between_ends(hadamard_sums(coordinates) / run, bits)) / run
        return coordinates @ self.basis.T + self.mean


class LowRank(Coder):
    """A subspace for a layer's keys and one for its values."""

    def __init__(self, rank: int, bits: int = FULL) -> None:
        """Choose the coordinates' number, and their bits (16 for bfloat16)."""
        self.rank, self.coordinate_bits = rank, bits
        self.rotary: Rotary | None = None
        self.layers: dict[int, tuple[_Subspace, _Subspace]] = {}

    def fit(self, layer: int, sample: Sample) -> None:
        """Find the subspaces."""
        self.rotary = sample.rotary
        base = unrotated(sample.key, sample.rotary).flatten(-2)
        self.layers[layer] = _Subspace(base, self.rank), _Subspace(sample.value.flatten(-2), self.rank)

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Project."""
        assert self.rotary is not None
        keys, values = self.layers[layer]
        read = keys.read(unrotated(key, self.rotary).flatten(-2), self.coordinate_bits).view_as(key)
        read_value = values.read(value.flatten(-2), self.coordinate_bits).view_as(value)
        return Decoded(rotated(read, self.rotary), read_value)

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return the coordinates' bits, spread over the elements they stand for."""
        return self._coordinates(shape.kv_heads * shape.head_dim) / (shape.kv_heads * shape.head_dim)

    def _coordinates(self, width: int) -> float:
        """Return the bits of a token's coordinates in a space of so many channels."""
        extra = 0 if self.coordinate_bits == FULL else HALF_PAIR_BITS
        return min(self.rank, width) * self.coordinate_bits + extra


class PairedLowRank(LowRank):
    """A subspace for two neighbouring layers' keys together and one for their values; a last layer may be alone."""

    whole_pass = True

    def __init__(self, rank: int, bits: int = FULL) -> None:
        super().__init__(rank, bits)
        self._first: Sample | None = None
        self._last = 0

    def fit(self, layer: int, sample: Sample) -> None:
        """Find a pair's subspaces once its second layer is there; until then its first has one of its own."""
        self._last = layer
        if layer % 2 == 0:
            self._first = sample
            super().fit(layer, sample)
            return
        assert self._first is not None
        pair = (self._first, sample)
        keys = torch.cat([unrotated(one.key, one.rotary).flatten(-2) for one in pair], -1)
        values = torch.cat([one.value.flatten(-2) for one in pair], -1)
        self.layers[layer - 1] = self.layers[layer] = _Subspace(keys, self.rank), _Subspace(values, self.rank)

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Project the pair's keys and values of the full-precision pass, and take this layer's part."""
        assert self.rotary is not None
        if run.exact is None:
            raise ParetoError("layers coded in pairs need a pass in full precision first")
        first = layer - layer % 2
        if first == self._last:
            return super().code(layer, key, value, run)
        keys, values = self.layers[layer]
        part = layer % 2
        pair = [run.exact[first], run.exact[first + 1]]
        base = torch.cat([unrotated(k, self.rotary).flatten(-2) for k, _ in pair], -1)
        read = keys.read(base, self.coordinate_bits).chunk(2, -1)[part].reshape(key.shape)
        both = torch.cat([v.flatten(-2) for _, v in pair], -1)
        read_value = values.read(both, self.coordinate_bits).chunk(2, -1)[part].reshape(value.shape)
        return Decoded(rotated(read, self.rotary), read_value)

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return the mean over pairs and a layer that is left alone."""
        width = shape.kv_heads * shape.head_dim
        alone = shape.layers % 2
        total = (shape.layers - alone) // 2 * self._coordinates(2 * width) + alone * self._coordinates(width)
        return total / (width * shape.layers)
