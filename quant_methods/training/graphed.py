"""One micro-batch's loss and gradients as a CUDA graph: a small model's step is thousands of short kernels.

Launched one by one, these wait for Python; as a graph they run as fast as the device is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor | None], Tensor]
"""From tokens, int64 [sequences, length], and what the original's last block puts out for them, to a scalar."""

WARM_UP = 2
"""Runs before the capture, in which libraries choose their kernels and gradients get their memory."""
ACTIVATION_SHARE = 0.25
"""Of the memory that is free, what activations of all blocks may take so that they are kept instead of recomputed."""
FLOATS_OF_HIDDEN, FLOATS_OF_INNER = 16, 6
"""Numbers that a block keeps for its backward pass, for each token: in widths of the model, and of its MLP."""


def keeps_activations(tokens: int, layers: int, hidden: int, inner: int, device: torch.device) -> bool:
    """Return whether the activations of all blocks fit a device's memory at once.

    Args:
        tokens: that go through the model together.
        layers: number of blocks.
        hidden: width of the model.
        inner: width of its MLP.
        device: where; a CPU recomputes, as its memory holds everything else too.

    """
    if device.type != "cuda":
        return False
    wanted = 4 * tokens * layers * (FLOATS_OF_HIDDEN * hidden + FLOATS_OF_INNER * inner)
    return wanted < ACTIVATION_SHARE * torch.cuda.mem_get_info(device)[0]


class GraphedGradients:
    """Adds the gradients of a loss to parameters by replaying a CUDA graph.

    Args:
        loss: what is captured; nothing in it may depend on values on the host. It has no gradients yet but these.
        parameters: what learns. Their gradients must stay the same tensors from now on: zero them in place.
        tokens: an example of its first argument, on the device.
        targets: of its second.

    Raises:
        RuntimeError: something in the loss cannot be captured.

    """

    def __init__(self, loss: Loss, parameters: Iterable[nn.Parameter], tokens: Tensor, targets: Tensor | None) -> None:
        self._tokens = tokens.clone()
        self._targets = None if targets is None else targets.clone()
        side = torch.cuda.Stream(tokens.device)
        side.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                loss(self._tokens, self._targets).backward()
        torch.cuda.current_stream(tokens.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            loss(self._tokens, self._targets).backward()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()

    def fits(self, tokens: Tensor) -> bool:
        """Return whether the captured shapes are those of ``tokens``."""
        return tokens.shape == self._tokens.shape

    def add(self, tokens: Tensor, targets: Tensor | None) -> None:
        """Add the gradients of another micro-batch of the same shape."""
        self._tokens.copy_(tokens)
        if self._targets is not None and targets is not None:
            self._targets.copy_(targets)
        self._graph.replay()


class Gradients:
    """The gradients of a step: by a CUDA graph where that is possible, else by autograd as usual.

    Args:
        loss: of a micro-batch, the sum over its sequences.
        parameters: what learns.
        captured: whether a graph may be captured.
        say: told where it cannot be.

    """

    def __init__(
        self, loss: Loss, parameters: list[nn.Parameter], *, captured: bool, say: Callable[[str], None]
    ) -> None:
        self._loss, self._parameters, self._capture, self._say = loss, parameters, captured, say
        self._graph: GraphedGradients | None = None

    def __call__(self, parts: Iterable[tuple[Tensor, Tensor | None]], sequences: int) -> None:
        """Give the parameters the gradients of the mean over sequences, in place of those that they have.

        Args:
            parts: micro-batches, the arguments of the loss. Each is asked for when the one before is done with and
                forgotten, so that the device holds one at a time.
            sequences: in all of them; every step has as many.

        """

        def mean(tokens: Tensor, targets: Tensor | None) -> Tensor:
            return self._loss(tokens, targets).div(sequences)

        first = True
        for tokens, targets in parts:
            if self._capture:
                self._capture = False
                try:
                    self._graph = GraphedGradients(mean, self._parameters, tokens, targets)
                except RuntimeError as error:
                    # What cannot be captured can still be trained, only slower.
                    torch.cuda.synchronize()
                    self._say(f"without a CUDA graph: {str(error).partition(chr(10))[0]}")
            if first:
                self._clear()
                first = False
            if self._graph is not None and self._graph.fits(tokens):
                self._graph.add(tokens, targets)
            else:
                mean(tokens, targets).backward()
            del tokens, targets

    def _clear(self) -> None:
        """Take gradients away; a graph adds to the same tensors for ever, so there they become zero."""
        for parameter in self._parameters:
            if parameter.grad is not None and self._graph is not None:
                parameter.grad.zero_()
            else:
                parameter.grad = None
