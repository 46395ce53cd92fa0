"""What the methods need to know of a block: which linear layers share an input, and what those inputs are.

Linear layers that share an input form a stage (q, k, v; o; gate, up; down in a Llama), found by watching one forward
pass. Stages are solved in the order in which they run, and each sees inputs computed with the stages before it already
quantized ("true sequential" in GPTQ's code).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.calibration.calibrator import Decoder, Stop
from quant_methods.calibration.finite import check_inputs
from quant_methods.calibration.replay import Replay, Replays
from quant_methods.experts import waves
from quant_methods.symmetric import add_square, mirror

SAMPLE_TOKENS = 1024


@dataclass(frozen=True)
class Stage:
    """Linear layers of a block that share one input.

    Attributes:
        names: module names within the block, in call order.
        joins_residual: its one layer's output is added to the residual stream.
        wave: for layers of experts, which of the block's waves they are in (``experts.waves``); else None.

    """

    names: tuple[str, ...]
    joins_residual: bool
    wave: int | None = None


@dataclass
class Ranges:
    """Sizes of a stage's inputs x [tokens, in], float32 on the device.

    Attributes:
        largest: the largest |x|, [in].
        mean: the mean |x|, [in].
        sample: inputs of about SAMPLE_TOKENS tokens, evenly spread, [n, in].

    """

    largest: Tensor
    mean: Tensor
    sample: Tensor


@dataclass
class Statistics:
    """What a stage's inputs x [tokens, in] were, as means over the calibration tokens.

    Attributes:
        hessian: x^T x, [in, in].
        cross: (x_original - x)^T x, [in, in], or None.
        residual: (r_original - r)^T x, [out, in], r being the residual stream before the stage, or None. Where the
            stage's layer makes no more channels than it gets, (r_original - r + W (x_original - x))^T x, W being its
            weight; ``cross`` is None then: one product does, and it is no larger.
        ranges: sizes of x, or None.
        share: of the calibration tokens, those that were sent to this expert; 1 for what is no expert's.

    All matrices are float32 on the device.
    """

    hessian: Tensor
    cross: Tensor | None = None
    residual: Tensor | None = None
    ranges: Ranges | None = None
    share: float = 1.0


@torch.no_grad()
def find_stages(decoder: Decoder, index: int, block: nn.Module, hidden: Tensor) -> list[Stage]:
    """Return the block's stages in the order in which they run, found by running it on one sequence."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    hooks = []
    expert_waves = waves(block)
    of_experts = {name for wave in expert_waves for names in wave for name in names}
    for name, module in decoder.linears(index).items():
        if name in of_experts:
            # Not every expert has a token in every batch; what they share is known without running them.
            continue

        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            calls.append((name, args[0], output))

        hooks.append(module.register_forward_hook(record))
    start = hidden[:1].to(decoder.device)
    try:
        end = decoder.run(index, block, start)
    finally:
        for hook in hooks:
            hook.remove()
    check_inputs(
        {f"{decoder.name(index, name)}: its outputs": output for name, _, output in calls}
        | {f"{decoder.prefix}.{index}: its outputs": end}
    )
    groups: list[list[tuple[str, Tensor, Tensor]]] = []
    for call in calls:
        # `calls` keeps every input alive, so identity is equality of tensors here.
        if groups and groups[-1][0][1] is call[1]:
            groups[-1].append(call)
        else:
            groups.append([call])
    if len(calls) != len({name for name, _, _ in calls}):
        raise ParetoError(f"{decoder.name(index, calls[0][0])}: a linear layer runs twice in its block; unsupported")
    # Some models (OPT) hand a block's tokens on without their sequences, [tokens, width].
    writers = [group[0] for group in groups if len(group) == 1 and group[0][2].numel() == start.numel()]
    total = start + sum(output.view_as(start) for _, _, output in writers)
    # Holds for pre-norm blocks; models that normalize or scale a layer's output before adding it differ.
    plain = torch.allclose(total, end, rtol=1e-3, atol=1e-4 * end.abs().max().item())
    joining = {name for name, _, _ in writers} if plain else set()
    found = [Stage(tuple(name for name, _, _ in group), group[0][0] in joining) for group in groups]
    return found + [Stage(names, False, number) for number, wave in enumerate(expert_waves) for names in wave]


