"""Shapes of quantized models: what is written is what a checkpoint of that recipe would say."""

import json
from pathlib import Path

import pytest

from bench.lab import make_shape
from quant_methods.formats.flat_form import flat_form
from quant_methods.formats.native_format import NativeConfig

SHAPE = Path(__file__).parents[3] / "bench" / "shapes" / "mistral-7b"
LAYERS = 32 * 7


def written(tmp_path: Path, *words: str) -> dict:
    assert make_shape.main([str(SHAPE), words[0], str(tmp_path / "out"), *words[1:]]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "quantization_config"} == json.loads(
        (SHAPE / "config.json").read_text()
    )
    return config["quantization_config"]


def test_a_standard_format_where_one_will_do(tmp_path: Path) -> None:
    settings = written(tmp_path, "smoothquant-w8a8")
    (group,) = settings["config_groups"].values()
    assert (settings["quant_method"], settings["format"]) == ("compressed-tensors", "int-quantized")
    assert (group["targets"], group["weights"]["num_bits"], settings["ignore"]) == (["Linear"], 8, ["lm_head"])


def test_the_format_of_ours_where_it_is_needed_or_wanted(tmp_path: Path) -> None:
    for words, bits in ((("gptq-w3",), 3), (("gptq-w4", "--native"), 4)):
        forms = NativeConfig.parse(written(tmp_path, *words)).forms
        assert len(forms) == LAYERS
        assert set(forms.values()) == {flat_form(bits, 128, symmetric=False)}


def test_outlier_channels_by_the_width_of_each_layer(tmp_path: Path) -> None:
    forms = NativeConfig.parse(written(tmp_path, "gptq-w4", "--outliers", "0.01")).forms
    assert forms["model.layers.3.mlp.up_proj"] == flat_form(4, 128, symmetric=False, columns=41)
    assert forms["model.layers.3.mlp.down_proj"] == flat_form(4, 128, symmetric=False, columns=143)
    table = NativeConfig.parse(written(tmp_path, "squeezellm-w3")).forms["model.layers.0.mlp.up_proj"]
    assert table == flat_form(3, table=True, sparse=True)


def test_what_rounds_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_shape.main([str(SHAPE), "kv-scales", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "make_shape: error: recipe kv-scales rounds no weights\n"
    assert not (tmp_path / "out").exists()
