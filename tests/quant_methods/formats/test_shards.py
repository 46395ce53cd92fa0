"""What ranks hold of a layer adds up to the layer, and layers merged are the layers."""

import dataclasses

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.formats.flat_form import flat_form
from quant_methods.formats.form import Form
from quant_methods.formats.parts.columns import Columns
from quant_methods.formats.shards import cut, share, stack
from tests.quant_methods.random_layers import random_layer

FORMS = [
    flat_form(3, 32, symmetric=False, columns=5, sparse=True, rank=3),
    flat_form(4, -1, columns=4, column_bits=8),
    flat_form(3, table=True, sparse=True, rank=2),
    flat_form(6, 64, columns=1),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_hold_the_whole(form: Form, ranks: int) -> None:
    linear = random_layer(form, 48, 256)
    weight = linear.read()
    rows = [share(48, 48 // ranks, rank, ranks) for rank in range(ranks)]
    parts = [cut(linear, here, (0, 256)).read() for here in rows]
    assert torch.equal(torch.cat(parts), weight)
    inputs = [share(256, 256 // ranks, rank, ranks) for rank in range(ranks)]
    parts = [cut(linear, (0, 48), here).read() for here in inputs]
    assert torch.allclose(torch.cat(parts, 1), weight, atol=1e-6)


def test_a_part_in_the_middle() -> None:
    linear = random_layer(FORMS[0], 48, 256)
    assert torch.allclose(cut(linear, (7, 30), (32, 160)).read(), linear.read()[7:30, 32:160], atol=1e-6)


def test_groups_are_not_cut() -> None:
    with pytest.raises(ParetoError, match="256 input channels inside its groups of 64"):
        cut(random_layer(flat_form(4, 64), 8, 256), (0, 8), (0, 96))


def test_who_shares() -> None:
    assert [share(64, 16, rank, 4) for rank in range(4)] == [(0, 16), (16, 32), (32, 48), (48, 64)]
    # Two key heads on four ranks: two ranks share each.
    assert [share(32, 16, rank, 4) for rank in range(4)] == [(0, 16), (0, 16), (16, 32), (16, 32)]
    # Replicated layers.
    assert [share(16, 16, rank, 4) for rank in range(4)] == [(0, 16)] * 4


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_merged_layers_are_the_layers(form: Form) -> None:
    layers = [random_layer(form, rows, 128, seed) for seed, rows in enumerate((40, 8, 24))]
    whole = stack(layers).read()
    assert torch.allclose(whole, torch.cat([layer.read() for layer in layers]), atol=2e-3)


def test_merged_layers_keep_equal_columns_exactly() -> None:
    layers = [random_layer(flat_form(4, -1, columns=4, column_bits=8), 16, 64, seed) for seed in range(2)]
    index = layers[0].part(Columns).index
    layers = [layer.having(dataclasses.replace(layer.part(Columns), index=index)) for layer in layers]
    merged = stack(layers)
    assert merged.part(Columns).weight.dtype == torch.int8
    assert torch.equal(merged.read(), torch.cat([layer.read() for layer in layers]))


def test_parts_that_only_some_have() -> None:
    forms = [flat_form(3, 32, columns=3), flat_form(3, 32, sparse=True), flat_form(3, 32, rank=2), flat_form(3, 32)]
    layers = [random_layer(form, 16, 64, seed) for seed, form in enumerate(forms)]
    assert torch.allclose(stack(layers).read(), torch.cat([layer.read() for layer in layers]), atol=2e-3)