@torch.no_grad()
def stage_statistics(
    decoder: Decoder,
    index: int,
    block: nn.Module,
    hidden: Tensor,
    *,
    stages: list[Stage],
    position: int,
    original: tuple[nn.Module, Tensor] | None = None,
    ranges: bool = False,
    replays: Replays = (None, None),
) -> Statistics:
    """Gather the statistics of one stage's inputs over the calibration set.

    Args:
        decoder: the model.
        index: the block's index.
        block: the block, stages before ``position`` already quantized.
        hidden: the hidden states that enter it, float32 [sequences, length, width].
        stages: the block's stages.
        position: which stage.
        original: the original block and the original model's hidden states, to compare with.
        ranges: gather the sizes of the inputs too.
        replays: of the block and of the original one, made for the stages of this block and kept from stage to stage.

    """
    stage = stages[position]
    width = block.get_submodule(stage.names[0]).in_features
    hessian = torch.zeros((width, width), device=decoder.device)
    residual = (
        torch.zeros((hidden.shape[-1], width), device=decoder.device) if original and stage.joins_residual else None
    )
    by_outputs = block.get_submodule(stage.names[0]) if residual is not None and len(residual) <= width else None
    cross = torch.zeros_like(hessian) if original and by_outputs is None else None
    tokens = hidden.shape[0] * hidden.shape[1]
    sizes = _Sizes(tokens) if ranges else None
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(_path(decoder, index, block, stages, position, replays[0]))
        if original:
            original_block, original_hidden = original
            original_path = stack.enter_context(_path(decoder, index, original_block, stages, position, replays[1]))
        for start, batch in decoder.batches(hidden):
            inputs, stream = path(batch)
            add_square(hessian, inputs)
            if sizes is not None:
                sizes.add(inputs)
            if original:
                original_batch = original_hidden[start : start + len(batch)].to(decoder.device)
                original_inputs, original_stream = original_path(original_batch)
                lost = original_stream - stream if residual is not None else None
                if by_outputs is not None:
                    assert lost is not None
                    with decoder.rounded():
                        lost += nn.functional.linear(original_inputs - inputs, by_outputs.weight)
                if cross is not None:
                    cross.addmm_((original_inputs - inputs).T, inputs)
                if residual is not None and lost is not None:
                    residual.addmm_(lost.T, inputs)
    mirror(hessian)
    for matrix in (hessian, cross, residual):
        if matrix is not None:
            matrix.div_(tokens)
    check_inputs({f"{decoder.name(index, stage.names[0])}: the squares of its inputs": hessian})
    return Statistics(hessian, cross, residual, sizes.ranges() if sizes is not None else None)


