"""Recipes that store zeros as bits of a bitmap: the same weights as with codes for all of them, in fewer bytes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import read_tensors
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.formats.native_format import NativeConfig
from quant_methods.formats.parts.bitmap_codes import BitmapForm
from quant_methods.formats.parts.low_rank import LowRankForm
from quant_methods.methods.pruning import Wanda
from quant_methods.methods.rtn import RTN
from quant_methods.methods.sparsegpt import SparseGPT
from quant_methods.methods.squeezellm import SqueezeLLM
from quant_methods.methods.trellis import Trellis
from quant_methods.overrides import override
from quant_methods.steps import PruneStep, RoundStep, Step
from tests.quant_methods.test_compress import W4, Interrupted, contents, recipe

ONE_PASS = SparseGPT(bits=4, group_size=64, symmetric=False)


def with_bitmap(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The same with zeros as bits: it is the last step that rounds."""
    return *steps[:-1], dataclasses.replace(steps[-1], store="bitmap")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "steps",
    [
        (ONE_PASS,),
        (dataclasses.replace(ONE_PASS, refit=True, sparsity=0.6),),
        (Wanda(), W4),
        (Wanda(), dataclasses.replace(W4, rank=4)),
        (Wanda(sparsity=0.4), RTN(bits=4, group_size=-1, symmetric=True)),
    ],
    ids=["one pass", "refit", "wanda and gptq", "beside a product", "symmetric, per channel"],
)
def test_a_bitmap_holds_the_weights_that_codes_of_all_of_them_do(
    tiny_model: Path, text_file: Path, tmp_path: Path, steps: tuple[Step, ...]
) -> None:
    dense = compress(tiny_model, recipe(*steps), tmp_path / "dense", text=text_file)
    report = compress(tiny_model, recipe(*with_bitmap(steps)), tmp_path / "out", text=text_file)
    assert str(report.serving) == "vLLM with this plugin on CPU and CUDA"
    assert report.sparsity == dense.sparsity
    wanted, found = (load_reference(tmp_path / name).state_dict() for name in ("dense", "out"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    stored, _ = read_tensors(tmp_path / "out" / "model.safetensors")
    last = steps[-1]
    assert isinstance(last, RoundStep | SparseGPT)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for name, form in NativeConfig.parse(config).forms.items():
        assert form.bulk == BitmapForm(4, last.group_size, last.symmetric)
        assert (form.get(LowRankForm) is not None) == (getattr(last, "rank", 0) > 0)
        assert not [tensor for tensor in stored if tensor.startswith(f"{name}.weight_plane")]
    # A bit for each weight instead of the code of a zero; blocks have starts and last lines that are not full.
    for layer, other in zip(report.layers, dense.layers, strict=True):
        assert layer.zeros is not None
        saved = 4 * layer.zeros / (layer.shape[0] * layer.shape[1]) - 1
        # compressed-tensors packs zero-points, which take a byte in the format of ours.
        assert 0 < layer.bits_per_weight - (other.bits_per_weight - saved) < 0.15
    quantized = [t for n, t in stored.items() if ".layers." in n and "norm" not in n]
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    told = 8 * sum(t.numel() * t.element_size() for t in quantized) / weights
    assert report.bits_per_weight == pytest.approx(told)


def test_an_interrupted_run_resumes_to_the_same_bytes(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if done == 2:
            raise Interrupted

    given = recipe(*with_bitmap((ONE_PASS,)))
    compress(tiny_model, given, tmp_path / "whole", text=text_file)
    with pytest.raises(Interrupted):
        compress(tiny_model, given, tmp_path / "out", text=text_file, progress=interrupt)
    assert compress(tiny_model, given, tmp_path / "out", text=text_file).resumed_blocks == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_flag_goes_to_the_step_that_rounds() -> None:
    assert override(recipe(Wanda(), W4), {"store": "bitmap"}).steps == with_bitmap((Wanda(), W4))
    assert override(recipe(SparseGPT(), W4), {"store": "bitmap"}).steps == with_bitmap((SparseGPT(), W4))
    assert override(recipe(ONE_PASS), {"store": "bitmap"}).steps == with_bitmap((ONE_PASS,))
    assert override(recipe(*with_bitmap((ONE_PASS,))), {"store": "dense"}).steps == (ONE_PASS,)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            RTN(bits=3, store="bitmap"),
            "store: bitmap holds codes of 4 bits on a grid, not 3-bit rtn; give store: dense",
        ),
        (SparseGPT(bits=3, store="bitmap"), "store: bitmap holds codes of 4 bits on a grid, not 3-bit gptq"),
        (SqueezeLLM(bits=4, store="bitmap"), "store: bitmap holds codes of 4 bits on a grid, not 4-bit squeezellm"),
        (Trellis(bits=4, store="bitmap"), "store: bitmap holds codes of 4 bits on a grid, not 4-bit trellis"),
        (SparseGPT(store="bitmap"), "sparsegpt: store: bitmap is for weights that are rounded; give bits: 4"),
    ],
    ids=lambda value: value.method if isinstance(value, RoundStep | PruneStep) else None,
)
def test_what_has_no_bitmap_is_one_line(step: Step, message: str) -> None:
    with pytest.raises(ParetoError, match=f"^{message}"):
        step.check()


def test_a_bitmap_without_zeros_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    pruned = Wanda(targets=("model.layers.0.*",)), dataclasses.replace(W4, store="bitmap")
    for steps, name in ((pruned, "model.layers.1"), (pruned[1:], "model.layers.0")):
        with pytest.raises(ParetoError, match=rf"{name}\S+ is not pruned, and \w+ is to leave zeros out"):
            compress(tiny_model, recipe(*steps), tmp_path / "out")
    assert not (tmp_path / "out").exists()
