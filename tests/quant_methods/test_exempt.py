"""Exempt lists: which layers each name leaves in 16 bits."""

import dataclasses
from pathlib import Path

import pytest

from kv_cache.errors import ParetoError
from quant_methods.calibration.calibrator import Decoder
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.exempt import globs
from quant_methods.methods.rtn import RTN
from quant_methods.plan import make_plan
from quant_methods.recipe import Recipe

RECIPE = Recipe("test", steps=(RTN(group_size=64),), kv_scales=False)


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return Decoder(tiny_model, Source(tiny_model))


@pytest.mark.parametrize(
    ("exempt", "quantized"),
    [
        ((), {f"{b} {m}" for b in "012" for m in "qkvogud"}),
        (("embeddings",), {f"{b} {m}" for b in "012" for m in "qkvogud"}),
        (("first",), {f"{b} {m}" for b in "12" for m in "qkvogud"}),
        (("first", "last"), {f"1 {m}" for m in "qkvogud"}),
        (("attention",), {f"{b} {m}" for b in "012" for m in "gud"}),
        (("mlp-only",), {f"{b} {m}" for b in "012" for m in "gud"}),
        (("mlp",), {f"{b} {m}" for b in "012" for m in "qkvo"}),
        (("attention-only", "last"), {f"{b} {m}" for b in "01" for m in "qkvo"}),
    ],
    ids=lambda value: str(sorted(value)),
)
def test_what_is_left_is_quantized(decoder: Decoder, exempt: tuple[str, ...], quantized: set[str]) -> None:
    plan = make_plan(decoder, dataclasses.replace(RECIPE, exempt=exempt), decoder.source.dir)
    assert {f"{name.split('.')[2]} {name.split('.')[-1][0]}" for name in plan.steps} == quantized
    assert len(plan.ignored_inside) == 21 - len(quantized)
    assert plan.ignored[-1] == "lm_head"


def test_embeddings_are_both_ends(decoder: Decoder) -> None:
    assert set(globs(("embeddings",), decoder)) == {"model.embed_tokens", "lm_head"}


@pytest.mark.parametrize(
    ("exempt", "message"),
    [
        (("middle",), "exempt: 'middle' is unknown; names: embeddings, first, last, attention, mlp"),
        (("mlp", "attention"), "attention and mlp together leave nothing"),
        (("mlp-only", "attention-only"), "together leave nothing"),
    ],
)
def test_refuses(decoder: Decoder, exempt: tuple[str, ...], message: str) -> None:
    with pytest.raises(ParetoError, match=message):
        make_plan(decoder, dataclasses.replace(RECIPE, exempt=exempt), decoder.source.dir)
