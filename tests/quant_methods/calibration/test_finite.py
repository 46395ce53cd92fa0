"""NaN, infinity and overflow are refused in a line that names the layer, for every kind of recipe."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kv_cache.errors import ParetoError
from quant_methods.calibration.finite import check_inputs
from quant_methods.compress import compress
from quant_methods.methods.awq import AWQ
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.rtn import RTN
from quant_methods.methods.smoothquant import SmoothQuant
from quant_methods.methods.squeezellm import SqueezeLLM
from quant_methods.recipe import Calibration, Recipe
from quant_methods.steps import Step

CALIBRATION = Calibration(num_samples=4, length=32)
R = RTN(bits=4, group_size=32)
STEPS: dict[str, tuple[Step, ...]] = {
    "rtn": (R,),
    "gptq": (GPTQ(bits=4, group_size=32),),
    "awq": (AWQ(), R),
    "smoothquant": (SmoothQuant(), RTN(bits=8, group_size=-1, symmetric=True, activations="int8")),
    "squeezellm": (SqueezeLLM(bits=4, group_size=-1),),
    "kv-scales": (),
}


def damaged(model: Path, out: Path, name: str, value: float, *, factor: bool = False) -> Path:
    """Return a copy of a model in float32 with one weight replaced, or all of a tensor multiplied."""
    shutil.copytree(model, out)
    tensors = {key: tensor.float() for key, tensor in load_file(out / "model.safetensors").items()}
    if factor:
        tensors[name] *= value
    else:
        tensors[name].view(-1)[7] = value
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight", "model.norm.weight"]
)
def test_weights(tiny_model: Path, text_file: Path, tmp_path: Path, kind: str, value: float, name: str) -> None:
    model = damaged(tiny_model, tmp_path / "model", name, value)
    given = Recipe("test", steps=STEPS[kind], calibration=CALIBRATION, kv_scales=not STEPS[kind])
    with pytest.raises(ParetoError, match=f"^{name} of the model holds NaN or infinity .1 of") as caught:
        compress(model, given, tmp_path / "out", text=text_file)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", STEPS)
def test_overflow(tiny_model: Path, text_file: Path, tmp_path: Path, kind: str) -> None:
    model = damaged(tiny_model, tmp_path / "a", "model.layers.0.mlp.up_proj.weight", 1e20, factor=True)
    model = damaged(model, tmp_path / "b", "model.layers.0.mlp.down_proj.weight", 1e20, factor=True)
    given = Recipe("test", steps=STEPS[kind], calibration=CALIBRATION, kv_scales=True)
    with pytest.raises(ParetoError, match=r"layer model\.layers\.0.* overflow to NaN or infinity"):
        compress(model, given, tmp_path / "out", text=text_file)
    assert not (tmp_path / "out").exists()


def test_finite_values_may_have_a_sum_that_is_not() -> None:
    check_inputs({"a": torch.full((40,), 3e38), "b": torch.full((40,), 6e4, dtype=torch.float16)})
    for bad in (float("inf"), -float("inf"), float("nan")):
        one = torch.full((40,), 3e38)
        one[7] = bad
        with pytest.raises(ParetoError, match="layer b overflow to NaN"):
            check_inputs({"a": torch.full((40,), 3e38), "b": one, "c": one})
    both = torch.tensor([float("inf"), -float("inf")])
    with pytest.raises(ParetoError, match="layer b overflow to NaN"):
        check_inputs({"a": torch.ones(3), "b": both})
