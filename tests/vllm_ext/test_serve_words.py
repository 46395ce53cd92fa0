"""How ``pareto serve`` reads its words: MODEL anywhere, and a file whose keys are its own flags or vLLM's."""

import argparse
import os

import pytest

from kv_cache.formats import FORMATS
from vllm_ext import cli, serve


@pytest.fixture
def started(started, monkeypatch):
    monkeypatch.setattr(serve, "find_model", lambda args: args.model)
    monkeypatch.setattr(cli, "commands", lambda: {"serve": argparse.Namespace(load=lambda: serve)})
    monkeypatch.setattr(serve, "run", lambda args, original=serve.run: original(args) or 0)
    return started


def served(started, *words):
    """Return the model and the words that vLLM gets after those that pareto always gives."""
    assert cli.main(["serve", *words]) == 0
    command = started.pop()
    model = command[command.index("serve") + 1]
    return model, command[command.index("--served-model-name") + 1 :]


@pytest.mark.parametrize(
    "words",
    [
        ["--max-model-len", "2048", "ref-27m"],
        ["--max_model_len", "2048", "--port", "81", "ref-27m"],
        ["ref-27m", "--max-model-len", "2048"],
        ["--port", "81", "ref-27m", "--max-model-len", "2048"],
    ],
)
def test_the_model_may_be_anywhere(started, words):
    model, rest = served(started, *words)
    assert model == "ref-27m"
    assert rest[0] == "ref-27m"
    assert [word.replace("_", "-") for word in rest[1:]] == ["--max-model-len", "2048"]


def test_flags_without_values_and_with_many(started):
    model, rest = served(
        started, "--enforce-eager", "--allowed-origins", '["*"]', "-tp", "2", "--middleware", "a", "--seed", "-1", "m",
        "--hf-overrides.rope_theta", "1",
    )  # fmt: skip
    assert model == "m"
    assert rest[1:] == [
        "--enforce-eager", "--allowed-origins", '["*"]', "-tp", "2", "--middleware", "a", "--seed", "-1",
        "--hf-overrides.rope_theta", "1",
    ]  # fmt: skip


def test_the_place_of_a_config_passes_through(started):
    assert served(started, "--hf-config-path", "there", "m")[0] == "m"
    assert cli.main(["serve", "m", "--hf-config-path", "there"]) == 0
    (command,) = started
    assert command[command.index("--hf-config-path") + 1] == "there"


def test_vllm_is_not_asked_without_need(started, monkeypatch):
    monkeypatch.setattr(serve, "_vllm_flags", None)
    assert served(started, "--port", "81", "--enforce-eager")[0] == "ref-7m"
    assert served(started, "--max-model-len=2048", "m")[0] == "m"
    assert served(started, "m", "--max-model-len", "2048")[0] == "m"


def test_a_file_may_have_vllms_keys(started, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("served-model-name: [one, two]\nmax-model-len: 2048\nport: 81\ncompilation-config: {mode: 0}\n")
    model, rest = served(started, "--config", str(config), "ref-27m")
    assert model == "ref-27m"
    # A list of ours does not swallow MODEL; the other keys are read by vLLM itself.
    assert rest == ["one", "two", "--config", str(config)]
    config.write_text("model: org-m\nserved_model_name: [one]\n")
    assert served(started, "--config", str(config)) == ("org-m", ["one"])
    assert served(started, "mine", "--config", str(config)) == ("mine", ["one"])


def test_vllm_reads_no_file_of_another_ending(started, tmp_path, capsys):
    (tmp_path / "c.conf").write_text("max-model-len: 2048\n")
    assert cli.main(["serve", "--config", str(tmp_path / "c.conf")]) == 2
    assert "'max-model-len' is vLLM's key, and vLLM reads .yaml and .yml only" in capsys.readouterr().err


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_our_4_bit_kernel_is_this_commands_default(started, monkeypatch, before, after):
    monkeypatch.setenv("VLLM_PARETO_LOW_BIT_KERNEL", before or "")
    if before is None:
        monkeypatch.delenv("VLLM_PARETO_LOW_BIT_KERNEL")
    served(started, "m")
    assert os.environ["VLLM_PARETO_LOW_BIT_KERNEL"] == after


def test_help_names_every_dtype_with_its_bits():
    lines = {line.split()[0]: line for line in serve.DESCRIPTION.splitlines() if line.strip()}
    for name, fmt in FORMATS.items():
        same = fmt.key_bits == fmt.value_bits
        bits = f"{fmt.key_bits} bits" if same else f"{fmt.key_bits} bits for keys, {fmt.value_bits} for values"
        assert lines[name].split(maxsplit=1)[1] == bits
