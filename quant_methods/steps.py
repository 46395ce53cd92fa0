"""The kinds of steps that a recipe may have: each is a frozen dataclass whose ``method`` names it in YAML.

A recipe's steps come in the order of their kinds:

1. A :class:`TransformStep` changes the model without changing what it computes, so that it is compressed better.
2. A :class:`PruneStep` makes weights zero.
3. A :class:`TrainStep` trains the weights that are left.
4. A :class:`RoundStep` rounds weights.
5. A :class:`ModelStep` has the whole compressed model in view.

``handlers.py`` has the registry from a step's type to what performs it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from kv_cache.errors import ParetoError
from quant_methods.formats.grid import Grid
from quant_methods.formats.parts.bitmap_codes import BitmapForm
from quant_methods.formats.parts.grid_codes import GridForm
from quant_methods.formats.parts.part import BulkForm
from quant_methods.formats.parts.semi_sparse import AMONG, SemiSparseForm
from quant_methods.formats.parts.table_codes import TableForm
from quant_methods.handlers import HANDLERS

GROUP_SIZES = (128, 64, 32)
"""The sizes of groups that vLLM's kernels and ours serve, beside whole rows."""

LEAST_SPARSITY, MOST_SPARSITY = 0.2, 0.8
"""Below, nothing is gained by leaving weights out; above, no method here leaves a model of use."""

Store = Literal["dense", "2:4", "bitmap"]
STORED: dict[str, type[GridForm] | type[SemiSparseForm] | type[BitmapForm]] = {
    "dense": GridForm, "2:4": SemiSparseForm, "bitmap": BitmapForm,
}  # fmt: skip
"""How codes on a grid are stored, with their zeros or without: the part's form."""

KINDS = ("transform", "prune", "train", "round", "whole-model")
"""The kinds of steps, in the order in which a recipe has them."""


@dataclass(frozen=True)
class Step:
    """One step of a recipe; the base of every step's dataclass."""

    method: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    """One of ``KINDS``."""

    def check(self) -> None:
        """Refuse settings that make no sense or that vLLM cannot serve.

        Raises:
            ParetoError: with the alternative.

        """


@dataclass(frozen=True)
class TransformStep(Step):
    """A step that changes the model without changing what it computes."""

    kind: ClassVar[str] = "transform"


@dataclass(frozen=True)
class SourceStep(TransformStep):
    """A transform of the whole checkpoint: all other steps see the transformed one. It comes once, and first."""


@dataclass(frozen=True)
class ScaleStep(TransformStep):
    """A transform that moves scales between a block's layers and their inputs.

    Attributes:
        targets: globs over module names; a scale is moved where all layers that share an input match.

    """

    targets: tuple[str, ...] = ("*",)

    tokens: ClassVar[int | None] = None
    """Of the calibration set, about how many are enough for the step; None: it looks at all."""


@dataclass(frozen=True)
class BlockStep(ScaleStep):
    """A transform that has a whole block in view, and what the block should put out."""

    def check_next(self, step: RoundStep) -> None:
        """Refuse a rounding step that cannot use what this one learns.

        Raises:
            ParetoError: with the alternative.

        """


