"""Compresses one block: transform steps first, then its layers, stage by stage, on the inputs that serving will see."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.replay import Replay, Replays
from quant_methods.calibration.stages import (
    Stage,
    Statistics,
    expert_statistics,
    find_stages,
    joining_layers,
    stage_statistics,
)
from quant_methods.checkpoints.storage import storage_of
from quant_methods.formats.grid import static_scale
from quant_methods.formats.quantized import DenseLinear, QuantizedLinear
from quant_methods.handlers import HANDLERS, PRUNERS, LinearProblem
from quant_methods.methods.gptq import relative_error
from quant_methods.methods.outlier_split import split
from quant_methods.methods.pruning import pruned
from quant_methods.methods.scaling import Learned, ScaledBlock, scale_block
from quant_methods.methods.zeroquant import compensate
from quant_methods.plan import Plan
from quant_methods.steps import RoundStep


class BlockSolver:
    """Carries out a plan on blocks.

    Args:
        decoder: whose blocks they are.
        plan: what happens to each layer.
        say: told what happens now.

    Attributes:
        unseen: of the block that was quantized last, the experts that no calibration token was sent to.

    """

    def __init__(self, decoder: Decoder, plan: Plan, say: Callable[[str], None]) -> None:
        self.decoder, self.plan, self.say = decoder, plan, say
        self.learned: dict[str, Learned] = {}
        self.unseen: list[str] = []
        self.storage = storage_of(plan)
        self._replays: Replays = (None, None)

    def transform(
        self, index: int, block: nn.Module, hidden: Tensor | None, *, original: tuple[nn.Module, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Carry out the transform steps on a block in place; return the changed tensors that are stored as they are."""
        self.learned = {}
        if not self.plan.transforms:
            return {}
        assert hidden is not None
        scaled = ScaledBlock(self.decoder, index, block, hidden, self.plan, original, self.say)
        tensors = scale_block(scaled)
        self.learned = {self.decoder.name(index, local): found for local, found in scaled.learned.items()}
        return tensors

    def install(self, index: int, block: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Give a block the weights of its finished file."""
        for local in self.decoder.linears(index):
            name = self.decoder.name(index, local)
            if name in self.plan.steps:
                linear = self.storage.unpack(name, tensors, self.plan.steps[name])
                block.get_submodule(local).weight.copy_(linear.read())
        for local, parameter in block.state_dict().items():
            name = self.decoder.name(index, local)
            if name in tensors and name.removesuffix(".weight") not in self.plan.steps:
                parameter.copy_(tensors[name])

    def quantize(
        self,
        index: int,
        block: nn.Module,
        local: list[str],
        hidden: Tensor | None,
        *,
        original: tuple[nn.Module, Tensor] | None,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Quantize a block in place; return its stored tensors and each layer's relative error."""
        tensors: dict[str, Tensor] = {}
        errors: dict[str, float] = {}
        self.unseen = []
        self._replays = (None, None)
        if self.plan.needs_data:
            assert hidden is not None
            stages = find_stages(self.decoder, index, block, hidden)
            never = set(local) - {name for stage in stages for name in stage.names}
            if never:
                raise ParetoError(
                    f"{self.decoder.name(index, min(never))} never runs on the calibration set; ignore it"
                )
            self._replays = self._kept(block, original, stages)
        else:
            stages = []
        order = [(position, name) for position, stage in enumerate(stages) for name in stage.names if name in local]
        statistics: Statistics | None = None
        of_experts: dict[int, Statistics | None] = {}
        seen = -1
        for position, name in order or [(-1, name) for name in local]:
            full = self.decoder.name(index, name)
            self.say(name)
            step = self.plan.steps.get(full)
            wave = stages[position].wave if stages else None
            if position != seen and hidden is not None and wave is not None:
                if position not in of_experts:
                    of_experts = expert_statistics(self.decoder, index, block, hidden, stages=stages, wave=wave)
                statistics = of_experts.pop(position)
                if statistics is None:
                    # No token was sent to it: all its inputs count alike.
                    width = block.get_submodule(name).in_features
                    statistics = Statistics(torch.eye(width, device=self.decoder.device))
                    self.unseen += [e for e in [full.rpartition(".")[0]] if e not in self.unseen]
                seen = position
            elif position != seen and hidden is not None:
                own = [self.plan.steps.get(self.decoder.name(index, n)) for p, n in order if p == position]
                ranges = any(one is not None and (one.outliers or one.static) for one in own)
                statistics = stage_statistics(
                    self.decoder,
                    index,
                    block,
                    hidden,
                    stages=stages,
                    position=position,
                    original=original,
                    ranges=ranges,
                    replays=self._replays,
                )
                seen = position
            linear = block.get_submodule(name)
            result = self._solve(full, linear.weight.data, statistics)
            if step is not None and step.static:
                assert isinstance(result, QuantizedLinear)
                assert statistics is not None
                assert statistics.ranges is not None
                seen_inputs = statistics.ranges
                result.input_scale = static_scale(seen_inputs.sample, seen_inputs.largest.max().item(), 8)
            hessian = statistics.hessian if statistics else None
            errors[full] = relative_error(linear.weight.data, result, hessian)
            if not math.isfinite(errors[full]):
                raise ParetoError(
                    f"layer {full}: its weights, or their error after rounding, overflow to NaN or infinity; they are "
                    "too large to be compressed"
                )
            linear.weight.copy_(result.read())
            if isinstance(result, DenseLinear):
                tensors[f"{full}.weight"] = result.weight.cpu()
            else:
                assert step is not None
                tensors |= {key: tensor.cpu() for key, tensor in self.storage.pack(full, result, step).items()}
        return tensors, errors

    def _kept(self, block: nn.Module, original: tuple[nn.Module, Tensor] | None, stages: list[Stage]) -> Replays:
        """Return what keeps the outputs of the block's parts, and of the original one's; on a GPU, nothing does.

        There the outputs would have to go through the host's memory, which takes as long as computing them anew.
        """
        if self.decoder.device.type != "cpu":
            return None, None
        joining = joining_layers(stages)
        pristine = Replay(original[0], constant=True, joining=joining) if original else None
        return Replay(block, constant=False, joining=joining), pristine

    @contextlib.contextmanager
    def replaying(self, index: int, block: nn.Module) -> Iterator[None]:
        """Run a block that `quantize` has solved, or its original, without the parts whose outputs are known; once."""
        solved, pristine = self._replays
        if solved is not None and solved.block is block:
            replay, self._replays = solved, (None, pristine)
        elif pristine is not None and pristine.block is block:
            replay, self._replays = pristine, (solved, None)
        else:
            yield
            return
        with replay.passing(self.decoder.linears(index), last=True):
            yield

    def _solve(self, name: str, weight: Tensor, statistics: Statistics | None) -> QuantizedLinear | DenseLinear:
        step, prune = self.plan.steps.get(name), self.plan.prunes.get(name)
        learned = self.learned.get(name)
        problem = LinearProblem(
            name=name,
            weight=weight.clone() if learned is None or learned.offset is None else weight + learned.offset,
            hessian=statistics.hessian if statistics else None,
            cross=statistics.cross if statistics else None,
            residual=statistics.residual if statistics else None,
            scale_dtype=self.decoder.scale_dtype(name),
            largest=statistics.ranges.largest if statistics and statistics.ranges else None,
            ranges=learned.ranges if learned else None,
        )
        if prune is not None:
            pruner = PRUNERS[type(prune)]
            if prune.rounding is not None and step is not None:
                assert pruner.and_round is not None
                return pruner.and_round(prune, step, problem)
            found = pruned(prune, _upstream(problem, wanted=pruner.needs_upstream(prune)))
            problem.weight, problem.dense = found, problem.weight
        if step is None:
            return DenseLinear(problem.weight.to(self.decoder.source.dtype(f"{name}.weight")))
        return solve(step, _upstream(problem, wanted=HANDLERS[type(step)].needs_upstream(step)))


def _upstream(problem: LinearProblem, *, wanted: bool) -> LinearProblem:
    """Return a problem with what the layers before did if it is wanted, else without."""
    return problem if wanted else dataclasses.replace(problem, cross=None, residual=None)


def solve(step: RoundStep, problem: LinearProblem) -> QuantizedLinear:
    """Quantize one layer, with what the step keeps beside the codes."""
    quantize = HANDLERS[type(step)].quantize
    if step.rank:
        quantize = functools.partial(compensate, solve=quantize)
    if step.outliers:
        quantize = functools.partial(split, solve=quantize)
    return quantize(step, problem)
