"""Adapters merged into checkpoints: the result computes what the model with its adapter did."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.finetuning.load import load_coded
from quant_methods.finetuning.merge import merge
from quant_methods.finetuning.pooled import use_pooled
from quant_methods.methods.rtn import RTN
from quant_methods.recipe import Recipe

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def zero_points(tiny_model, tmp_path_factory):
    """The tiny model in 4 bits with zero-points, as compressed-tensors."""
    out = tmp_path_factory.mktemp("models") / "w4"
    compress(tiny_model, Recipe("test", steps=(RTN(bits=4, group_size=32, symmetric=False),), kv_scales=False), out)
    return out


@pytest.fixture(scope="module")
def plain_adapter(zero_points, tmp_path_factory):
    """An adapter over that model, and the model with it."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    return folder, trained(zero_points, folder)


def tokens(seed=0, length=40):
    return torch.randint(0, 8192, (2, length), generator=torch.Generator().manual_seed(seed))


def kl(first, second):
    first, second = first.logits.float().log_softmax(-1), second.logits.float().log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1).mean().item()


def trained(base, folder, steps=6, pooled=False, learning_rate=0.02, **settings):
    """Train an adapter for a few steps and save it; returns the model."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(load_coded(base), use_pooled(config) if pooled else config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def check_same(model, merged, at_most):
    result = load_reference(merged)(tokens(1))
    with model.disable_adapter():
        assert kl(model(tokens(1)), result) > 20 * at_most, "the adapter changes next to nothing"
    assert kl(model(tokens(1)), result) <= at_most


def test_low_rank_parts_hold_an_adapter_over_every_format(coded_model, tmp_path):
    model = trained(coded_model, tmp_path / "adapter", use_rslora=True)
    merge(coded_model, tmp_path / "adapter", tmp_path / "merged")
    check_same(model, tmp_path / "merged", 1e-3)


def test_compressed_tensors_become_our_format(zero_points, plain_adapter, tmp_path):
    adapter, model = plain_adapter
    merge(zero_points, adapter, tmp_path / "merged")
    check_same(model, tmp_path / "merged", 1e-3)


def test_zero_points_hold_a_pooled_adapter(zero_points, tmp_path):
    model = trained(zero_points, tmp_path / "adapter", pooled=True, steps=8, learning_rate=0.1)
    merge(zero_points, tmp_path / "adapter", tmp_path / "merged")
    check_same(model, tmp_path / "merged", 1e-5)
    groups = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]["groups"]
    kinds = [part["part"] for group in groups for part in group["parts"]]
    assert kinds == ["grid"], "no part is added, so that the same kernel multiplies"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_qalora": True}, "trained over another model"),
    ],
)
def test_what_cannot_be_merged_is_refused(zero_points, plain_adapter, tmp_path, change, message):
    adapter = tmp_path / "adapter"
    shutil.copytree(plain_adapter[0], adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ParetoError, match=message):
        merge(zero_points, adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], "nothing is left behind"


def test_a_folder_without_an_adapter_is_refused(zero_points, tmp_path):
    with pytest.raises(ParetoError, match="is no adapter of peft's"):
        merge(zero_points, tmp_path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_pooled_adapters_need_zero_points(coded_model):
    config = LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    with pytest.raises(ParetoError, match=r"zero-points|grid"):
        get_peft_model(load_coded(coded_model), use_pooled(config))
    with pytest.raises(ParetoError, match="DoRA"):
        use_pooled(LoraConfig(r=4, use_dora=True))
