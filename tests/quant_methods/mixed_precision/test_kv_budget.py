"""The choice of bits under a KV budget: met, used, monotonic, and refused in one line where it cannot be."""

import itertools
import json
import math
import random

import pytest

from kv_cache.errors import ParetoError
from kv_cache.formats import META_BYTES, layer_format
from quant_methods.mixed_precision.kv_budget import KVBudget, Losses, assign, widths
from quant_methods.mixed_precision.kv_plot import plot


def random_losses(layers: int, head_dim: int, seed: int = 0) -> list[Losses]:
    """Losses that fall about four times with each bit, from sizes far apart."""
    draw = random.Random(seed)
    return [
        {
            kind: {b: math.exp(size) * 4.0**-b * draw.uniform(0.7, 1.4) for b in widths(head_dim)}
            for kind, size in (("key", draw.gauss(0, 1)), ("value", draw.gauss(0, 1)))
        }
        for _ in range(layers)
    ]


def test_bits_are_those_that_pages_can_hold() -> None:
    assert widths(64) == widths(128) == widths(96) == (2, 3, 4, 6, 8)
    assert widths(80) == (2, 4, 6, 8)
    with pytest.raises(ParetoError, match="a quantized KV cache does not serve head size 72"):
        widths(72)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("text", ["2.7bits", "3.5bits", "4.33 bits", "7bit"])
def test_budgets_are_met_and_used(head_dim: int, text: str) -> None:
    budget = KVBudget.parse(text)
    found = assign(random_losses(9, head_dim), head_dim, budget)
    taken = sum(layer_format(*pair).bytes_per_token(head_dim) for pair in found.bits)
    assert found.bits_per_element == pytest.approx(8 * taken / (2 * head_dim * 9))
    # One more bit for one side of one layer would not fit, or it would be 4 to 6.
    assert budget.bits - 2 / 18 < found.bits_per_element <= budget.bits
    assert taken - 9 * META_BYTES == sum(head_dim * bits // 8 for pair in found.bits for bits in pair)


def test_the_choice_is_the_best_of_all() -> None:
    losses = random_losses(3, 64, seed=5)
    for text in ("2.6bits", "3.5bits", "5bits"):
        found = assign(losses, 64, KVBudget.parse(text))
        room = (float(text[:-4]) - 0.25) * 6 + 1e-9
        best = min(
            sum(unit[bits] for unit, bits in zip((x[k] for x in losses for k in ("key", "value")), each, strict=True))
            for each in itertools.product(widths(64), repeat=6)
            if sum(each) <= room
        )
        assert found.predicted == pytest.approx(best)


def test_more_budget_never_loses_more() -> None:
    losses = random_losses(7, 64, seed=2)
    predicted = [assign(losses, 64, KVBudget("", bits / 20)).predicted for bits in range(45, 166)]
    assert predicted == sorted(predicted, reverse=True)
    assert predicted[0] > 100 * predicted[-1]


def test_equal_layers_get_what_their_format_would() -> None:
    losses = random_losses(1, 64) * 12
    for name, bits in (("int4_per_head", 4), ("int3_per_head", 3), ("int8_per_head", 8)):
        # Halving errors for each bit, no mix of widths is better than the same width everywhere.
        even = [{kind: {b: 4.0**-b for b in widths(64)} for kind in ("key", "value")}] * 12
        found = assign(even, 64, KVBudget("", bits + 0.25))
        assert found.bits == [(bits, bits)] * 12
        assert found.predicted == pytest.approx(found.uniform()[name].predicted)
    found = assign(losses, 64, KVBudget.parse("3.5bits"))
    assert sum(map(sum, found.bits)) == 78


def test_the_lowest_and_the_highest_budget_are_possible() -> None:
    losses = random_losses(4, 80)
    assert assign(losses, 80, KVBudget.parse("2.2bits")).bits == [(2, 2)] * 4
    assert assign(losses, 80, KVBudget.parse("8.2bits")).bits == [(8, 8)] * 4


@pytest.mark.parametrize("text", ["2.2bits", "8.3bits", "0bits"])
def test_budgets_that_cannot_be_met_name_the_range(text: str) -> None:
    with pytest.raises(ParetoError, match=r"heads of 64 channels take 2\.25bits to 8\.25bits \(0\.25 of them") as error:
        assign(random_losses(2, 64), 64, KVBudget.parse(text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["3.5", "3.5GB", "bits", "-3bits", "3,5bits", "", "infbits", "3.5bits a token"])
def test_unreadable_budgets(text: str) -> None:
    with pytest.raises(ParetoError, match=r"expected the mean bits of a cached element, such as 3\.5bits"):
        KVBudget.parse(text)


def test_the_record_and_the_plot_hold_every_layer() -> None:
    found = assign(random_losses(5, 64), 64, KVBudget.parse("3.5bits"))
    record = json.loads(json.dumps(found.to_dict()))
    assert [(x["key"]["bits"], x["value"]["bits"]) for x in record["layers"]] == found.bits
    chosen = (x[kind]["kl"][str(x[kind]["bits"])] for x in record["layers"] for kind in ("key", "value"))
    assert sum(chosen) == pytest.approx(record["predicted_kl"])
    assert record["uniform"]["int4_per_head"]["bits_per_element"] == 4.25
    assert plot(found, "a title").startswith(b"\x89PNG")