@dataclass(frozen=True)
class PruneStep(Step):
    """A step that makes weights zero, before those that are left are rounded.

    Attributes:
        sparsity: fraction of the weights that become zero, ``LEAST_SPARSITY`` to ``MOST_SPARSITY``.
        pattern: where they lie: ``any`` place, or ``N:M``, where N of M neighbouring input channels keep their weight.
        targets: globs over module names; the first step that matches a layer prunes it.
        refit: the weights that are left are fitted to what the layer put out before (``refit.py``).

    """

    kind: ClassVar[str] = "prune"
    from_dense: ClassVar[bool] = True
    """Whether the model that it gets has the weights still that are to become zero."""

    sparsity: float = 0.5
    pattern: str = "any"
    targets: tuple[str, ...] = ("*",)
    refit: bool = False

    @property
    def rounding(self) -> RoundStep | None:
        """The step that rounds what is left in the same pass; None: this one only prunes."""
        return None

    @property
    def kept_among(self) -> tuple[int, int] | None:
        """N and M of the pattern; None where weights of any place may become zero."""
        if self.pattern == "any":
            return None
        kept, among = self.pattern.split(":")
        return int(kept), int(among)

    @property
    def fits_2_of_4(self) -> bool:
        """Whether the pattern keeps at most two of each four neighbours."""
        kept, among = self.kept_among or (1, 1)
        return AMONG % among == 0 and 2 * kept <= among

    def check(self) -> None:
        """Refuse a fraction that is none, and one that is not that of the pattern."""
        if not LEAST_SPARSITY <= self.sparsity <= MOST_SPARSITY:
            raise ParetoError(
                f"sparsity: {self.sparsity} is not between {LEAST_SPARSITY} and {MOST_SPARSITY}; it is a fraction, and "
                "0.5 is usual"
            )
        if self.pattern == "any":
            return
        match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", self.pattern)
        if not match or int(match[1]) >= int(match[2]):
            raise ParetoError(f"pattern: {self.pattern!r} is neither 'any' nor N:M with N below M, such as '2:4'")
        kept, among = self.kept_among or (1, 1)
        if abs(self.sparsity - (1 - kept / among)) > 1e-3:
            raise ParetoError(
                f"pattern: {self.pattern} makes {1 - kept / among:g} of the weights zero, and sparsity is "
                f"{self.sparsity:g}; give one that fits the other"
            )

    def check_next(self, step: RoundStep) -> None:
        """Refuse a rounding step that would not leave zeros what they are.

        Raises:
            ParetoError: with the alternative.

        """
        if self.rounding is not None:
            raise ParetoError(
                f"{self.method} with bits: {self.rounding.bits} rounds what it leaves, and {step.method} would do so "
                f"again; leave either bits or {step.method} out"
            )
        if not isinstance(step.bulk_form, tuple(STORED.values())):
            raise ParetoError(
                f"{step.method} rounds to {step.bulk_form.part.what}, which need not hold a zero, so that "
                f"{self.method}'s zeros would be lost; round to a grid instead, e.g. {{method: gptq}}"
            )
        # A product beside the codes leaves the codes' zeros what they are, and makes up for them.
        if not replace(step, rank=0, store="dense").plain:
            raise ParetoError(
                f"{step.method} adds outlier channels to its codes, which would fill {self.method}'s zeros; leave "
                "outliers out"
            )


