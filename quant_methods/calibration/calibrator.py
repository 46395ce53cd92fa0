"""Runs a decoder one block at a time over the calibration set and gathers what the methods need to know.

Only one block's weights are on the device at a time (two copies when a step compares with the original model). Between
blocks the calibration set lives as hidden states in one buffer, which each block overwrites with its output: on the
device where it takes little of its memory, else on the CPU.

Inside a block, linear layers that share an input form a stage (q, k, v; o; gate, up; down in a Llama), found by
watching one forward pass. Stages are solved in the order in which they run, and each sees inputs computed with the
stages before it already quantized ("true sequential" in GPTQ's code).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from kv_cache.errors import ParetoError
from quant_methods.calibration.finite import check_inputs, check_weights
from quant_methods.calibration.kv_observer import ATTENTION, Observer, observing
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.checkpoints.readback import ReadBack

# Tokens that go through a block at once; bounds the activations' memory.
TOKENS_PER_BATCH = 8192
SAMPLE_TOKENS = 1024
# Of a device's free memory, what hidden states (and as many of the original model's) may take.
HIDDEN_SHARE = 0.25


class _Stop(Exception):
    """Ends a forward pass early, once what it was run for has been seen."""


@dataclass(frozen=True)
class Stage:
    """Linear layers of a block that share one input.

    Attributes:
        names: module names within the block, in call order.
        joins_residual: its one layer's output is added to the residual stream.

    """

    names: tuple[str, ...]
    joins_residual: bool


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
        residual: (r_original - r)^T x, [out, in], r being the residual stream before the stage, or None.
        ranges: sizes of x, or None.

    All are float32 on the device.
    """

    hessian: Tensor
    cross: Tensor | None = None
    residual: Tensor | None = None
    ranges: Ranges | None = None


