"""OmniQuant: learns each group's range, and scales between layers, from the error of a whole block's output.

Shao, Chen, Zhang, Xu, Zhao, Li, Zhang, Gao, Qiao, Luo: "OmniQuant: Omnidirectionally Calibrated Quantization for Large
Language Models" (2023), https://arxiv.org/abs/2308.13137. One block at a time, gradient descent (AdamW, straight
through the rounding) on ``||F(W, X) - F(Q_w(W; T1, T2), Q_a(X; T2))||^2`` (Eq. 1) learns:

- T1, learnable weight clipping (section 3.2, Eq. 2): a group's range is ``sigmoid(beta) min(W) .. sigmoid(gamma)
  max(W)``. Symmetric grids have one strength a group. The step that rounds then uses these ranges instead of its own
  search, so the rounding itself stays round-to-nearest, GPTQ, ...
- T2, learnable equivalent transformation (section 3.3, Eq. 3): scales between a norm and the layers that it feeds, and
  between up and down (o and v where heads do not share their values), which fold away (``scaling.py``).

What differs from the paper:

- F(W, X) is taken on the original model's hidden states and the quantized side on the quantized model's, so that a
  block also makes up for the blocks before it.
- No shifts: they need biases, which models like Llama lack (the authors' code leaves them out for Llama too). No scales
  between queries and keys: they only change how those two are rounded, and here they are not.
- ``rounding: true`` also learns which way each weight is rounded, as an offset of at most half a step: SignRound (Cheng
  et al., 2023, https://arxiv.org/abs/2309.05516, Eq. 3), whose rate, 1 / steps, lets an offset travel half a step. The
  offsets are added to the weights, which the step after this rounds to nearest. ``rounding: false`` is the paper.
- Ranges start from those with the least error of each group, not from the whole range; rates are three to four times
  the paper's and fall to zero along a cosine, so that few epochs do. What ends worse than it began is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.formats.form import ACTIVATION_BITS
from quant_methods.formats.grid import expand, fit, round_tokens
from quant_methods.handlers import register, trains
from quant_methods.methods.rtn import RTN
from quant_methods.methods.scaling import Fold, Learned, ScaledBlock
from quant_methods.patterns import matches
from quant_methods.steps import BlockStep, RoundStep

# Strengths that descent starts from are within these, where a sigmoid still has a slope.
WEAKEST, STRONGEST = 0.05, 0.995


@register("omniquant")
@dataclass(frozen=True)
class OmniQuant(BlockStep):
    """OmniQuant.

    Attributes:
        epochs: passes over the calibration set, for each block.
        batch: sequences a step of descent.
        clipping_rate: learning rate of the ranges; 0 leaves them as they begin.
        scaling_rate: learning rate of the scales; 0 moves none.
        rounding: learn which way weights are rounded too; for a step that rounds to nearest.
        seed: of the order of the sequences.

    """

    epochs: int = 4
    batch: int = 1
    clipping_rate: float = 0.03
    scaling_rate: float = 0.02
    rounding: bool = True
    seed: int = 0

    def check(self) -> None:
        """Refuse a training that trains nothing."""
        if self.epochs < 1 or self.batch < 1:
            raise ParetoError(f"omniquant: {self.epochs} epochs of batches of {self.batch}; both are at least 1")
        if self.clipping_rate < 0 or self.scaling_rate < 0 or not self.clipping_rate + self.scaling_rate:
            raise ParetoError(
                f"omniquant: clipping_rate {self.clipping_rate} and scaling_rate {self.scaling_rate}: rates are not "
                "negative, and not both 0; the paper's are 0.01 and 0.005"
            )

    def check_next(self, step: RoundStep) -> None:
        """Refuse a step that does not round to ranges, or does not round to nearest what was learned to be."""
        if not hasattr(step, "search"):
            raise ParetoError(f"omniquant learns ranges, and {step.method} has none; use rtn or gptq after it")
        if step.per_tensor:
            raise ParetoError("omniquant learns a range for every group of every row; leave per_tensor out after it")
        if self.rounding and not (isinstance(step, RTN) and step.plain):
            raise ParetoError(
                "omniquant learns how to round, and only rtn without outliers and rank rounds to nearest as it does; "
                f"use that after it instead of {step.method}, or rounding: false"
            )


class _Clipping(nn.Module):
    """A layer's weight, rounded to learned ranges."""

    def __init__(self, weight: Tensor, step: RoundStep, dtype: torch.dtype, *, rounding: bool) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros_like(weight)) if rounding else None
        self.grid, self.dtype, self.bits = step.grid, dtype, ACTIVATION_BITS[step.activations]
        scale, zero = fit(weight, self.grid, search="mse", scale_dtype=dtype)
        self.sign = scale.sign()
        low, high = self._extent(weight)
        if self.grid.symmetric:
            strengths = [scale.abs() * self.grid.high / high]
        else:
            strengths = [(self.grid.low - zero) * scale / low, (self.grid.high - zero) * scale / high]
        self.logits = nn.ParameterList(
            nn.Parameter(torch.logit(s.nan_to_num(1.0).clamp(WEAKEST, STRONGEST))) for s in strengths
        )

    def _extent(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends of each group's whole range, [rows, groups]: minus and plus the largest if symmetric."""
        grouped = weight.unflatten(1, (self.grid.groups(weight.shape[1]), -1))
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        if not self.grid.symmetric:
            return low, high
        largest = torch.maximum(-low, high)
        return -largest, largest

    def ranges(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return (scale, zero-point) [rows, groups], as they will be stored."""
        low, high = self._extent(weight)
        grid = self.grid
        if grid.symmetric:
            scale = torch.sigmoid(self.logits[0]) * high / grid.high
        else:
            low, high = torch.sigmoid(self.logits[0]) * low, torch.sigmoid(self.logits[1]) * high
            scale = (high - low) / (grid.high - grid.low)
        # As grid.fit does: a group of zeros, or a scale too small to divide by.
        scale = torch.where(scale > torch.finfo(self.dtype).tiny * 16, scale, torch.ones_like(scale))
        scale = _through(scale, scale.to(self.dtype).to(scale.dtype))
        if grid.symmetric:
            return scale * self.sign, torch.zeros_like(scale)
        zero = grid.low - low / scale
        return scale, _through(zero, zero.round()).clamp(grid.low, grid.high)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight as it will read back."""
        columns = weight.shape[1]
        scale, zero = (expand(part, columns) for part in self.ranges(weight))
        steps = weight / scale
        if self.offset is not None:
            steps = steps + self.offset
        codes = (_through(steps, steps.round()) + zero).clamp(self.grid.low, self.grid.high)
        return (codes - zero) * scale


def _through(smooth: Tensor, rounded: Tensor) -> Tensor:
    """Return ``rounded`` with the gradient of ``smooth`` (Bengio et al., 2013: the straight-through estimator)."""
    return smooth + (rounded - smooth).detach()


@dataclass
class _Trainee:
    """A block, and what is learned about it.

    Attributes:
        scaled: the block.
        clipping: by local name of the layers that will be quantized.
        folds: with the logarithms of their scales.

    """

    scaled: ScaledBlock
    clipping: nn.ModuleDict
    folds: list[tuple[Fold, nn.Parameter]] = field(default_factory=list)

    def weights(self) -> dict[str, Tensor]:
        """Return the block's parameters that differ from its own: scaled, and rounded."""
        block = self.scaled.block
        changed: dict[str, Tensor] = {}

        def current(name: str) -> Tensor:
            return changed.get(name, block.get_parameter(name))

        for fold, logarithm in self.folds:
            scale = logarithm.exp()
            for local, _ in block.get_submodule(fold.producer).named_parameters(recurse=False):
                name = f"{fold.producer}.{local}"
                # A bias is divided as it is, a norm's weight with what the norm adds to it.
                divided = current(name) / scale if local == "bias" else fold.divided(current(name), scale)
                changed[name] = divided
            for name in fold.stage.names:
                changed[f"{name}.weight"] = current(f"{name}.weight") * scale
        for key, clipping in self.clipping.items():
            name = f"{_local(key)}.weight"
            changed[name] = clipping(current(name))
        return changed

    def run(self, hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Return the block's output with these weights, inputs rounded as they will be."""
        scaled = self.scaled

        def block(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(scaled.block, weights, args, kwargs)

        hooks = []
        for key, clipping in self.clipping.items():
            if clipping.bits is not None:

                def enter(module: nn.Module, args: tuple[Tensor, ...], bits: int = clipping.bits) -> tuple[Tensor, ...]:
                    return (_through(args[0], round_tokens(args[0], bits)), *args[1:])

                hooks.append(scaled.block.get_submodule(_local(key)).register_forward_pre_hook(enter))
        try:
            return scaled.decoder.run(scaled.index, block, hidden)
        finally:
            for hook in hooks:
                hook.remove()


def _key(local: str) -> str:
    return local.replace(".", "/")


def _local(key: str) -> str:
    return key.replace("/", ".")


@trains(OmniQuant)
def learn(step: OmniQuant, scaled: ScaledBlock) -> None:
    """Train one block, fold its scales, and leave what rounding is to know in ``scaled.learned``."""
    trainee = _prepare(step, scaled)
    layers = {_local(key): clipping for key, clipping in trainee.clipping.items()}
    strengths = [strength for clipping in layers.values() for strength in clipping.logits]
    offsets = [clipping.offset for clipping in layers.values() if clipping.offset is not None]
    logarithms = [logarithm for _, logarithm in trainee.folds]
    learned = [*strengths, *logarithms, *offsets]
    if not strengths:
        return
    steps = math.ceil(len(scaled.hidden) / step.batch) * step.epochs
    with torch.no_grad():
        target = scaled.target()
        before = _loss(trainee, target)
    start = [parameter.detach().clone() for parameter in learned]
    optimizer = torch.optim.AdamW(
        [
            {"params": strengths, "lr": step.clipping_rate},
            {"params": logarithms, "lr": step.scaling_rate},
            {"params": offsets, "lr": 1 / steps},
        ],
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(step.seed + scaled.index)
    for epoch in range(step.epochs):
        total = 0.0
        for chosen in torch.randperm(len(target), generator=generator).split(step.batch):
            found = trainee.run(scaled.hidden[chosen].to(scaled.decoder.device), trainee.weights())
            loss = (found - target[chosen].to(found.device)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for offset in offsets:
                    offset.clamp_(-0.5, 0.5)
            total += loss.item() * len(chosen) / len(target)
        scaled.say(f"omniquant, epoch {epoch + 1}/{step.epochs}: {total / before:.3f} of the error")
    with torch.no_grad():
        if not _loss(trainee, target) < before:
            for parameter, old in zip(learned, start, strict=True):
                parameter.copy_(old)
        for fold, logarithm in trainee.folds:
            scaled.divide(fold, logarithm.exp())
        for local, clipping in layers.items():
            weight = scaled.block.get_submodule(local).weight
            ranges = clipping.ranges(weight)
            offset = None if clipping.offset is None else clipping.offset * expand(ranges[0], weight.shape[1])
            scaled.learned[local] = Learned(ranges, offset)


def _prepare(step: OmniQuant, scaled: ScaledBlock) -> _Trainee:
    clipping = nn.ModuleDict()
    for local, weight_step, dtype in _layers(step, scaled):
        weight = scaled.block.get_submodule(local).weight.data
        clipping[_key(local)] = _Clipping(weight, weight_step, dtype, rounding=step.rounding)
    trainee = _Trainee(scaled, clipping)
    for fold in scaled.folds if step.scaling_rate else []:
        if scaled.wanted(fold, step.targets):
            width = scaled.block.get_submodule(fold.stage.names[0]).in_features
            trainee.folds.append((fold, nn.Parameter(torch.zeros(width, device=scaled.decoder.device))))
    return trainee


def _layers(step: OmniQuant, scaled: ScaledBlock) -> Iterator[tuple[str, RoundStep, torch.dtype]]:
    """Yield (local name, step that will quantize it, dtype of scales) of the layers to learn ranges for."""
    for local in scaled.decoder.linears(scaled.index):
        name = scaled.decoder.name(scaled.index, local)
        weight_step = scaled.plan.steps.get(name)
        if weight_step is not None and matches(name, step.targets):
            yield local, weight_step, scaled.decoder.scale_dtype(name)


def _loss(trainee: _Trainee, target: Tensor) -> float:
    """Return the mean squared error of the block's output over the calibration set."""
    weights = trainee.weights()
    total = 0.0
    for start, batch in trainee.scaled.decoder.batches(trainee.scaled.hidden):
        found = trainee.run(batch, weights)
        total += (found - target[start : start + len(batch)].to(found.device)).square().sum().item()
    return total / target.numel()
