"""``pareto finetune``: what it writes, that a killed run ends as if it had not been, pooled adapters, refusals."""

import argparse
import json
import signal
import subprocess
import sys

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.compress import compress
from quant_methods.finetuning import command
from quant_methods.methods.rtn import RTN
from quant_methods.model_source import EMBEDDED
from quant_methods.recipe import Recipe

FLAGS = ["--steps", "4", "--save-steps", "2", "--batch", "4", "--length", "48", "--learning-rate", "5e-3"]
KILLED = """
import os, signal, sys
from quant_methods.finetuning import log
from tests.quant_methods.finetuning.test_pooled import run
def kill(self, args, state, control, **rest):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
log.Log.on_step_end = kill
run(*sys.argv[1:])
"""


def run(*flags):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(flag) for flag in flags]))


@pytest.fixture(scope="module")
def w4(tmp_path_factory):
    """ref-7m in 4 bits with zero-points."""
    out = tmp_path_factory.mktemp("models") / "ref-7m-w4"
    step = RTN(bits=4, group_size=64, symmetric=False)
    compress(EMBEDDED / "ref-7m", Recipe("test", steps=(step,), kv_scales=False), out)
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
def adapter(w4, chats, tmp_path_factory):
    out = tmp_path_factory.mktemp("result") / "adapter"
    assert run(w4, "--data", chats, "--out", out, *FLAGS) == 0
    return out


def losses(folder):
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]


def test_it_learns_and_says_how(adapter, w4, chats):
    about = json.loads((adapter / "pareto_finetuning.json").read_text())
    assert about["after"] < about["before"] - 0.1
    assert about["after"] == min(loss for _, loss in losses(adapter))
    assert about["data"]["source"] == chats.name
    assert about["versions"]["peft"]
    card = (adapter / "README.md").read_text()
    assert about["data"]["sha256"] in card
    assert "licence" in card
    assert not [path for path in adapter.parent.iterdir() if path != adapter], "nothing unfinished is left"


def test_a_killed_run_ends_with_the_same_losses(adapter, w4, chats, tmp_path):
    flags = [w4, "--data", chats, "--out", tmp_path / "adapter", *FLAGS]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, flags)], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert (tmp_path / ".adapter.finetune" / "checkpoint-2").is_dir()
    assert run(*flags) == 0
    found, wanted = losses(tmp_path / "adapter"), losses(adapter)
    assert [step for step, _ in found] == [step for step, _ in wanted]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], rel=1e-5)


def test_pooled_adapters_end_in_zero_points(w4, chats, tmp_path):
    out = tmp_path / "merged"
    assert run(w4, "--data", chats, "--out", out, "--pooled", "--merge", *FLAGS[:-1], "3e-2") == 0
    about = json.loads((out / "pareto_finetuning.json").read_text())
    assert about["after"] < about["before"] - 0.1
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {part["part"] for group in config["groups"] for part in group["parts"]} == {"grid"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pooled"], "--pooled is for --merge"),
        (["--length", "9000"], "exceeds the model's context"),
        (["--targets", "qproj"], "no layer is called 'qproj'"),
        (["--held-out", "24"], "leaves none to train on"),
        (["--lora-rank", "0"], "--lora-rank 0"),
        (["--micro-batch", "3"], "does not divide"),
    ],
)
def test_bad_flags_get_a_line(w4, chats, tmp_path, flags, message):
    with pytest.raises(ParetoError, match=message):
        run(w4, "--data", chats, "--out", tmp_path / "out", *FLAGS, *flags)
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_is_answered_by_what_takes_less(w4, chats, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("quant_methods.finetuning.tuner.Tuner.train", fail)
    with pytest.raises(ParetoError, match=r"--micro-batch 2 .*--checkpointing"):
        run(w4, "--data", chats, "--out", tmp_path / "out", *FLAGS)
