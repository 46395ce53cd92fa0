"""CUDA graphs of layers whose kernels overlap."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def check_layers_in_a_graph(layer: Callable[[Tensor], Tensor], x: Tensor, behind: Callable[[int], bool]) -> None:
    """Six layers, each of which needs what the one before made, replayed many times: no race may show.

    Args:
        layer: makes [tokens, width] of such inputs.
        x: the first ones, which are changed.
        behind: whether other kernels come behind a layer. Where none do, the next layer's follow at once, in the same
            memory.

    """

    def chain(*, wait: bool) -> Tensor:
        y = x
        for i in range(6):
            y = layer(y)
            if behind(i):
                y = torch.nn.functional.rms_norm(y, y.shape[1:])
            if wait:
                torch.cuda.synchronize()
        return y

    chain(wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(wait=False)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(found, chain(wait=True))
