from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kv_cache import batched
from kv_cache.errors import ParetoError
from quant_methods.calibration.kv_codes import LayerCodes
from quant_methods.calibration.kv_observer import AttentionCall, observing
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.distillation.codes import CodedCache, observe_attention, read_back, round_weights
from quant_methods.distillation.in_memory import load_model
from quant_methods.distillation.student import save
from quant_methods.overrides import override
from quant_methods.recipe_file import load_recipe

TOKENS = torch.randint(4, 8000, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


def test_a_student_computes_with_the_codes_that_compress_will_make(teacher, text, tmp_path):
    save(load_model(teacher, "cpu"), teacher, tmp_path / "sixteen", torch.bfloat16)
    model = load_model(tmp_path / "sixteen", "cpu").eval()
    before = logits(model)
    assert round_weights(model, 4, 32) == 3 * 7
    recipe = override(
        load_recipe("rtn-w4"),
        {"group_size": 32, "search": "minmax", "num_calibration_samples": 1, "calibration_length": 16},
    )
    compress(tmp_path / "sixteen", recipe, tmp_path / "packed", text=text)
    expected = logits(load_reference(tmp_path / "packed"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    assert (before - expected).abs().max() > 0.1


def test_gradients_pass_through_the_rounding_of_weights(teacher):
    model = load_model(teacher, "cpu")
    layer = model.model.layers[0].mlp.up_proj
    round_weights(model, 3, 32)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    torch.testing.assert_close(gradient, x.sum(0).expand(96, 64))
    with pytest.raises(ParetoError, match="--weight-bits 9 is not between 2 and 8"):
        round_weights(model, 9)


@pytest.fixture
def cache(teacher):
    return CodedCache((3, 2), teacher, TOKENS, 0, "cpu")


def test_attention_reads_what_the_codec_reads_and_gradients_pass(teacher, cache):
    seen = []
    model = load_model(teacher, "cpu")
    observe_attention(model)

    class Watch:
        def attend(self, call: AttentionCall):
            seen.append(call)
            return cache.attend(call)

    with observing(Watch()):
        model(TOKENS, use_cache=False)
    call = seen[1]
    codes = LayerCodes(cache.scales.layer(1), torch.device("cpu"))
    key, value = (x.detach().requires_grad_() for x in (call.key, call.value))
    read = [
        x.detach() + next(codes.errors(kind, x.detach().transpose(1, 2), (bits,))).transpose(1, 2)
        for kind, x, bits in (("key", key, 3), ("value", value, 2))
    ]
    again = AttentionCall(1, call.query.detach(), key, value, call.mask, call.scaling, call.module, call.options)
    found = cache.attend(again)
    torch.testing.assert_close(found, call.sdpa(*read))
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(found.square().sum(), (key, value)))


def test_blocks_that_run_again_in_another_thread_read_codes_too(teacher, cache):
    """A GPU's way back is a thread of its own."""

    def gradients(checkpointing):
        model = load_model(teacher, "cpu").train()
        observe_attention(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with cache.on(), ThreadPoolExecutor(1) as other:
            loss = model(TOKENS, use_cache=False).logits.logsumexp(-1).mean()
            other.submit(loss.backward).result()
        return [parameter.grad for parameter in model.parameters()]

    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_gradient_knows_that_the_step_follows_the_range(bits):
    """Twice as large numbers are read twice as large, so the derivative along a vector is what is read of it.

    A straight-through estimator that took the step for a constant would give the vector itself.
    """
    even = torch.randn(40, 64, generator=torch.Generator().manual_seed(bits)).requires_grad_()
    read = read_back(even, bits)
    torch.testing.assert_close(read, batched.read_back(even.detach(), bits))
    weights = torch.randn(40, 64, generator=torch.Generator().manual_seed(9))
    (gradient,) = torch.autograd.grad((read * weights).sum(), even)
    found, expected = (gradient * even).sum(-1), (read * weights).sum(-1)
    straight = (even * weights).sum(-1)
    # The step is rounded to a byte, which the derivative does not know.
    assert (found - expected).abs().mean() < 0.3 * (straight - expected).abs().mean()


def test_outside_of_the_context_a_model_reads_its_cache_as_it_is(teacher, cache):
    model = load_model(teacher, "cpu").eval()
    before = logits(model)
    observe_attention(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    with cache.on():
        assert (logits(model) - before).abs().max() > 0.1


def test_scales_follow_a_model_that_changes(teacher, cache):
    model = load_model(teacher, "cpu").train()
    observe_attention(model)
    first = cache.scales
    cache.follow(model)
    assert model.training
    # The same model: the same scales, as far as batches of another size give the same sums.
    torch.testing.assert_close(cache.scales.layer(1).value_size, first.layer(1).value_size, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(cache.scales.layer(2).key_mean, first.layer(2).key_mean, rtol=1e-2, atol=2e-2)
    model.model.layers[1].self_attn.v_proj.weight.data.mul_(3)
    cache.follow(model)
    expected = 3 * first.layer(1).value_size
    torch.testing.assert_close(cache.scales.layer(1).value_size, expected, rtol=1e-2, atol=1e-6)


def test_bits_that_there_are_no_codes_of_are_refused(teacher):
    with pytest.raises(ParetoError, match="--kv-bits 5,3: there are codes of 2, 3, 4, 6, 8 bits"):
        CodedCache((5, 3), teacher, TOKENS, 0, "cpu")
