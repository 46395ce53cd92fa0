"""Keeps what parts of a block have put out, so that later passes over the calibration set need not run them again.

A block is solved in stages, and each stage's inputs come from a pass over the calibration set through all that lies
before it: attention would run five times. But a part of the block (a direct child: attention, MLP) whose linear layers
are all solved puts out the same in every later pass. Kept are the outputs alone, in host memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

MOST_BYTES = 1 << 30
"""Of a block's outputs that are kept; of a larger calibration set, the first batches' are."""

Joined = Callable[[str, Tensor], None]


class Replay:
    """One block's parts, over passes that all show it the same batches in the same order.

    Args:
        block: the block.
        constant: its weights never change, so that whatever runs to its end can be kept.
        joining: linear layers whose outputs `passing` reports, by name within the block.

    """

    def __init__(self, block: nn.Module, *, constant: bool, joining: Collection[str] = ()) -> None:
        self.constant, self.joining, self.block = constant, set(joining), block
        self.parts: dict[str, set[str]] = {}
        for part, child in block.named_children():
            linears = {f"{part}.{name}" for name, module in child.named_modules() if isinstance(module, nn.Linear)}
            if linears and not isinstance(child, nn.Linear):
                self.parts[part] = linears
        self._kept: dict[str, list[tuple[Any, dict[str, Tensor]]]] = {part: [] for part in self.parts}
        self._bytes = 0

    def part_of(self, linear: str) -> str | None:
        """Return the part that a linear layer is in; None: it is a child of the block itself."""
        return next((part for part, linears in self.parts.items() if linear in linears), None)

    @contextlib.contextmanager
    def passing(self, solved: Collection[str], joined: Joined = lambda name, output: None) -> Iterator[None]:
        """Make one pass over all batches.

        Args:
            solved: linear layers that stay as they are from now on.
            joined: told the outputs of ``joining`` layers in each batch, whether they run or not.

        """
        hooks, patched = [], []
        seen: dict[str, Tensor] = {}

        def tell(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                seen[name] = output
                joined(name, output)

            return hook

        for name in self.joining:
            hooks.append(self.block.get_submodule(name).register_forward_hook(tell(name)))
        for part, linears in self.parts.items():
            child = self.block.get_submodule(part)
            finished = linears <= set(solved)
            own = self.joining & linears
            child.forward = self._forward(part, child.forward, finished, own, seen, joined)
            patched.append(child)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for child in patched:
                del child.forward

    def _forward(
        self,
        part: str,
        run: Callable[..., Any],
        finished: bool,
        own: set[str],
        seen: dict[str, Tensor],
        joined: Joined,
    ) -> Callable[..., Any]:
        kept, calls = self._kept[part], 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            number, calls = calls, calls + 1
            if finished and number < len(kept):
                output, outputs = kept[number]
                for name, each in outputs.items():
                    joined(name, each)
                return _copy(output, {})
            output = run(*args, **kwargs)
            if (finished or self.constant) and number == len(kept) and self._room(output):
                # What a part puts out is mostly the output of its last linear layer: one copy is enough.
                copies: dict[int, Tensor] = {}
                kept.append((_copy(output, copies), {name: _copy(seen[name], copies) for name in own}))
            return output

        return forward

    def _room(self, output: Any) -> bool:
        self._bytes += sum(x.numel() * x.element_size() for x in _tensors(output))
        return self._bytes <= MOST_BYTES


Replays = tuple[Replay | None, Replay | None]
"""Of a block that is being solved, and of the original one; None where nothing is kept, or there is no original."""


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, Tensor)]


def _copy(output: Any, copies: dict[int, Tensor]) -> Any:
    """Return an output whose tensors nobody else writes to; of a tensor that was copied before, the same copy."""
    if isinstance(output, tuple):
        return tuple(_copy(x, copies) for x in output)
    if not isinstance(output, torch.Tensor):
        return output
    if id(output) not in copies:
        copies[id(output)] = output.clone()
    return copies[id(output)]
