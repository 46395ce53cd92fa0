"""What a coder of keys and values is: fitted on calibration text, asked what is read back, and how many bits it takes.

A coder is one class in one file beside this one. The study (bench/kv_study/) runs a model whose attention sees what the
coder returns in the place of the model's keys and values. Every query so attends to what was read from codes, its own
token included, unless the coder says that the newest tokens are kept as they are (`Decoded`).

Shapes: keys and values are float32 [windows, tokens, KV heads, head_dim]; a window is a sequence from its position 0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_cache.rotary import Rotary
from kv_cache.scales import LayerScales
from kv_cache.simulate.moments import KeyMoments, key_moments, layer_scales

FULL = 16
"""Bits of an element that is not coded: serving keeps bfloat16, though the simulation keeps such elements exactly."""


@dataclass(frozen=True)
class Shape:
    """What a model's cache is made of."""

    layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, eq=False)
class Sample:
    """What one layer made of the calibration text.

    Attributes:
        query: float32 [windows, queries, heads, head_dim], after rotary embedding, at some positions.
        query_positions: int64 [queries], in increasing order.
        key: float32 [windows, tokens, KV heads, head_dim], after rotary embedding.
        value: float32 of the same shape.
        first_key: float32 [sequences, KV heads, head_dim], keys at position 0 of these windows and of other texts.
        scaling: what ``q . k`` is multiplied by.
        rotary: the model's.
        value_metric: float32 [KV heads, head_dim, head_dim], ``W_o^T W_o``; None: the model has no such matrix.

    """

    query: Tensor
    query_positions: Tensor
    key: Tensor
    value: Tensor
    first_key: Tensor
    scaling: float
    rotary: Rotary
    value_metric: Tensor | None = None

    @functools.cached_property
    def moments(self) -> KeyMoments:
        """What the keys' transform is made from."""
        return key_moments(self)

    @functools.cached_property
    def scales(self) -> LayerScales:
        """The scales that this project's formats have, on the sample's device."""
        return layer_scales(self)


@dataclass
class Run:
    """One forward pass of the model, as far as a coder needs to know.

    Attributes:
        before: what was read back in the layer before this one; None in the first.
        exact: every layer's keys and values in a pass of full precision over the same windows; only for a coder
            that sets ``whole_pass``.

    """

    before: Decoded | None = None
    exact: list[tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True, eq=False)
class Decoded:
    """What attention sees.

    Attributes:
        key: what is read back of the keys, of the keys' shape.
        value: what is read back of the values.
        coded_keys: int64 [tokens]: the query at position t reads so many tokens from codes, counted from the first,
            and sees the keys after them as they are. None: it reads all of them from codes.
        coded_values: the same of values.

    """

    key: Tensor
    value: Tensor
    coded_keys: Tensor | None = None
    coded_values: Tensor | None = None


class Coder:
    """A way to code keys and values. One object serves one model."""

    whole_pass = False

    def fit(self, layer: int, sample: Sample) -> None:
        """Learn from a layer's calibration text; called for layer 0, 1, 2 and so on."""

    def code(self, layer: int, key: Tensor, value: Tensor, run: Run) -> Decoded:
        """Return what is read back of a layer's keys and values."""
        raise NotImplementedError

    def bits(self, shape: Shape, tokens: int) -> float:
        """Return the bits of an element of keys and values, all metadata included, the mean over a model's layers.

        Args:
            shape: of the model.
            tokens: of the sequence, at whose end bits are counted.

        """
        raise NotImplementedError


def positions_of(key: Tensor) -> Tensor:
    """Return the positions of a window's tokens, int64 [tokens]."""
    return torch.arange(key.shape[1], device=key.device)


def unrotated(key: Tensor, rotary: Rotary) -> Tensor:
    """Return keys [windows, tokens, KV heads, head_dim] as they were before rotary embedding."""
    return rotary.turn(key, -positions_of(key))


def rotated(key: Tensor, rotary: Rotary) -> Tensor:
    """Undo `unrotated`."""
    return rotary.turn(key, positions_of(key))


def all_but_newest(key: Tensor, newest: int) -> Tensor:
    """Return `Decoded.coded_keys` of a coder that keeps each sequence's ``newest`` tokens as they are."""
    return (positions_of(key) + 1 - newest).clamp_min(0)


def whole_tiles(key: Tensor, tile: int) -> Tensor:
    """Return `Decoded.coded_keys` of a coder that codes a tile of tokens at once, after its last token was used."""
    return positions_of(key) // tile * tile


def first_exact(coded: Tensor, exact: Tensor, first: int) -> Tensor:
    """Return decoded keys or values with the first tokens as they were."""
    return torch.cat([exact[:, :first], coded[:, first:]], 1) if first else coded


def with_exact(bits: float, exact_tokens: float, tokens: int) -> float:
    """Return the bits of an element where some of the tokens are kept in full precision."""
    share = min(exact_tokens / tokens, 1.0)
    return bits * (1 - share) + FULL * share