class Decoder:
    """A transformers decoder whose blocks are loaded one at a time."""

    def __init__(self, model_dir: Path, source: Source | None = None, device: str = "cpu") -> None:
        """Build the model without weights.

        Args:
            model_dir: directory with config.json.
            source: reads the weights, which have to lie one tensor a parameter. None reads them whatever way they
                are stored, quantized or not, and runs blocks in the dtype in which the device is quick: good enough
                to watch them, while to solve for their weights takes float32.
            device: where blocks run.

        Raises:
            ParetoError: transformers does not know the architecture, or its blocks cannot be found.

        """
        self.device = torch.device(device)
        self.dtype = torch.float32 if source is not None else quick_dtype(self.device)
        try:
            self.config = AutoConfig.from_pretrained(model_dir)
            # Blocks are ordinary layers here, whatever is stored of them.
            if hasattr(self.config, "quantization_config"):
                del self.config.quantization_config
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(
                    self.config, attn_implementation=ATTENTION, dtype=self.dtype
                )
        except (ValueError, KeyError, ImportError, OSError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ParetoError(f"{model_dir}: transformers cannot build this model ({reason})") from error
        self.model.eval().requires_grad_(False)
        self.base = self.model.get_decoder()
        blocks = getattr(self.base, "layers", None)
        if not isinstance(blocks, nn.ModuleList) or not len(blocks):
            raise ParetoError(
                f"{model_dir}: {type(self.model).__name__} is not a supported decoder (it has no .layers)"
            )
        self.blocks: list[nn.Module] = list(blocks)
        self._base_prefix = next(name for name, module in self.model.named_modules() if module is self.base)
        self.prefix = next(name for name, module in self.model.named_modules() if module is blocks)
        self._arguments: dict[torch.Size, list[dict[str, Any]]] = {}
        self.source = ReadBack(model_dir, self.model, self.device) if source is None else source
        missing = [n for n in self.block_tensors(0) if n not in self.source]
        if missing:
            limit = "its layout is not one tensor a parameter, which is all that compressing weights supports"
            reason = limit if source is not None else "transformers knows no way to make it of what is there"
            raise ParetoError(f"{model_dir}: {missing[0]} is not in the checkpoint; {reason}")

    def name(self, index: int, local: str) -> str:
        """Return the full name of a module or parameter of block ``index``."""
        return f"{self.prefix}.{index}.{local}"

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Return the linear layers of a block by local name, in the order of definition."""
        return {name: module for name, module in self.blocks[index].named_modules() if isinstance(module, nn.Linear)}

    def block_tensors(self, index: int) -> list[str]:
        """Return the full names of a block's parameters."""
        return [self.name(index, local) for local in self.blocks[index].state_dict()]

    def read_block(self, index: int) -> dict[str, Tensor]:
        """Return a block's weights by local name, on the device in the blocks' dtype.

        Raises:
            ParetoError: the checkpoint lacks one of its tensors.

        """
        state = {local: self.source.read(self.name(index, local)) for local in self.blocks[index].state_dict()}
        # Moved first: `to` with both would widen on the CPU and move twice the bytes.
        moved = {local: tensor.to(self.device).to(self.dtype) for local, tensor in state.items()}
        check_weights({self.name(index, local): tensor for local, tensor in moved.items()})
        return moved

    @contextlib.contextmanager
    def loaded(self, index: int, state: dict[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Give a block its weights for the duration of the context.

        Args:
            index: of the block.
            state: what ``read_block`` returned, which is not kept; None: it is read now.

        Raises:
            ParetoError: the checkpoint lacks one of its tensors.

        """
        block = self.blocks[index]
        block.load_state_dict(self.read_block(index) if state is None else state, assign=True)
        del state
        try:
            yield block.requires_grad_(False)
        finally:
            block.to("meta")

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Return the hidden states that enter the first block, [sequences, length, width] in the blocks' dtype.

        Also learns what else transformers passes to each block (positions, masks).

        Args:
            tokens: int64 [sequences, length].

        """
        self.compute_buffers()
        loaded = self._load_before_blocks()
        hidden: Tensor | None = None
        step = batch_size(tokens.shape[1])
        with self._stubs() as seen:
            for start in range(0, len(tokens), step):
                batch = tokens[start : start + step].to(self.device)
                seen.clear()
                with contextlib.suppress(_Stop):
                    self.base(input_ids=batch, use_cache=False)
                first = seen[0][0]
                if hidden is None:
                    hidden = self._buffer((*tokens.shape, first.shape[-1]))
                hidden[start : start + len(batch)] = first
                # Every sequence is full, so a batch's shape determines the rest of its arguments.
                self._arguments.setdefault(batch.shape, [arguments for _, arguments in seen])
        for module in loaded:
            module.to("meta")
        assert hidden is not None
        return hidden

    def _load_before_blocks(self) -> list[nn.Module]:
        """Give the decoder's modules outside of the blocks their weights: embeddings of tokens and, if any, positions.

        Returns:
            The modules that had none before.

        """
        loaded = []
        for name, module in self.model.named_modules():
            own = [
                local for local, parameter in module._parameters.items() if parameter is not None and parameter.is_meta
            ]
            if not name.startswith(self._base_prefix) or f"{name}.".startswith(self.prefix + ".") or not own:
                continue
            for local in own:
                weight = self.source.read(f"{name}.{local}").to(self.device, self.dtype)
                check_weights({f"{name}.{local}": weight})
                module._parameters[local] = nn.Parameter(weight, requires_grad=False)
            loaded.append(module)
        return loaded

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        """Return room for hidden states."""
        if self.device.type == "cuda":
            fits = 2 * 4 * math.prod(shape) <= HIDDEN_SHARE * torch.cuda.mem_get_info(self.device)[0]
            where: dict[str, Any] = {"device": self.device} if fits else {"pin_memory": True}
            return torch.empty(shape, dtype=self.dtype, **where)
        return torch.empty(shape, dtype=self.dtype)

    def compute_buffers(self) -> None:
        """Give what lies outside of the blocks the buffers that follow from the configuration (rotary frequencies)."""
        for name, module in self.base.named_modules():
            buffers = module._non_persistent_buffers_set
            if name.startswith("layers") or next(module.children(), None) is not None or not buffers:
                continue
            for buffer in buffers:
                module._buffers[buffer] = torch.empty_like(module._buffers[buffer], device=self.device)
            self.model._init_weights(module)

    @contextlib.contextmanager
    def _stubs(self) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
        """Replace every block by a stub that records its arguments and passes the hidden states on."""
        seen: list[tuple[Tensor, dict[str, Any]]] = []

        def stub(last: bool) -> Callable[..., Tensor]:
            def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
                seen.append((hidden_states, arguments))
                if last:
                    raise _Stop
                return hidden_states

            return forward

        for index, block in enumerate(self.blocks):
            block.forward = stub(index == len(self.blocks) - 1)
        try:
            yield seen
        finally:
            for block in self.blocks:
                del block.forward

    def scale_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a linear layer's scales are stored in."""
        # vLLM serves float32 checkpoints in bfloat16 unless told otherwise.
        stored = self.source.entries[f"{name}.weight"][1]["dtype"]
        return torch.float16 if stored == "F16" else torch.bfloat16

    def run(self, index: int, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Run a block on one batch of hidden states [batch, length, width] on the device."""
        shape = hidden.shape[:2]
        if shape not in self._arguments:
            with torch.no_grad(), self._stubs() as seen, contextlib.suppress(_Stop):
                self.base(inputs_embeds=hidden, use_cache=False)
            self._arguments[shape] = [arguments for _, arguments in seen]
        out = block(hidden, **self._arguments[shape][index])
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def watch(self, index: int, block: nn.Module, hidden: Tensor, observer: Observer) -> None:
        """Show a block's attention to ``observer``, and go no further than that."""

        def stop(*_: Any) -> None:
            raise _Stop

        with observing(observer, stop):
            for _, batch in self.batches(hidden):
                with contextlib.suppress(_Stop):
                    self.run(index, block, batch)

    @torch.no_grad()
    def advance(self, index: int, block: nn.Module, hidden: Tensor, observer: Observer | None = None) -> None:
        """Overwrite the calibration set's hidden states by the block's output, showing attention to ``observer``."""
        with observing(observer):
            for start, batch in self.batches(hidden):
                hidden[start : start + len(batch)] = self.run(index, block, batch)
        check_inputs({f"{self.prefix}.{index}: its outputs": hidden})

    def batches(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (first sequence, hidden states on the device) of each batch."""
        step = batch_size(hidden.shape[1])
        for start in range(0, len(hidden), step):
            yield start, hidden[start : start + step].to(self.device)

    @torch.no_grad()
    def stages(self, index: int, block: nn.Module, hidden: Tensor) -> list[Stage]:
        """Return the block's stages in the order in which they run, found by running it on one sequence."""
        calls: list[tuple[str, Tensor, Tensor]] = []
        hooks = []
        for name, module in self.linears(index).items():

            def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                calls.append((name, args[0], output))

            hooks.append(module.register_forward_hook(record))
        start = next(self.batches(hidden))[1]
        try:
            end = self.run(index, block, start)
        finally:
            for hook in hooks:
                hook.remove()
        check_inputs(
            {f"{self.name(index, name)}: its outputs": output for name, _, output in calls}
            | {f"{self.prefix}.{index}: its outputs": end}
        )
        groups: list[list[tuple[str, Tensor, Tensor]]] = []
        for call in calls:
            # `calls` keeps every input alive, so identity is equality of tensors here.
            if groups and groups[-1][0][1] is call[1]:
                groups[-1].append(call)
            else:
                groups.append([call])
        if len(calls) != len({name for name, _, _ in calls}):
            raise ParetoError(f"{self.name(index, calls[0][0])}: a linear layer runs twice in its block; unsupported")
        writers = [group[0] for group in groups if len(group) == 1 and group[0][2].shape == start.shape]
        total = start + sum(output for _, _, output in writers)
        # Holds for pre-norm blocks; models that normalize or scale a layer's output before adding it differ.
        plain = torch.allclose(total, end, rtol=1e-3, atol=1e-4 * end.abs().max().item())
        joining = {name for name, _, _ in writers} if plain else set()
        return [Stage(tuple(name for name, _, _ in group), group[0][0] in joining) for group in groups]

    @torch.no_grad()
    def statistics(
        self,
        index: int,
        block: nn.Module,
        hidden: Tensor,
        *,
        stages: list[Stage],
        position: int,
        original: tuple[nn.Module, Tensor] | None = None,
        ranges: bool = False,
    ) -> Statistics:
        """Gather the statistics of one stage's inputs over the calibration set.

        Args:
            index: the block's index.
            block: the block, stages before ``position`` already quantized.
            hidden: the hidden states that enter it, float32 [sequences, length, width].
            stages: the block's stages.
            position: which stage.
            original: the original block and the original model's hidden states, to compare with.
            ranges: gather the sizes of the inputs too.

        """
        stage = stages[position]
        before = [s.names[0] for s in stages[:position] if s.joins_residual]
        width = block.get_submodule(stage.names[0]).in_features
        hessian = torch.zeros((width, width), device=self.device)
        cross = torch.zeros_like(hessian) if original else None
        residual = (
            torch.zeros((hidden.shape[-1], width), device=self.device) if original and stage.joins_residual else None
        )
        tokens = hidden.shape[0] * hidden.shape[1]
        largest, mean = (torch.zeros(width, device=self.device) for _ in range(2))
        sample: list[Tensor] = []
        for start, batch in self.batches(hidden):
            inputs, stream = self._inputs(index, block, batch, stage, before)
            hessian.addmm_(inputs.T, inputs)
            if ranges:
                size = inputs.abs()
                torch.maximum(largest, size.amax(0), out=largest)
                mean += size.sum(0) / tokens
                sample.append(inputs[:: max(tokens // SAMPLE_TOKENS, 1)].clone())
            if original:
                original_block, original_hidden = original
                original_batch = original_hidden[start : start + len(batch)].to(self.device)
                original_inputs, original_stream = self._inputs(index, original_block, original_batch, stage, before)
                assert cross is not None
                cross.addmm_((original_inputs - inputs).T, inputs)
                if residual is not None:
                    residual.addmm_((original_stream - stream).T, inputs)
        for matrix in (hessian, cross, residual):
            if matrix is not None:
                matrix.div_(tokens)
        check_inputs({f"{self.name(index, stage.names[0])}: the squares of its inputs": hessian})
        return Statistics(hessian, cross, residual, Ranges(largest, mean, torch.cat(sample)) if ranges else None)

    def _inputs(
        self, index: int, block: nn.Module, hidden: Tensor, stage: Stage, before: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Return a stage's inputs [tokens, in] and the residual stream [tokens, width] before it."""
        found: list[Tensor] = []
        stream = hidden

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _Stop

        def join(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal stream
            stream = stream + output

        hooks = [block.get_submodule(stage.names[0]).register_forward_pre_hook(stop)]
        hooks += [block.get_submodule(name).register_forward_hook(join) for name in before]
        try:
            with contextlib.suppress(_Stop):
                self.run(index, block, hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0].flatten(0, 1), stream.flatten(0, 1)


def quick_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for what need not be exact: bfloat16 where the device multiplies it as such, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # PyTorch has no public question for it.
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    known = (getattr(torch.cpu, name, None) for name in asked)
    return torch.bfloat16 if any(supported is not None and supported() for supported in known) else torch.float32


def clone(block: nn.Module) -> nn.Module:
    """Return a copy of a block with its weights."""
    return copy.deepcopy(block)


def batch_size(length: int) -> int:
    """Return how many sequences of ``length`` tokens go through a block at once."""
    return max(1, TOKENS_PER_BATCH // length)