@torch.no_grad()
def statistics_at_once(
    decoder: Decoder, index: int, block: nn.Module, hidden: Tensor, *, stages: list[Stage], positions: Collection[int]
) -> dict[int, Statistics]:
    """Gather the statistics of several stages, sizes included, in one pass: for a block that does not change meanwhile.

    Args:
        decoder: the model.
        index: the block's index.
        block: the block.
        hidden: the hidden states that enter it, float32 [sequences, length, width].
        stages: the block's stages.
        positions: which stages.

    """
    tokens = hidden.shape[0] * hidden.shape[1]
    last = max(positions)
    found: dict[int, tuple[Tensor, _Sizes]] = {}
    hooks = []
    for position in positions:
        layer = block.get_submodule(stages[position].names[0])
        width = layer.in_features
        found[position] = torch.zeros((width, width), device=decoder.device), _Sizes(tokens)

        def see(module: nn.Module, args: tuple[Tensor, ...], position: int = position) -> None:
            inputs = args[0].flatten(0, -2).float()
            add_square(found[position][0], inputs)
            found[position][1].add(inputs)
            if position == last:
                raise Stop

        hooks.append(layer.register_forward_pre_hook(see))
    try:
        for _, batch in decoder.batches(hidden):
            with decoder.rounded(), contextlib.suppress(Stop):
                decoder.run(index, block, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for position, (hessian, _) in found.items():
        mirror(hessian).div_(tokens)
        check_inputs({f"{decoder.name(index, stages[position].names[0])}: the squares of its inputs": hessian})
    return {position: Statistics(hessian, ranges=sizes.ranges()) for position, (hessian, sizes) in found.items()}


class _Sizes:
    """Gathers the sizes of a stage's inputs over ``tokens`` tokens, batch by batch."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.largest: list[Tensor] = []
        self.mean: list[Tensor] = []
        self.sample: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        size = inputs.abs()
        self.largest.append(size.amax(0))
        self.mean.append(size.sum(0) / self.tokens)
        self.sample.append(inputs[:: max(self.tokens // SAMPLE_TOKENS, 1)].clone())

    def ranges(self) -> Ranges:
        return Ranges(torch.stack(self.largest).amax(0), torch.stack(self.mean).sum(0), torch.cat(self.sample))


@torch.no_grad()
def expert_statistics(
    decoder: Decoder, index: int, block: nn.Module, hidden: Tensor, *, stages: list[Stage], wave: int
) -> dict[int, Statistics | None]:
    """Gather the statistics of all stages of a wave of experts over the calibration set, in one pass.

    Which tokens an expert gets is not the same in the original model, so nothing is compared with that.

    Args:
        decoder: the model.
        index: the block's index.
        block: the block, earlier waves already quantized.
        hidden: the hidden states that enter it, float32 [sequences, length, width].
        stages: the block's stages.
        wave: which wave.

    Returns:
        Position of each of its stages to its statistics; None for an expert that no token was sent to.

    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    hooks = []
    for position, stage in enumerate(stages):
        if stage.wave != wave:
            continue
        module = block.get_submodule(stage.names[0])
        counts[position] = 0

        def add(module: nn.Module, args: tuple[Tensor, ...], position: int = position) -> None:
            inputs = args[0].flatten(0, -2).float()
            if position not in sums:
                sums[position] = torch.zeros((inputs.shape[1], inputs.shape[1]), device=inputs.device)
            add_square(sums[position], inputs)
            counts[position] += len(inputs)

        hooks.append(module.register_forward_pre_hook(add))
    try:
        for _, batch in decoder.batches(hidden):
            with decoder.rounded():
                decoder.run(index, block, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for position, total in sums.items():
        mirror(total).div_(counts[position])
    check_inputs(
        {f"{decoder.name(index, stages[p].names[0])}: the squares of its inputs": total for p, total in sums.items()}
    )
    tokens = hidden.shape[0] * hidden.shape[1]
    return {
        position: Statistics(sums[position], share=count / tokens) if count else None
        for position, count in counts.items()
    }


def joining_layers(stages: list[Stage]) -> set[str]:
    """Return the layers of some stages whose outputs are added to the residual stream."""
    return {stage.names[0] for stage in stages if stage.joins_residual}


@contextlib.contextmanager
def _path(
    decoder: Decoder, index: int, block: nn.Module, stages: list[Stage], position: int, replay: Replay | None
) -> Iterator[Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """Give a function from a batch to a stage's inputs [tokens, in] and the residual stream before it.

    It is called with all batches of the calibration set, in order.
    """
    own, before = stages[position], stages[:position]
    replay = replay or Replay(block, constant=False, joining=joining_layers(stages))
    counted = joining_layers(before)
    found: list[Tensor] = []
    stream = torch.empty(0)

    def join(name: str, output: Tensor) -> None:
        nonlocal stream
        if name in counted:
            stream = stream + output.view_as(stream)

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        if feeding:
            assert part is not None
            replay.feed(part, own.names[0], args[0])
        if not through:
            raise Stop

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if found:
            raise Stop

    def inputs(batch: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal stream
        stream = batch
        found.clear()
        with torch.no_grad(), decoder.rounded(), contextlib.suppress(Stop):
            decoder.run(index, block, batch)
        return found[0].flatten(0, -2).float(), stream.flatten(0, -2)

    # What does not change and has no later stage in it runs to its end, to be kept.
    part = replay.part_of(own.names[0])
    later = {name for stage in stages[position + 1 :] for name in stage.names}
    ends = part is not None and not later & replay.parts[part]
    through, feeding = replay.constant and ends, not replay.constant and ends and len(own.names) == 1
    hooks = [block.get_submodule(own.names[0]).register_forward_pre_hook(see)]
    if through:
        assert part is not None
        hooks.append(block.get_submodule(part).register_forward_hook(stop))
    try:
        with replay.passing({name for stage in before for name in stage.names}, join):
            yield inputs
    finally:
        for hook in hooks:
            hook.remove()
