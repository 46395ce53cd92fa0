"""Layers in codes: what they put out, what gradients pass, what they keep in memory, and what peft makes of them."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.finetuning.coded_linear import CodedLinear
from quant_methods.finetuning.load import load_coded
from quant_methods.formats.flat_form import flat_form
from quant_methods.formats.grid import round_tokens
from quant_methods.recipe_file import load_recipe
from tests.quant_methods.checkpoints.test_stored_layers import (  # noqa: F401
    AWQ,
    COLUMNS,
    GROUPS,
    LAYER,
    expected,
    gptq,
    parts,
    words,
    write,
)
from tests.quant_methods.finetuning.conftest import FORMS
from tests.quant_methods.random_layers import random_layer

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.arange(3, 63).reshape(2, 30)


def check_close(found, wanted):
    """Sums in another order may round an input to another integer here and there; other weights differ everywhere."""
    assert (found - wanted).abs().mean() < 1e-3 * wanted.std()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join(part.part.kind for part in form.parts))
def test_a_layer_in_codes_is_the_layer_that_it_means(form):
    linear = random_layer(form, 64, 96 if form.bulk.bits != 6 else 128, seed=1)
    coded, bias = CodedLinear(linear, torch.ones(64), torch.float32), torch.ones(64)
    x = torch.randn(5, linear.shape[1], requires_grad=True)
    y = coded(x)
    torch.testing.assert_close(y, x @ linear.read().T + bias)
    wanted = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, wanted)
    torch.testing.assert_close(gradient, wanted @ linear.read())
    torch.testing.assert_close(coded.weight, linear.read())
    assert isinstance(coded, nn.Linear)
    assert not [p for p in coded.parameters() if p.requires_grad]


def test_inputs_are_rounded_as_in_serving_and_gradients_pass():
    form = flat_form(6, 64, activations="int8", columns=2, rank=3)
    linear = random_layer(form, 64, 128, seed=2)
    coded = CodedLinear(linear, None, torch.float32, functools.partial(round_tokens, bits=8))
    x = torch.randn(5, 128, requires_grad=True)
    bulk, entering = linear.read_bulk(), x.detach().clone()
    entering[:, linear.apart()] = 0
    wanted = round_tokens(entering, 8) @ bulk.T + x.detach() @ (linear.read() - bulk).T
    torch.testing.assert_close(coded(x), wanted)
    (gradient,) = torch.autograd.grad(coded(x).sum(), x)
    # The bulk is zero in the columns kept apart, so all of the weight is in the gradient.
    torch.testing.assert_close(gradient, linear.read().sum(0).expand(5, -1))


def test_nothing_of_16_bits_is_kept():
    """Four bits a weight and what its scales take; no weight among what the backward pass keeps."""
    linear = random_layer(flat_form(4, 64), 256, 512)
    coded = CodedLinear(linear, None, torch.float32)
    assert coded.stored_bytes == 256 * 512 // 2 + 2 * 256 * 512 // 64
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        coded(torch.randn(3, 512, requires_grad=True)).sum()
    assert (256, 512) not in kept
    assert not coded.state_dict()


def test_scales_keep_their_dtype_when_the_model_is_cast():
    linear = random_layer(flat_form(4, 32), 64, 64, dtype=torch.float16)
    coded = CodedLinear(linear, None, torch.float32).to(torch.bfloat16)
    assert torch.equal(coded.linear().read(), linear.read())
    assert coded.weight.dtype == torch.bfloat16
    assert coded(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_products_under_autocast_are_in_its_dtype():
    coded = CodedLinear(random_layer(flat_form(4, 32), 64, 64), None, torch.float32)
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = coded(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, coded.weight.sum(0).expand(2, -1), rtol=0.02, atol=0.02)


def test_widths_without_planes_are_held_a_byte_a_code():
    from quant_methods.formats.parts.grid_codes import GridCodes
    from quant_methods.formats.quantized import QuantizedLinear

    codes = torch.randint(-8, 8, (32, 40), dtype=torch.int8)
    linear = QuantizedLinear(GridCodes(codes, torch.rand(32, 1), torch.zeros(32, 1, dtype=torch.int8), 4, True))
    coded = CodedLinear(linear, None, torch.float32).to(torch.bfloat16)
    assert torch.equal(coded.linear().read(), linear.read())


def test_every_format_loads_as_the_model_that_it_means(coded_model):
    with torch.no_grad():
        found, wanted = (load(coded_model)(TOKENS).logits for load in (load_coded, load_reference))
    check_close(found, wanted)


@pytest.mark.parametrize("recipe", ["rtn-w4", "rtn-w8", "smoothquant-w8a8-static"])
def test_compressed_tensors_load(tiny_model: Path, text_file: Path, tmp_path: Path, recipe: str):
    whole = load_recipe(recipe)
    short = dataclasses.replace(whole, calibration=dataclasses.replace(whole.calibration, num_samples=4, length=64))
    compress(tiny_model, short, tmp_path / "out", text=text_file)
    model = load_coded(tmp_path / "out")
    assert sum(isinstance(module, CodedLinear) for module in model.modules()) == 21
    with torch.no_grad():
        found, wanted = model(TOKENS).logits, load_reference(tmp_path / "out")(TOKENS).logits
    check_close(found, wanted)


def test_unquantized_checkpoints_load(tiny_model):
    with torch.no_grad():
        found, wanted = (load(tiny_model)(TOKENS).logits for load in (load_coded, load_reference))
    torch.testing.assert_close(found, wanted)
    head = load_coded(tiny_model)
    assert head.lm_head.weight is head.model.embed_tokens.weight


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_peft_learns_over_every_format(coded_model, dora):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = load_coded(coded_model)
    with torch.no_grad():
        before = base(TOKENS).logits
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", use_dora=dora))
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-3, atol=1e-3)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(learning) == 21 * (3 if dora else 2)
    optimizer = torch.optim.Adam(learning.values(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning.values())


def test_a_checkpoint_that_lacks_a_tensor_is_one_line(tiny_model, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model/model.safetensors")
    with pytest.raises(ParetoError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_coded(tmp_path / "model")


@pytest.mark.parametrize("method", ["gptq", "gptq by importance", "awq"])
def test_other_tools_codes_load_and_learn(tiny_model: Path, tmp_path: Path, parts, method: str):  # noqa: F811
    """One layer as that tool stores it; its weight is exact and the gradient of its adapter is there."""
    from peft import LoraConfig, get_peft_model

    groups = torch.arange(COLUMNS) // (COLUMNS // GROUPS)
    if method == "awq":
        codes, zeros, scales = parts
        tensors = {"qweight": words(codes, AWQ), "qzeros": words(zeros, AWQ), "scales": scales}
        settings = {"quant_method": "awq", "bits": 4, "version": "gemm"}
    else:
        if "importance" in method:
            groups = groups[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))]
        tensors, settings = gptq(parts, groups, 1), {"quant_method": "gptq", "bits": 4}
    checkpoint = write(tiny_model, tmp_path / "model", tensors, settings)
    model = load_coded(checkpoint)
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, CodedLinear)
    torch.testing.assert_close(layer.weight, expected(parts, groups))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"]))
    adapted(TOKENS, labels=TOKENS).loss.backward()
    assert adapted.base_model.model.get_submodule(LAYER).lora_B["default"].weight.grad.abs().sum() > 0
