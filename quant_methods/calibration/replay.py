"""Keeps what parts of a block have put out, so that later passes over the calibration set need not run them again.

A block is solved in stages, and each stage's inputs come from a pass over the calibration set through all that lies
before it: attention would run five times. But a part of the block (a direct child: attention, MLP) whose linear layers
are all solved puts out the same in every later pass. Of a part that ends with a linear layer, the inputs of that layer
are the same from the pass on that was made for them: once it is solved, it runs on them alone. Kept are these inputs
until then, and the outputs, in host memory.
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
        self._fed: dict[str, tuple[str, list[Tensor | None]]] = {}
        # Parts that put out what their last layer does, and nothing else: the function makes one of the other.
        self._ends: dict[str, Callable[[Tensor], Any]] = {}
        self._bytes = 0

    def part_of(self, linear: str) -> str | None:
        """Return the part that a linear layer is in; None: it is a child of the block itself."""
        return next((part for part, linears in self.parts.items() if linear in linears), None)

    def feed(self, part: str, linear: str, inputs: Tensor) -> None:
        """Take what a part's last linear layer gets in a batch, all others of the part being solved; batches in order.

        Args:
            part: the part.
            linear: the layer.
            inputs: as the layer gets them.

        """
        fed = self._fed.setdefault(part, (linear, []))[1]
        fed.append(inputs.clone() if self._room(inputs) else None)

    @contextlib.contextmanager
    def passing(
        self, solved: Collection[str], joined: Joined = lambda name, output: None, *, last: bool = False
    ) -> Iterator[None]:
        """Make one pass over all batches.

        Args:
            solved: linear layers that stay as they are from now on.
            joined: told the outputs of ``joining`` layers in each batch, whether they run or not.
            last: there will be no other pass, so nothing is kept of this one.

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
            child.forward = self._forward(part, child.forward, finished, own, seen, joined, last)
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
        last: bool,
    ) -> Callable[..., Any]:
        kept, calls = self._kept[part], 0
        linear, fed = self._fed.get(part, ("", []))

        def from_fed(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            """Run the last layer on what it was fed, or all of the part where that is not known."""
            inputs = fed[number] if finished and number < len(fed) else None
            if inputs is None:
                return run(*args, **kwargs)
            fed[number] = None
            self._bytes -= _size(inputs)
            if part in self._ends:
                return self._ends[part](self.block.get_submodule(linear)(inputs))
            found: list[Tensor] = []
            hook = self.block.get_submodule(linear).register_forward_hook(lambda *call: found.append(call[2]))
            output = run(*args, **kwargs)
            hook.remove()
            if (end := _end(output, found)) is not None:
                self._ends[part] = end
            else:
                self._bytes -= sum(_size(x) for x in fed if x is not None)
                fed.clear()
            return output

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            number, calls = calls, calls + 1
            if finished and number < len(kept):
                output, outputs = kept[number]
                for name, each in outputs.items():
                    joined(name, each)
                return _copy(output, {})
            output = from_fed(number, args, kwargs)
            if (finished or self.constant) and not last and number == len(kept) and self._room(output):
                # What a part puts out is mostly the output of its last linear layer: one copy is enough.
                copies: dict[int, Tensor] = {}
                kept.append((_copy(output, copies), {name: _copy(seen[name], copies) for name in own}))
            return output

        return forward

    def _room(self, output: Any) -> bool:
        needed = _size(output)
        if self._bytes + needed > MOST_BYTES:
            return False
        self._bytes += needed
        return True


Replays = tuple[Replay | None, Replay | None]
"""Of a block that is being solved, and of the original one; None where nothing is kept, or there is no original."""


def _size(output: Any) -> int:
    """Return the bytes of the tensors that a part puts out."""
    tensors = output if isinstance(output, tuple) else (output,)
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


def _end(output: Any, found: list[Tensor]) -> Callable[[Tensor], Any] | None:
    """Return what makes a part's output of its last layer's; None: the part puts out something else too."""
    if len(found) != 1:
        return None
    if output is found[0]:
        return lambda ended: ended
    if isinstance(output, tuple) and output and output[0] is found[0] and all(x is None for x in output[1:]):
        rest = output[1:]
        return lambda ended: (ended, *rest)
    return None


def _copy(output: Any, copies: dict[int, Tensor]) -> Any:
    """Return an output whose tensors nobody else writes to; of a tensor that was copied before, the same copy."""
    if isinstance(output, tuple):
        return tuple(_copy(x, copies) for x in output)
    if not isinstance(output, torch.Tensor):
        return output
    if id(output) not in copies:
        copies[id(output)] = output.clone()
    return copies[id(output)]
