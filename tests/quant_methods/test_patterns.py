"""Globs that match no layer are refused by name, wherever they are given."""

from pathlib import Path

import pytest

from kv_cache.errors import ParetoError
from quant_methods.compress import compress
from quant_methods.methods.awq import AWQ
from quant_methods.methods.rtn import RTN
from quant_methods.recipe import Calibration, Recipe
from quant_methods.steps import Step

CALIBRATION = Calibration(num_samples=2, length=32)
W4 = RTN(bits=4, group_size=32)


def made(out: Path, model: Path, text: Path, *steps: Step, ignore: tuple[str, ...] = ("lm_head",)) -> str:
    given = Recipe("test", steps=steps, ignore=ignore, calibration=CALIBRATION, kv_scales=False)
    compress(model, given, out, text=text)
    return (out / "config.json").read_text()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("donw_proj", "'donw_proj' matches no layer of this model; near it: down_proj"),
        ("re:.*down_proj", r"'re:\.\*down_proj' is a regular expression, .* write '\*down_proj'"),
        ("model.layers.0.mlp", r"names modules that hold layers; write 'model\.layers\.0\.mlp\.\*'"),
        ("model.layers.7.*", "matches no layer of this model; "),
        ("zzzz", "layers end in q_proj, k_proj, v_proj, o_proj"),
    ],
)
def test_a_pattern_that_matches_nothing(
    tiny_model: Path, text_file: Path, tmp_path: Path, pattern: str, message: str
) -> None:
    given: tuple[tuple[tuple[Step, ...], tuple[str, ...]], ...] = (
        ((W4,), ("lm_head", pattern)),
        ((RTN(bits=4, group_size=32, targets=("*", pattern)),), ("lm_head",)),
        ((AWQ(targets=(pattern,)), W4), ("lm_head",)),
    )
    for steps, ignore in given:
        with pytest.raises(ParetoError, match=message) as caught:
            made(tmp_path / "out", tiny_model, text_file, *steps, ignore=ignore)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_patterns_that_match_are_followed(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    ignore = ("lm_head", "embed_tokens", "model.layers.1.mlp.*", "down_proj")
    config = made(tmp_path / "out", tiny_model, text_file, W4, ignore=ignore)
    assert "model.layers.1.mlp.up_proj" in config
    assert "model.layers.0.mlp.down_proj" in config
