"""Measures what quantizing each part of a model costs, at each width: what a bit budget is spent by.

A part, here a unit, is what vLLM stores alike: layers that it merges into one matrix (``fused.FUSED``), or one layer.
Two measures, for every unit and width:

- the output error ``tr(E H E^T)``, E being the rounding error of the weights and H the mean of x x^T over the layer's
  inputs: the mean squared error of the layer's outputs. H is the layer's own Hessian, so this is the analogue of
  HAWQ-V2's ``Tr(H) ||E||^2`` (Dong et al. 2020, https://arxiv.org/abs/1911.03852, Eq. 4) without its assumption that
  errors are spread evenly over the eigenvectors. Relative to ``tr(W H W^T)``, so that layers can be compared.
- the KL divergence of the model's output on calibration data when this unit alone is quantized.

Blocks are taken in turn. The variants of one block (units times widths) go through the blocks after it side by side,
so only one block's weights and one block's variants are ever in memory. Each finished block's measures are a file in
the state directory, which an interrupted run takes up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.calibration import outside
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.stages import Stage, Statistics, expert_statistics, find_stages, stage_statistics
from quant_methods.checkpoints.checkpoint import write_json
from quant_methods.checkpoints.quality import divergence
from quant_methods.formats.grid import Search, dequantize, expand, fit, round_to_grid
from quant_methods.handlers import HANDLERS, LinearProblem
from quant_methods.methods.pruning import Wanda, pruned
from quant_methods.methods.scaling import ScaledBlock, scale_block
from quant_methods.mixed_precision.units import WIDTHS, Unit, Width, unmeasured
from quant_methods.plan import Plan
from quant_methods.steps import PruneStep, RoundStep
from quant_methods.symmetric import mean_square

Rounding = Literal["nearest", "recipe"]


# Rounding to nearest clips ranges below this many bits.
CLIPPED_BELOW = 6


@dataclass(frozen=True)
class Settings:
    """How sensitivity is measured.

    Attributes:
        widths: what each unit may be stored in.
        kl: measure the KL divergence, not only the output error.
        scaled: measure it at one width alone, and scale it to the others by the output error: the divergence is
            quadratic in the error, whose direction differs little between widths.
        kl_sequences: calibration sequences for it.
        hessian_sequences: calibration sequences for H; other ones, if there are enough.
        rounding: ``nearest`` rounds every layer to nearest, ranges clipped for the least weighted error, and prunes by
            Wanda; ``recipe`` as the recipe's steps do, which costs as much as a compression for each width.

    """

    widths: tuple[Width, ...] = WIDTHS
    kl: bool = True
    scaled: bool = False
    kl_sequences: int = 4
    hessian_sequences: int = 16
    rounding: Rounding = "nearest"


Progress = Callable[[int, int, str], None]


class Sensitivity:
    """One measurement, taken up where an earlier one stopped.

    Args:
        decoder: the model.
        plan: which layers are quantized, and how.
        tokens: int64 [sequences, length], calibration data.
        settings: what to measure.
        folder: where finished blocks' measures are kept.
        key: SHA-256 of what determines the result, widths aside; files with another are measured again.
        progress: told (steps done, steps in all, what happens now).

    """

    def __init__(
        self,
        decoder: Decoder,
        plan: Plan,
        tokens: Tensor,
        *,
        settings: Settings,
        folder: Path,
        key: str,
        progress: Progress,
    ) -> None:
        self.decoder, self.plan, self.settings, self.folder, self.key = decoder, plan, settings, folder, key
        heard, total = settings.kl_sequences, len(tokens)
        self.heard = tokens[:heard]
        seen = tokens[heard : heard + settings.hessian_sequences]
        self.seen = seen if len(seen) else tokens[: settings.hessian_sequences]
        assert total, "calibration data is never empty"
        self.total = len(decoder.blocks)
        self.progress = progress
        self.measured = [width for width in settings.widths if not width.whole]
        # Scaled from few bits, where the divergence is large against the arithmetic's rounding, but still quadratic.
        self.heard_at = self.measured
        if settings.scaled:
            self.heard_at = [w for w in self.measured if w.bits >= 4][:1] or self.measured[-1:]

    def measure(self) -> list[Unit]:
        """Return every unit of every block, in model order."""
        found: list[Unit] = []
        known = [self._known(index) for index in range(self.total)]
        if all(units is not None for units in known):
            return [unit for units in known if units is not None for unit in units]
        seen = self.decoder.embed(self.seen)
        heard = self.decoder.embed(self.heard) if self.settings.kl else None
        final = self._final(heard) if heard is not None else None
        for index in range(self.total):
            units = known[index]
            blank = unmeasured(self.decoder, self.plan, index, self.settings.widths)
            variants: list[Tensor] = []
            errors: list[float] = []
            if units is None and blank:
                with self.decoder.loaded(index) as block:
                    errors, variants = self._round(index, block, blank, seen, heard)
            if index < self.total - 1:
                # Loaded anew: steps that move scales have changed it, and rounded norms, which an interrupted run that
                # knows this block's measures would not have seen.
                with self.decoder.loaded(index) as block:
                    self.decoder.advance(index, block, seen)
                    if heard is not None:
                        self.decoder.advance(index, block, heard)
            if units is None:
                losses = self._follow(index, variants, final) if variants and final is not None else []
                units = self._filled(blank, errors, losses)
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self._file(index), {"key": self.key, "units": [asdict(unit) for unit in units]})
            found += units
            self.progress(index + 1, self.total, f"sensitivity of block {index + 1}/{self.total}")
        return found

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def _known(self, index: int) -> list[Unit] | None:
        path = self._file(index)
        if not path.is_file():
            return None
        return read_units(path, self.key, self.settings)

    def _final(self, heard: Tensor) -> Tensor:
        """Return what the original model's last block puts out."""
        hidden = heard.clone()
        for index in range(self.total):
            self.progress(0, self.total, f"original model, block {index + 1}/{self.total}")
            with self.decoder.loaded(index) as block:
                self.decoder.advance(index, block, hidden)
        return hidden

    @torch.no_grad()
    def _round(
        self, index: int, block: nn.Module, units: list[Unit], seen: Tensor, heard: Tensor | None
    ) -> tuple[list[float], list[Tensor]]:
        """Round each unit at each width, the others left alone.

        Returns:
            For each unit and width in turn the error and, if there are inputs ``heard``, the block's outputs
            [sequences, length, width].

        """
        if self.plan.transforms:
            scale_block(ScaledBlock(self.decoder, index, block, seen, self.plan))
        stages = find_stages(self.decoder, index, block, seen)
        position = {name: place for place, stage in enumerate(stages) for name in stage.names}
        known: dict[int, Statistics | None] = {}
        errors: list[float] = []
        variants: list[Tensor] = []
        for unit in units:
            group = [name.removeprefix(self.decoder.name(index, "")) for name in unit.layers]
            weights = {local: block.get_submodule(local).weight for local in group}
            original = {local: weight.detach().clone() for local, weight in weights.items()}
            for local in group:
                if local not in position:
                    raise ParetoError(f"{self.decoder.name(index, local)} never runs on the calibration set; ignore it")
                place = position[local]
                if place not in known:
                    known |= statistics_of(self.decoder, index, block, seen, stages, place)
            for width in self.measured:
                self.progress(index, self.total, f"block {index + 1}/{self.total}: {group[0]} in {width} bits")
                lost, whole = 0.0, 0.0
                inputs = [weight.shape[1] for weight in original.values()]
                steps: Sequence[RoundStep | None] = [None] * len(group)
                if width.bits != 16:
                    steps = width.steps_of(self.plan.steps[unit.layers[0]], unit.layers, inputs)
                prune = width.prune(self.plan.prunes.get(unit.layers[0])) if width.percent else None
                for name, step, (local, weight) in zip(unit.layers, steps, original.items(), strict=True):
                    statistics = known[position[local]]
                    # An expert that no token was sent to: all its inputs count alike, and its error does not.
                    hessian = torch.eye(weight.shape[1]).to(weight) if statistics is None else statistics.hessian
                    share = 0.0 if statistics is None else statistics.share
                    rounded = self._stored(name, prune, step, weight, hessian)
                    weights[local].copy_(rounded)
                    lost += share * mean_square(rounded - weight, hessian)
                    whole += share * mean_square(weight, hessian)
                errors.append(lost / max(whole, 1e-30))
                if heard is not None and width in self.heard_at:
                    after = heard.clone()
                    self.decoder.advance(index, block, after)
                    variants.append(after)
            for local, weight in original.items():
                weights[local].copy_(weight)
        return errors, variants

    def _stored(
        self, name: str, prune: PruneStep | None, step: RoundStep | None, weight: Tensor, hessian: Tensor
    ) -> Tensor:
        """Return a layer's weight as it would read back."""
        dtype = torch.float16 if self.decoder.source.dtype(f"{name}.weight") == torch.float16 else torch.bfloat16
        recipe = self.settings.rounding == "recipe"
        problem = LinearProblem(name, weight.clone(), hessian, None, None, dtype)
        if prune is not None:
            # As rounding to nearest stands for any rounding, Wanda does for any pruning.
            quick = prune if recipe else Wanda(sparsity=prune.sparsity)
            problem.weight, problem.dense = pruned(quick, problem), problem.weight
        if step is None:
            return problem.weight
        if recipe:
            return HANDLERS[type(step)].quantize(step, problem).read()
        weight = problem.weight
        # Clipping gains little where codes are many, and its search is most of the time here.
        search: Search = "mse" if step.bits < CLIPPED_BELOW else "minmax"
        scale, zero = fit(weight, step.grid, hessian, search, dtype)
        columns = weight.shape[1]
        codes = round_to_grid(weight, expand(scale, columns), expand(zero, columns), step.grid)
        return dequantize(codes, scale.to(dtype), zero)

    @torch.no_grad()
    def _follow(self, index: int, variants: list[Tensor], final: Tensor) -> list[float]:
        """Run a block's variants through the blocks after it; return each one's KL divergence."""
        for later in range(index + 1, self.total):
            what = f"block {index + 1}/{self.total}: {len(variants)} variants through block {later + 1}"
            self.progress(index, self.total, what)
            with self.decoder.loaded(later) as block:
                for variant in variants:
                    self.decoder.advance(later, block, variant)
        self.progress(index, self.total, f"block {index + 1}/{self.total}: output of {len(variants)} variants")
        losses = [0.0] * len(variants)
        with outside.head(self.decoder) as head:
            for sequence in range(len(final)):  # One at a time: logits are large.
                place = slice(sequence, sequence + 1)
                expected = head(final[place].to(self.decoder.device)).log_softmax(-1)
                for number, variant in enumerate(variants):
                    got = head(variant[place].to(self.decoder.device)).log_softmax(-1)
                    losses[number] += divergence(expected, got).double().mean().item() / len(final)
        return losses

    def _filled(self, blank: list[Unit], errors: list[float], losses: list[float]) -> list[Unit]:
        """Return units with their measures: errors of each unit and width in turn, losses of those run, in turn."""
        error, loss = iter(errors), iter(losses)
        units = []
        for unit in blank:
            found = {str(width): next(error) for width in self.measured}
            # Rounding of the arithmetic can put a divergence of nothing below zero.
            heard = {str(width): max(next(loss), 0.0) for width in self.heard_at if self.settings.kl}
            if self.settings.scaled and heard:
                ((at, least),) = heard.items()
                heard = {width: least * value / max(found[at], 1e-30) for width, value in found.items()}
            choices = [
                replace(choice, error=found.get(choice.width, 0.0), kl=heard.get(choice.width, 0.0))
                if self.settings.kl
                else replace(choice, error=found.get(choice.width, 0.0), kl=None)
                for choice in unit.choices
            ]
            units.append(replace(unit, choices=tuple(choices)))
        return units


def statistics_of(
    decoder: Decoder, index: int, block: nn.Module, seen: Tensor, stages: list[Stage], place: int
) -> dict[int, Statistics | None]:
    """Return the statistics of a stage's inputs by its position; of an expert's stage, those of the whole wave."""
    wave = stages[place].wave
    if wave is not None:
        return expert_statistics(decoder, index, block, seen, stages=stages, wave=wave)
    return {place: stage_statistics(decoder, index, block, seen, stages=stages, position=place)}


def read_units(path: Path, key: str, settings: Settings) -> list[Unit] | None:
    """Return the units of a file of measures at the widths asked for; None if it holds something else."""
    data = json.loads(path.read_text())
    if data.get("key") != key:
        return None
    units = []
    for unit in map(Unit.from_dict, data["units"]):
        choices = {choice.width: choice for choice in unit.choices}
        if any(str(width) not in choices for width in settings.widths):
            return None
        units.append(replace(unit, choices=tuple(choices[str(width)] for width in settings.widths)))
    return units
