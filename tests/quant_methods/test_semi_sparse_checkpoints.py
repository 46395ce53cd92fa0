"""Checkpoints of 4 bits whose zeros, two of four neighbours, are left out: the same weights in fewer bits."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import read_tensors
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.formats.native_format import NativeConfig
from quant_methods.formats.parts.semi_sparse import SemiSparseForm
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.pruning import Magnitude, Wanda
from quant_methods.methods.rtn import RTN
from quant_methods.methods.sparsegpt import SparseGPT
from quant_methods.methods.squeezellm import SqueezeLLM
from quant_methods.methods.trellis import Trellis
from quant_methods.overrides import override
from quant_methods.recipe_file import load_recipe
from quant_methods.steps import Step
from tests.quant_methods.test_compress import W4, Interrupted, contents, recipe

IN_ONE_PASS = SparseGPT(pattern="2:4", bits=4, group_size=128, symmetric=False, refit=True)
CASES = [
    (IN_ONE_PASS,),
    (Wanda(pattern="2:4"), dataclasses.replace(W4, symmetric=True)),
    (Magnitude(pattern="1:4", sparsity=0.75), RTN(bits=4, group_size=64, symmetric=False)),
    (Magnitude(pattern="1:2"), dataclasses.replace(W4, rank=4)),
]
each = pytest.mark.parametrize("steps", CASES, ids=lambda steps: "-".join(step.method for step in steps))


def leaving_out(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    return (*steps[:-1], dataclasses.replace(steps[-1], store="2:4"))  # type: ignore[call-arg]


@each
def test_the_weights_are_those_that_are_stored_densely(
    tiny_model: Path, text_file: Path, tmp_path: Path, steps: tuple[Step, ...]
) -> None:
    dense = compress(tiny_model, recipe(*steps), tmp_path / "dense", text=text_file)
    report = compress(tiny_model, recipe(*leaving_out(steps)), tmp_path / "out", text=text_file)
    assert str(report.serving) == "vLLM with this plugin on CPU and CUDA"
    found, wanted = (load_reference(tmp_path / name).state_dict() for name in ("out", "dense"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for layer, other in zip(report.layers, dense.layers, strict=True):
        assert (layer.name, layer.zeros, layer.relative_error) == (other.name, other.zeros, other.relative_error)
    # A bit less, and zero-points in 8 bits where compressed-tensors has 4.
    assert report.bits_per_weight == pytest.approx(dense.bits_per_weight - 1, abs=0.1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    forms = NativeConfig.parse(config).forms
    assert forms.keys() == {layer.name for layer in report.layers}
    assert all(isinstance(form.bulk, SemiSparseForm) for form in forms.values())
    tensors, _ = read_tensors(tmp_path / "out" / "model.safetensors")
    stored = sum(8 * t.numel() * t.element_size() for n, t in tensors.items() if n.rpartition(".")[0] in forms)
    assert report.bits_per_weight == pytest.approx(stored / sum(a * b for a, b in (x.shape for x in report.layers)))


def test_an_interrupted_run_resumes_to_the_same_bytes(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    given = recipe(*leaving_out((IN_ONE_PASS,)))
    compress(tiny_model, given, tmp_path / "whole", text=text_file)

    def interrupt(done: int, total: int, what: str) -> None:
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        compress(tiny_model, given, tmp_path / "out", text=text_file, progress=interrupt)
    assert compress(tiny_model, given, tmp_path / "out", text=text_file).resumed_blocks == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_recipe_leaves_zeros_out_and_a_flag_keeps_them() -> None:
    given = load_recipe("sparsegpt-2of4-w4")
    (step,) = given.rounding
    assert step.store == "2:4"
    bulk = step.bulk_form
    assert bulk == SemiSparseForm(4, 128, symmetric=False)
    assert bulk.stored_bits(4096, 4096) == (3 + 24 / 128) * 4096 * 4096
    assert override(given, {"store": "dense"}).rounding[0].plain
    both = override(recipe(SparseGPT(pattern="2:4"), W4), {"store": "2:4"}).steps
    assert [step.store for step in both] == ["dense", "2:4"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((W4,), "q_proj is not pruned, and gptq is to leave zeros out; prune it with pattern '2:4', or"),
        ((Wanda(), W4), "q_proj is pruned with pattern any, and gptq is to store two of four weights"),
        ((Wanda(pattern="4:8"), W4), "q_proj is pruned with pattern 4:8, and gptq is to store"),
        ((Wanda(pattern="2:4", targets=("*.k_proj",)), W4), "q_proj is not pruned"),
    ],
)
def test_layers_without_the_pattern_are_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, steps: tuple[Step, ...], message: str
) -> None:
    with pytest.raises(ParetoError, match=message):
        compress(tiny_model, recipe(*leaving_out(steps)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (GPTQ, {"bits": 3}, "store: 2:4 holds codes of 4 bits on a grid, not 3-bit gptq; give store: dense, or"),
        (SparseGPT, {"bits": 8, "pattern": "2:4"}, "store: 2:4 holds codes of 4 bits on a grid, not 8-bit gptq"),
        (SqueezeLLM, {"bits": 4}, "store: 2:4 holds codes of 4 bits on a grid, not 4-bit squeezellm"),
        (Trellis, {"bits": 4}, "store: 2:4 holds codes of 4 bits on a grid, not 4-bit trellis"),
        (SparseGPT, {"pattern": "2:4"}, "sparsegpt: store: 2:4 is for weights that are rounded; give bits: 4, or"),
    ],
    ids=str,
)
def test_what_cannot_be_stored_so_is_one_line(kind: Any, settings: dict[str, Any], message: str) -> None:
    kind(**settings).check()
    with pytest.raises(ParetoError, match=message):
        kind(**settings, store="2:4").check()
