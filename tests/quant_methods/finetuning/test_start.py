"""What an adapter starts as where it starts from what quantization took away."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.finetuning import start
from quant_methods.finetuning.job import Job, finetune
from quant_methods.finetuning.load import load_coded
from quant_methods.finetuning.start import start_from_error
from quant_methods.finetuning.tuner import with_adapter
from quant_methods.methods.rtn import RTN
from quant_methods.recipe import Recipe
from tests.quant_methods.finetuning.test_job import SETTINGS, TOKENS, chats, logits  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def three_bits(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, rounded to nearest."""
    out = tmp_path_factory.mktemp("models") / "w3"
    compress(tiny_model, Recipe("test", steps=(RTN(bits=3, group_size=32),), kv_scales=False), out, text=text_file)
    return out


def test_dora_starts_from_the_norms_of_what_it_starts_as(tiny_model, three_bits):
    changed = dataclasses.replace(SETTINGS, rank=8, alpha=16)
    plain, sized = (with_adapter(load_coded(three_bits), dataclasses.replace(changed, dora=d)) for d in (0, 1))
    for model in (plain, sized):
        start_from_error(model, tiny_model, TOKENS.tolist())
    torch.testing.assert_close(logits(sized), logits(plain), rtol=1e-3, atol=1e-3)


def test_a_start_from_the_error_is_nearer_to_the_original(tiny_model, three_bits):
    wanted = logits(load_reference(tiny_model))
    model = with_adapter(load_coded(three_bits), dataclasses.replace(SETTINGS, rank=32, alpha=64))
    before = logits(model)
    share = start_from_error(model, tiny_model, TOKENS.tolist())
    after = logits(model)
    assert 0.3 < share < 1
    assert (after - wanted).square().mean() < 0.8 * (before - wanted).square().mean()


def test_the_start_is_the_best_of_its_rank_for_outputs(tiny_model, three_bits, monkeypatch):
    """Nearer in what layers put out than the product nearest to the weight's error, whatever is held at once."""
    settings = dataclasses.replace(SETTINGS, rank=4, alpha=4)
    model, again = (with_adapter(load_coded(three_bits), settings) for _ in range(2))
    start_from_error(model, tiny_model, TOKENS.tolist())
    monkeypatch.setattr(start, "HELD_BYTES", 1)  # A pass for each layer, whose inputs come of what was started before.
    start_from_error(again, tiny_model, TOKENS.tolist())
    original, seen = load_reference(tiny_model), {}
    plain = with_adapter(load_coded(three_bits), settings).base_model.model
    layers = {name: one for name, one in plain.named_modules() if hasattr(one, "lora_A")}
    for name, one in layers.items():
        one.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0].flatten(0, -2)}))
    logits(plain)

    def product(of, name):
        module = dict(of.base_model.model.named_modules())[name]
        return module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight

    for name, module in layers.items():
        error = original.get_submodule(name).weight.float() - module.base_layer.linear().read()
        left, sizes, right = torch.linalg.svd(error)
        of_the_weight = (left[:, :4] * sizes[:4]) @ right[:4]
        found = (product(model, name), product(again, name), of_the_weight)
        lost = [(seen[name] @ (error - one).T).square().sum() for one in found]
        assert max(lost[:2]) < lost[2], name


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_without_an_error_is_one_line(tiny_model, three_bits, monkeypatch, quantized):
    """One in 16 bits, and one whose original is what its codes read as."""
    model = with_adapter(load_coded(three_bits if quantized else tiny_model), SETTINGS)
    layers = dict(model.base_model.model.named_modules())

    def read(self, name):
        return layers[name.removesuffix(".weight")].base_layer.linear().read()

    monkeypatch.setattr(start.Source, "read", read)
    with pytest.raises(ParetoError, match="no quantized layers whose error could be taken back"):
        start_from_error(model, tiny_model, TOKENS.tolist())


def test_a_job_starts_from_the_error_on_its_own_examples(tiny_model, three_bits, chats, tmp_path):  # noqa: F811
    said, settings = [], dataclasses.replace(SETTINGS, steps=1)
    job = Job(three_bits, chats, tmp_path / "out", settings, start_from=tiny_model)
    started = finetune(job, said.append)
    plain = finetune(Job(three_bits, chats, tmp_path / "plain", settings))
    assert re.search(r"takes back \d\d\.\d% of the error of layers' outputs", "\n".join(said))
    assert started.before != plain.before