@dataclass(frozen=True)
class RoundStep(Step):
    """A step that rounds weights to a grid of integer codes.

    Attributes:
        bits: of a code, 2 to 8.
        group_size: input channels that share a scale: 32, 64 or 128, or -1 for one scale per output channel.
        symmetric: without zero-points.
        activations: ``none`` keeps activations in 16 bits; ``int8`` and ``int6`` round them at serving time with a
            scale for each token, ``int8_static`` with one that calibration fixes for each layer.
        targets: globs over module names; the first step that matches a layer quantizes it.
        outliers: fraction of the input channels that is kept apart in more bits (``outlier_split.py``).
        outlier_bits: of a weight there: 16 or 8.
        outlier_choice: which channels those are, by ``range``, ``energy`` or ``threshold`` of their activations.
        rank: of a product that makes up for the error (``zeroquant.py``); 0: none.
        rank_metric: which error, that of the layer's output (``activations``) or of its ``weights``.
        per_tensor: one scale for the whole weight, with group_size -1. It is stored once for each output channel, so
            that every kernel serves it: for comparing, it saves nothing.
        group_size_fallback: what becomes of a layer whose input channels the group size does not divide: ``lower``
            takes the largest size that does, ``skip`` leaves the layer at 16 bits, ``refuse`` refuses the recipe. A
            layer that no size fits stays at 16 bits unless the recipe is to be refused (``group_sizes.py``).
        store: ``2:4`` leaves the zeros of layers out that were pruned to two of four neighbours
            (``formats/parts/semi_sparse.py``), ``bitmap`` those of any pattern (``bitmap_codes.py`` there), both with
            codes of 4 bits; ``dense`` stores them as codes.

    """

    kind: ClassVar[str] = "round"

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activations: Literal["none", "int8", "int6", "int8_static"] = "none"
    targets: tuple[str, ...] = ("*",)
    outliers: float = 0.0
    outlier_bits: int = 16
    outlier_choice: Literal["range", "energy", "threshold"] = "range"
    rank: int = 0
    rank_metric: Literal["activations", "weights"] = "activations"
    per_tensor: bool = False
    group_size_fallback: Literal["lower", "skip", "refuse"] = "lower"
    store: Store = "dense"

    table: ClassVar[bool] = False
    """Whether codes are indices into a table of each output channel."""

    @property
    def plain(self) -> bool:
        """Whether the result is codes on a grid and nothing else; steps that make other parts say no."""
        return not self.outliers and not self.rank and self.store == "dense"

    @property
    def needs_data(self) -> bool:
        """Whether the step looks at activations."""
        by_output = self.rank > 0 and self.rank_metric == "activations"
        return self.outliers > 0 or self.static or by_output or HANDLERS[type(self)].needs_hessian(self)

    @property
    def static(self) -> bool:
        """Whether activations are rounded with scales that calibration fixes."""
        return self.activations == "int8_static"

    @property
    def grid(self) -> Grid:
        """The grid of codes."""
        return Grid(self.bits, self.group_size, self.symmetric, self.per_tensor)

    @property
    def bulk_form(self) -> BulkForm:
        """How the format of ours stores the codes."""
        if self.table:
            return TableForm(self.bits)
        return STORED[self.store](self.bits, self.group_size, self.symmetric)

    def check(self) -> None:
        """Refuse what neither vLLM 0.32 nor this plugin serves."""
        if not 2 <= self.bits <= 8:
            raise ParetoError(f"bits: {self.bits} is not served; use 2 to 8")
        if self.group_size not in (-1, *GROUP_SIZES):
            raise ParetoError(
                f"group_size: {self.group_size} has no kernel in vLLM; use 32, 64, 128, or -1 for one scale per channel"
            )
        if self.per_tensor and self.group_size != -1:
            raise ParetoError(f"per_tensor means one group: give group_size -1 with it, not {self.group_size}")
        if not 0 <= self.outliers < 0.5:
            raise ParetoError(f"outliers: {self.outliers} is not in [0, 0.5); it is a fraction, and 0.01 is usual")
        if self.outlier_bits not in (8, 16):
            raise ParetoError(f"outlier_bits: {self.outlier_bits} is neither 8 nor 16")
        if self.rank < 0:
            raise ParetoError(f"rank: {self.rank} is negative; 8 is usual, and 0 adds nothing")
        if self.store != "dense" and (self.bits != 4 or not isinstance(self.bulk_form, STORED[self.store])):
            raise ParetoError(
                f"store: {self.store} holds codes of 4 bits on a grid, not {self.bits}-bit {self.method}; give store: "
                "dense, or round to 4 bits on a grid, e.g. with gptq"
            )
        if self.static and not (self.bits == 8 and self.group_size == -1 and self.symmetric and self.plain):
            raise ParetoError(
                "activations: int8_static goes with 8-bit weights, group_size -1, symmetric, nothing beside them: "
                "vLLM has no other kernel for it; int8 rounds per token, for weights of any kind"
            )


@dataclass(frozen=True)
class ModelStep(Step):
    """A step that has the whole model in view, after all its blocks were compressed. It comes once, and last."""

    kind: ClassVar[str] = "whole-model"

    @property
    def text(self) -> tuple[int, int]:
        """How many sequences it runs on, and the tokens of each."""
        raise NotImplementedError

    @property
    def on_text(self) -> bool:
        """Whether the loss is the text's own instead of the divergence from the original."""
        return False


@dataclass(frozen=True)
class TrainStep(ModelStep):
    """A step that trains a whole model's weights in 16 bits, after they were pruned or while they are. It comes once.

    Steps that round come after it, and work on what it made, with its zeros.
    """

    kind: ClassVar[str] = "train"
