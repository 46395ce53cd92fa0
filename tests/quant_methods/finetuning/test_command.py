"""The command on the reference model, and what it says of mistakes."""

import json

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.compress import compress
from quant_methods.finetuning import command
from quant_methods.methods.rtn import RTN
from quant_methods.recipe import Recipe
from tests.quant_methods.finetuning.test_job import chats  # noqa: F401
from vllm_ext.cli import build_parser

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*words):
    return command.run(build_parser("finetune", command).parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def w4(tmp_path_factory, text_file):
    """The reference model in 4 bits."""
    out = tmp_path_factory.mktemp("w4") / "w4"
    compress("ref-7m", Recipe("test", steps=(RTN(bits=4, group_size=128),), kv_scales=False), out, text=text_file)
    return out


def test_teaches_the_reference_model_and_merges(w4, chats, tmp_path, capsys):  # noqa: F811
    few = ("--steps", 3, "--batch", 4, "--length", 48, "--lora-rank", 4, "--learning-rate", 2e-3, "--device", "cpu")
    assert run(w4, "--data", chats, *few, "--out", tmp_path / "adapter") == 0
    said = capsys.readouterr().out
    assert "step 3/3, held-out loss" in said
    assert f"vllm serve {w4} --enable-lora --lora-modules tuned={tmp_path / 'adapter'}" in said
    about = json.loads((tmp_path / "adapter/pareto_finetuning.json").read_text())
    assert about["after"] < about["before"]
    assert about["data"]["held_out"] == 4  # A fifth of 24.
    assert run(w4, "--adapter", tmp_path / "adapter", "--merge", "--out", tmp_path / "merged") == 0
    products = json.loads((tmp_path / "merged/config.json").read_text())["quantization_config"]["groups"]
    assert {part["part"] for group in products for part in group["parts"]} == {"grid", "low_rank"}
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged"}


def test_dora_over_the_reference_model_says_that_it_is_served_merged(w4, chats, tmp_path, capsys):  # noqa: F811
    few = ("--steps", 2, "--batch", 4, "--length", 48, "--lora-rank", 4, "--learning-rate", 2e-3, "--device", "cpu")
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert run(w4, "--data", chats, *few, "--dora", "--out", adapter) == 0
    said = capsys.readouterr().out
    assert "vLLM adds no DoRA adapters" in said
    assert f"pareto finetune {w4} --adapter {adapter} --merge --out {adapter}-merged" in said
    assert run(w4, "--adapter", adapter, "--merge", "--out", merged) == 0
    from peft import PeftModel

    from quant_methods.checkpoints.reference import load_reference
    from quant_methods.finetuning.load import load_coded

    tokens = torch.arange(3, 63).reshape(2, 30)
    tuned = PeftModel.from_pretrained(load_coded(w4), adapter).eval()
    with torch.no_grad():
        found, wanted, before = (
            model(tokens).logits.log_softmax(-1) for model in (load_reference(merged), tuned, load_coded(w4))
        )
    lost, learnt = ((wanted.exp() * (wanted - other)).sum(-1).mean() for other in (found, before))
    assert lost < 5e-4
    assert lost < 0.2 * learnt


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ref-7m",), "give --data FILE to learn from"),
        (("ref-7m", "--data", "none.jsonl"), r"none\.jsonl: No such file"),
        (("ref-8m", "--data", "none.jsonl"), "model 'ref-8m' not found"),
        (("ref-7m", "--adapter", "none"), "--adapter DIR is for --merge"),
        (("ref-7m", "--adapter", "none", "--merge"), "none is no adapter of peft's"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(words, message, tmp_path):
    with pytest.raises(ParetoError, match=message) as found:
        run(*words, "--out", tmp_path / "out", "--device", "cpu")
    assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(chats, tmp_path):  # noqa: F811
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ParetoError, match="exists; give another --out"):
        run("ref-7m", "--data", chats, "--out", tmp_path, "--device", "cpu")
    assert (tmp_path / "mine").read_text() == "mine"
