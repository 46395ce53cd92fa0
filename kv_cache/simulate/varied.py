"""This project's formats with one thing or another done differently: what each part of the scheme is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kv_cache import codec
from kv_cache.formats import META_BYTES, KVFormat
from kv_cache.simulate.coder import Decoded, Run, Sample, Shape, all_but_newest, first_exact, with_exact
from kv_cache.simulate.lloyd_max import nearest, normal_levels
from kv_cache.simulate.ours import Ours
from kv_cache.transforms import RIDGE, hadamard_sums, mixing


@dataclass(frozen=True)
class Options:
    """What is different.

    Attributes:
        first: tokens at a sequence's start that are kept as they are (StreamingLLM, Xiao et al. 2023, calls them
            attention sinks).
        newest: newest tokens that are kept as they are, beside the pages (KIVI's residual, Liu et al. 2024); the
            newest one of all, which needs no room, always is.
        own_coded: even the newest token, a query's own, is read from codes.
        first_centre: position 0 has a centre of its own.
        centre: keys are centred; without it nothing is calibrated but a size.
        transform: keys are transformed by what calibration found; without it they are mixed by a Hadamard matrix.
        symmetric: no zero; the codes' middle means 0.
        keep_product: a token's scale is chosen so that ``x . x_hat = |x|^2`` instead of from its range: the read vector
            is then unbiased along the vector itself (EDEN, Vargaftik et al. 2022; RaBitQ, Gao and Long 2024).
        levels: Lloyd-Max levels of a normal distribution times the token's root mean square.
        feedback: a channel's rounding error is handed on to the channels not yet rounded (LDLQ, Chee et al. 2023,
            "QuIP"; GPTQ, Frantar et al. 2022), weighed by what errors of keys and of values cost.
        full_range: codes cover a token's whole range, whatever the bits.
        widest_last: the direction of keys that spreads most is mixed like any other, instead of moving all channels
            alike.
        no_mirror: values are mixed without being reflected first.

    """

    first: int = 0
    newest: int = 0
    own_coded: bool = False
    first_centre: bool = True
    centre: bool = True
    transform: bool = True
    symmetric: bool = False
    keep_product: bool = False
    levels: bool = False
    feedback: bool = False
    full_range: bool = False
    widest_last: bool = False
    no_mirror: bool = False


class Varied(Ours):
    """A format with options."""

    def __init__(self, fmt: KVFormat, options: Options) -> None:
        super().__init__(fmt)
        self.options = options
        self._feedback: dict[tuple[int, str], Tensor] = {}
        self._sizes: dict[int, Tensor] = {}

    def fit(self, layer: int, sample: Sample) -> None:
        """Prepare what the options need of a layer."""
        if self.options.no_mirror:
            sample = _with_scales(sample, value_mirror=torch.zeros_like(sample.scales.value_mirror))
        if self.options.widest_last:
            mix = mixing(sample.key.shape[-1]).to(sample.key.device)
            turned = mix @ (mix.mT @ sample.scales.key_transform.double()).flip(-2)
            sample = _with_scales(sample, key_transform=turned.float(), key_inverse=torch.linalg.inv(turned).float())
        super().fit(layer, sample)
        if not self.options.transform:
            centred = sample.key[:, 1:] - self.centres(layer, sample.key.shape[1])[1:]
            self._sizes[layer] = centred.square().mean((0, 1, 3)).sqrt()[:, None]
        if self.options.feedback:
            inverse = sample.scales.key_inverse.double()
            self._feedback[layer, "key"] = feedback(inverse.mT @ sample.moments.metric @ inverse)
            if sample.value_metric is not None:
                mirror = sample.scales.value_mirror.double()
                reflection = torch.eye(mirror.shape[-1], device=mirror.device) - mirror[:, :, None] * mirror[:, None]
                mix = mixing(sample.value.shape[-1]).to(sample.value.device) @ reflection
                self._feedback[layer, "value"] = feedback(mix @ sample.value_metric.double() @ mix.mT)

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Code, and keep the first and the newest tokens."""
        first, newest = self.options.first, max(self.options.newest, 1)
        decoded = super().code(layer, key, value, run)
        coded = None if self.options.own_coded else all_but_newest(key, newest)
        return Decoded(first_exact(decoded.key, key, first), first_exact(decoded.value, value, first), coded, coded)

    def centres(self, layer: int, tokens: int) -> Tensor:
        """Return the keys' centres, none, or the usual one at position 0 too, which turns nothing."""
        centre = super().centres(layer, tokens)
        if not self.options.centre:
            return torch.zeros_like(centre)
        if not self.options.first_centre:
            return torch.cat([self.samples[layer].scales.key_mean[None], centre[1:]])
        return centre

    def even_keys(self, layer: int, key: Tensor) -> Tensor:
        """Return keys less their centre, transformed or mixed."""
        if self.options.transform:
            return super().even_keys(layer, key)
        dim = key.shape[-1]
        return hadamard_sums(key - self.centres(layer, key.shape[1])) / (self._sizes[layer] * math.sqrt(dim & -dim))

    def uneven_keys(self, layer: int, even: Tensor) -> Tensor:
        """Undo `even_keys`."""
        if self.options.transform:
            return super().uneven_keys(layer, even)
        dim = even.shape[-1]
        return hadamard_sums(even) * (self._sizes[layer] / math.sqrt(dim & -dim)) + self.centres(layer, even.shape[1])

    def rounded(self, layer: int, kind: str, even: Tensor) -> Tensor:
        """Round as the options say."""
        options, bits = self.options, self.fmt.bits(kind)
        if options.levels:
            return _to_levels(even, bits)
        if options.symmetric or options.full_range:
            return _in_range(even, bits, options.symmetric)
        if options.feedback and (layer, kind) in self._feedback:
            return _with_feedback(even, bits, self._feedback[layer, kind])
        codes, scale, zero = codec.quantize(even, bits)
        if options.keep_product:
            read = codec.dequantize(codes, scale, zero, bits)
            factor = even.square().sum(-1) / (even * read).sum(-1)
            # Bits too few may lose the vector's direction altogether: then the scale stays.
            factor = torch.where(factor.isfinite() & (factor > 0), factor, 1.0)
            scale = codec.encode_scale(codec.decode_scale(scale) * factor)
        return codec.dequantize(codes, scale, zero, bits)

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return the format's bits, two bytes a token less without zeros, and the exact tokens'."""
        bits = self.fmt.bits_per_element(shape.head_dim)
        if self.options.symmetric or self.options.levels:
            bits -= META_BYTES / 2 * 8 / (2 * shape.head_dim)
        return with_exact(bits, self.options.first + self.options.newest, tokens)


def _with_scales(sample: Sample, **changed: Tensor) -> Sample:
    """Return a sample whose scales differ."""
    scales, sample = sample.scales, replace(sample)
    vars(sample)["scales"] = replace(scales, **changed)
    return sample


def feedback(metric: Tensor) -> Tensor:
    """Return by how much an error of channel i moves channel j, float32 [heads, dim, dim], strictly lower triangular.

    With ``H = L D L^T``, the cost ``e^T H e`` of errors e is ``sum_i D_i ((L^T e)_i)^2``. A channel's own rounding
    error u, what it was handed included, is its ``(L^T e)_i`` if it was handed the rest, ``(1 - L^-T) u``.

    Args:
        metric: float64 [heads, dim, dim], H of what is coded.

    """
    ridge = RIDGE * metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    root = torch.linalg.cholesky(metric + ridge * torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device))
    lower = root / root.diagonal(dim1=-2, dim2=-1)[..., None, :]
    return (-torch.linalg.inv(lower)).tril(-1).float()


def _with_feedback(even: Tensor, bits: int, fed: Tensor) -> Tensor:
    """Round channels from the last to the first; a token's channels share a step, so errors need no rescaling."""
    scale, zero = codec.fit(even, bits)
    inverse = codec.inverse_step(scale, bits) * codec.factors(bits)[2]
    left = even * inverse[..., None] + (zero.float() * 2.0 ** (bits - 8))[..., None]
    codes = torch.empty_like(left)
    for channel in reversed(range(even.shape[-1])):
        codes[..., channel] = left[..., channel].round().clamp(0, 2**bits - 1)
        error = left[..., channel] - codes[..., channel]
        left[..., :channel] += fed[:, channel, :channel] * error[..., None]
    return codec.dequantize(codes, scale, zero, bits)


def _in_range(even: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Round between the ends of a token's range, or between minus and plus its largest size."""
    low, high = even.amin(-1).clamp_max(0.0), even.amax(-1).clamp_min(0.0)
    top = 2**bits - 1
    share = codec.RANGE_SHARE[bits] if symmetric else 1.0
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = codec.encode_scale((high - low) * (share * 2.0 ** (bits - 2) / top))
    step = (1 / codec.inverse_step(scale, bits))[..., None]
    # Without a zero of its own, a token's zero lies in the middle of the codes.
    zero = torch.full_like(step, top / 2) if symmetric else (-low[..., None] / step * 2 ** (8 - bits)).round()
    if not symmetric:
        zero = zero.clamp(0, 255) * 2.0 ** (bits - 8)
    return ((even / step + zero).round().clamp(0, top) - zero) * step


def _to_levels(even: Tensor, bits: int) -> Tensor:
    """Round to Lloyd-Max levels of the token's size."""
    size = codec.decode_scale(codec.encode_scale(even.square().mean(-1).sqrt()))[..., None]
    levels = normal_levels(bits).float().to(even.device)
    return nearest(levels, even / size) * size
