"""Runs a decoder one block at a time over the calibration set.

Only one block's weights are on the device at a time (two copies when a step compares with the original model). Between
blocks the calibration set lives as hidden states in one buffer, which each block overwrites with its output: on the
device where it takes little of its memory, else on the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
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
from quant_methods.experts import unpack_experts

# Tokens that go through a block at once; bounds the activations' memory. A CPU is no quicker with more.
TOKENS_PER_BATCH = 8192
TOKENS_PER_BATCH_CPU = 2048
# Of a device's free memory, what hidden states (and as many of the original model's) may take.
HIDDEN_SHARE = 0.25


class Stop(Exception):
    """Ends a forward pass early, once what it was run for has been seen."""


class Decoder:
    """A transformers decoder whose blocks are loaded one at a time.

    Attributes:
        rounds: on a CPU that multiplies bfloat16 as such, float32 blocks may do so inside of ``rounded``.

    """

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
        self.rounds = False
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
        # Of a model that also sees pictures, the part that writes text is what runs here.
        self.config = self.config.get_text_config(decoder=True)
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
        if source is not None:
            unpack_experts(self.model, source.__contains__)
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
        step = batch_size(tokens.shape[1], self.device)
        with self._stubs() as seen:
            for start in range(0, len(tokens), step):
                batch = tokens[start : start + step].to(self.device)
                seen.clear()
                with contextlib.suppress(Stop):
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

    def _load_before_blocks(self, but: nn.Module | None = None) -> list[nn.Module]:
        """Give the decoder's modules outside of the blocks their weights: embeddings of tokens and, if any, positions.

        Args:
            but: a module that is not needed.

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
            if module is but:
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
            def forward(hidden_states: Tensor, *others: Tensor | None, **arguments: Any) -> Tensor:
                if any(other is not None for other in others):
                    raise ParetoError(
                        f"{type(self.model).__name__} gives its blocks inputs of each token beside hidden states, "
                        "which calibration does not follow"
                    )
                seen.append((hidden_states, arguments))
                if last:
                    raise Stop
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

    @contextlib.contextmanager
    def rounded(self) -> Iterator[None]:
        """Let blocks multiply in bfloat16 for the duration of the context, if ``rounds`` says so.

        The residual stream stays in float32, and so does everything that is computed of what the layers get. On two
        cores of an AMD EPYC a product takes half the time.
        """
        quick = self.device.type == "cpu" and self.dtype == torch.float32 and quick_dtype(self.device) == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=self.rounds and quick):
            yield

    def run(self, index: int, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Run a block on one batch of hidden states [batch, length, width] on the device."""
        shape = hidden.shape[:2]
        if shape not in self._arguments:
            # Some models (OPT) add embeddings of positions to whatever they are given.
            loaded = self._load_before_blocks(but=self.model.get_input_embeddings())
            with torch.no_grad(), self._stubs() as seen, contextlib.suppress(Stop):
                self.base(inputs_embeds=hidden, use_cache=False)
            for module in loaded:
                module.to("meta")
            self._arguments[shape] = [arguments for _, arguments in seen]
        out = block(hidden, **self._arguments[shape][index])
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def watch(self, index: int, block: nn.Module, hidden: Tensor, observer: Observer) -> None:
        """Show a block's attention to ``observer``, and go no further than that."""

        def stop(*_: Any) -> None:
            raise Stop

        with observing(observer, stop):
            for _, batch in self.batches(hidden):
                with contextlib.suppress(Stop):
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
        step = batch_size(hidden.shape[1], self.device)
        for start in range(0, len(hidden), step):
            yield start, hidden[start : start + step].to(self.device)


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


def batch_size(length: int, device: torch.device) -> int:
    """Return how many sequences of ``length`` tokens go through a block at once on a device."""
    return max(1, (TOKENS_PER_BATCH_CPU if device.type == "cpu" else TOKENS_PER_BATCH) // length)
