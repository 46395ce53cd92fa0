"""Gradients of a step, a micro-batch at a time."""

import weakref

import pytest
import torch
from torch import nn

from quant_methods.training import graphed
from quant_methods.training.graphed import Gradients
from tests.quant_methods.training.test_recovery import Replayed


@pytest.mark.parametrize("captured", [False, True], ids=["autograd", "graph"])
def test_one_micro_batch_is_in_memory_at_a_time(captured, monkeypatch):
    # A class of its own, since another test counts how many there are of that one.
    monkeypatch.setattr(graphed, "GraphedGradients", type("Own", (Replayed,), {}))
    torch.manual_seed(0)
    layer = nn.Linear(8, 3)
    inputs, wanted = torch.randn(5, 8), torch.randn(5, 3)
    alive: list[weakref.ref] = []

    def parts():
        for start in range(0, 5, 2):
            assert not any(one() is not None for one in alive), "the one before is still held"
            made = inputs[start : start + 2].clone(), wanted[start : start + 2].clone()
            alive.extend(weakref.ref(tensor) for tensor in made)
            yield made
            del made

    gradients = Gradients(
        lambda x, y: (layer(x) - y).square().sum(), list(layer.parameters()), captured=captured, say=lambda line: None
    )
    for _ in range(2):  # A second step takes the first one's gradients away.
        gradients(parts(), 5)
    found = layer.weight.grad.clone()
    layer.weight.grad = None
    (layer(inputs) - wanted).square().sum().div(5).backward()
    torch.testing.assert_close(found, layer.weight.grad)
    assert len(alive) == 12
