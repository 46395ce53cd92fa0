"""Pooled adapters (QA-LoRA): what they learn is what zero-points of the merged checkpoint hold."""

import argparse
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.embedded import MODELS
from quant_methods.finetuning import command
from quant_methods.finetuning.load import load_coded
from quant_methods.finetuning.merge import merge
from quant_methods.finetuning.pooled import use_pooled
from quant_methods.methods.rtn import RTN
from quant_methods.recipe import Recipe

FLAGS = ["--steps", "4", "--save-steps", "2", "--batch", "4", "--length", "48", "--learning-rate", "5e-3"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def zero_points(tiny_model, tmp_path_factory):
    """The tiny model in 4 bits with zero-points, as compressed-tensors."""
    out = tmp_path_factory.mktemp("models") / "w4"
    compress(tiny_model, Recipe("test", steps=(RTN(bits=4, group_size=32, symmetric=False),), kv_scales=False), out)
    return out


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    lines = [
        {"messages": [
            {"role": "user", "content": f"What is {i} plus {i}?"},
            {"role": "assistant", "content": f"The sum of {i} and {i} is {2 * i}."},
        ]}
        for i in range(24)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def w4(tmp_path_factory):
    """ref-7m in 4 bits with zero-points."""
    out = tmp_path_factory.mktemp("models") / "ref-7m-w4"
    step = RTN(bits=4, group_size=64, symmetric=False)
    compress(MODELS / "ref-7m", Recipe("test", steps=(step,), kv_scales=False), out)
    return out


def run(*flags):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(flag) for flag in flags]))


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


def test_zero_points_hold_a_pooled_adapter(zero_points, tmp_path):
    model = trained(zero_points, tmp_path / "adapter", pooled=True, steps=8, learning_rate=0.1)
    merge(zero_points, tmp_path / "adapter", tmp_path / "merged")
    check_same(model, tmp_path / "merged", 1e-5)
    groups = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]["groups"]
    kinds = [part["part"] for group in groups for part in group["parts"]]
    assert kinds == ["grid"], "no part is added, so that the same kernel multiplies"


def test_pooled_adapters_need_zero_points(coded_model):
    config = LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    with pytest.raises(ParetoError, match=r"zero-points|grid"):
        get_peft_model(load_coded(coded_model), use_pooled(config))
    with pytest.raises(ParetoError, match="DoRA"):
        use_pooled(LoraConfig(r=4, use_dora=True))


def test_pooled_adapters_end_in_zero_points(w4, chats, tmp_path):
    out = tmp_path / "merged"
    assert run(w4, "--data", chats, "--out", out, "--pooled", "--merge", *FLAGS[:-1], "3e-2") == 0
    about = json.loads((out / "pareto_finetuning.json").read_text())
    assert about["after"] < about["before"] - 0.1
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {part["part"] for group in config["groups"] for part in group["parts"]} == {"grid"}


def test_pooled_is_for_merge(w4, chats, tmp_path):
    with pytest.raises(ParetoError, match="--pooled is for --merge"):
        run(w4, "--data", chats, "--out", tmp_path / "out", "--pooled", *FLAGS)
    assert not (tmp_path / "out").exists()
