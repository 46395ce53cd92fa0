"""Layers whose width the group size does not divide: what becomes of them, what is said, and what is stored."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kv_cache.errors import ParetoError
from quant_methods.backends.environment import BACKENDS
from quant_methods.backends.run import compress_with
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress, prepare
from quant_methods.fused import families
from quant_methods.group_sizes import fit_groups
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.rtn import RTN
from quant_methods.mixed_precision.budget import Budget
from quant_methods.mixed_precision.mixed import compress_to_budget
from quant_methods.mixed_precision.sensitivity import Settings
from quant_methods.mixed_precision.units import Width
from quant_methods.recipe import Calibration, Recipe
from quant_methods.steps import RoundStep
from tests.quant_methods.conftest import TOKENIZER_FILES
from tests.quant_methods.serving import serve
from tests.quant_methods.test_engine import divergence
from vllm_ext.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
CALIBRATION = Calibration(num_samples=4, length=32)
PLAIN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
W4 = RTN(bits=4, group_size=128, symmetric=False)


def write_llama(folder: Path, tokenizer: Path, width: int, inner: int, heads: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=1, head_dim=64, vocab_size=8192, max_position_embeddings=256, tie_word_embeddings=True,
        initializer_range=0.1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def odd(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As SmolLM2: 64 divides the width and 128 does not; the inner width is a multiple of both."""
    return write_llama(tmp_path_factory.mktemp("odd") / "model", tiny_model, 192, 256, 3)


def recipe(*steps: RoundStep) -> Recipe:
    return Recipe("test", steps=steps, calibration=CALIBRATION, kv_scales=False)


def group_sizes(checkpoint: Path) -> dict[str, int]:
    """The group size of each layer that a checkpoint's config.json speaks of, by its full name."""
    settings = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    if settings["quant_method"] == "pareto":
        return {name: group["parts"][0]["group_size"] for group in settings["groups"] for name in group["targets"]}
    groups = settings["config_groups"].values()
    return {name: group["weights"]["group_size"] for group in groups for name in group["targets"]}


def test_the_readme_s_recipe_says_what_it_lowered(
    odd: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--num-calibration-samples", "4", "--calibration-length", "32"]
    words = [
        "compress",
        str(odd),
        "--recipe",
        "gptq-w4",
        "--text",
        str(text_file),
        "--out",
        str(tmp_path / "o"),
        *small,
    ]
    assert main(words) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert said == [
        "note: groups of 64 instead of 128 in 12 layers (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj): 128 does "
        "not divide their 192 input channels"
    ]
    found = group_sizes(tmp_path / "o")
    assert {found[f"model.layers.1.self_attn.{name}"] for name in PLAIN[:4]} == {64}
    assert found["model.layers.0.mlp.down_proj"] == 128
    assert load_reference(tmp_path / "o") is not None


@pytest.mark.parametrize(
    "step", [W4, RTN(bits=3, group_size=128), GPTQ(bits=4, group_size=128, symmetric=True)], ids=str
)
def test_a_lowered_layer_is_what_the_smaller_group_size_makes(
    odd: Path, text_file: Path, tmp_path: Path, step: RoundStep
) -> None:
    """The same checkpoint as by a recipe that names the sizes itself."""
    by_hand = (
        dataclasses.replace(step, group_size=128, targets=("down_proj",)),
        dataclasses.replace(step, group_size=64, targets=("*",)),
    )
    compress(odd, recipe(step), tmp_path / "lowered", text=text_file)
    compress(odd, recipe(*by_hand), tmp_path / "by_hand", text=text_file)
    assert group_sizes(tmp_path / "lowered") == group_sizes(tmp_path / "by_hand")
    lowered, expected = (load_reference(tmp_path / name).state_dict() for name in ("lowered", "by_hand"))
    for name, tensor in expected.items():
        assert torch.equal(lowered[name], tensor), name


def test_skipped_layers_keep_their_bytes(odd: Path, text_file: Path, tmp_path: Path) -> None:
    said: list[str] = []
    given = recipe(dataclasses.replace(W4, group_size_fallback="skip"))
    compress(odd, given, tmp_path / "out", text=text_file, say=said.append)
    assert said == [
        "16 bits kept in 12 layers (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj): the group size, 128, does not "
        "divide their 192 input channels"
    ]
    found, original = (load_reference(path).state_dict() for path in (tmp_path / "out", odd))
    for name, tensor in original.items():
        assert torch.equal(found[name], tensor) != name.endswith("down_proj.weight"), name
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.gate_proj" in ignored
    assert "model.layers.0.mlp.down_proj" not in ignored


@pytest.mark.parametrize("bits", [3, 4])
def test_what_no_group_size_fits_stays_at_16_bits(tiny_model: Path, text_file: Path, tmp_path: Path, bits: int) -> None:
    narrow = write_llama(tmp_path / "model", tiny_model, 128, 144, 2)
    said: list[str] = []
    compress(narrow, recipe(RTN(bits=bits, group_size=128)), tmp_path / "out", text=text_file, say=said.append)
    ours = "down_proj is [128, 144], and the format of ours holds multiples of 32 input channels"
    # vLLM's 4-bit kernels count output channels too, and it merges gate and up.
    gate, down = (f"{name}, and vLLM's 4-bit kernels want multiples of 32" for name in (
        "gate_proj is [144, 128]", "down_proj is [128, 144]"
    ))  # fmt: skip
    expected = {
        3: [f"2 layers (down_proj): {ours}"],
        4: [f"4 layers (gate_proj, up_proj): {gate}", f"2 layers (down_proj): {down}"],
    }
    assert said == [f"16 bits kept in {line}" for line in expected[bits]]
    assert load_reference(tmp_path / "out") is not None
    strict = recipe(RTN(bits=bits, group_size=128, group_size_fallback="refuse"))
    with pytest.raises(ParetoError, match=r"multiples of 32.*; leave it out with ignore: \['(down|gate)_proj'\]"):
        compress(narrow, strict, tmp_path / "no", text=text_file)


def test_layers_that_vllm_merges_stay_together() -> None:
    """Of q, k and v, k has an odd number of output channels: all three stay at 16 bits."""
    shapes = {f"layers.0.attn.{name}": (64, 128) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    shapes["layers.0.attn.k_proj"] = (40, 128)
    fit = fit_groups(dict.fromkeys(shapes, W4), shapes)
    assert list(fit.steps) == ["layers.0.attn.o_proj"]
    (note,) = fit.notes
    assert note.startswith("16 bits kept in 3 layers (q_proj, k_proj, v_proj): k_proj is [40, 128], and vLLM's 4-bit ")
    assert families(shapes) == [list(shapes)[:3], list(shapes)[3:]]
    assert families(["up_proj", "o_proj", "gate_proj"]) == [["up_proj", "gate_proj"], ["o_proj"]]


def test_the_format_is_that_of_what_is_left() -> None:
    """Without the 3-bit layer all is for stock vLLM, whose kernels want what ours do not."""
    shapes = {"a.down_proj": (64, 144), "a.o_proj": (40, 128), "b.o_proj": (64, 96)}
    steps = {"a.down_proj": RTN(bits=3), "a.o_proj": RTN(bits=4), "b.o_proj": RTN(bits=4)}
    fit = fit_groups(steps, shapes)
    assert fit.steps == {"b.o_proj": RTN(bits=4, group_size=32)}
    assert [note.split(":")[0] for note in fit.notes] == [
        "16 bits kept in 1 layer (down_proj)",
        "groups of 32 instead of 128 in 1 layer (o_proj)",
        "16 bits kept in 1 layer (o_proj)",
    ]


def test_nothing_left_is_refused(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    narrow = write_llama(tmp_path / "model", tiny_model, 80, 144, 1)
    with pytest.raises(
        ParetoError, match=r"nothing to compress: 16 bits kept in 14 layers|nothing to compress: 16 bits"
    ):
        compress(narrow, recipe(W4), tmp_path / "out", text=text_file)
    assert not (tmp_path / "out.partial").exists()


def test_budgets_lower_too_and_refuse_before_measuring(odd: Path, text_file: Path, tmp_path: Path) -> None:
    settings = Settings(widths=tuple(map(Width.parse, ("4g128", "8", "16"))), kl=False, hessian_sequences=2)
    said: list[str] = []
    compress_to_budget(
        odd, recipe(RTN(bits=4, group_size=128)), Budget("5bits", bits=5.0), tmp_path / "out", settings=settings,
        loss="hessian", text=text_file, say=said.append,
    )  # fmt: skip
    assert said[0].startswith("groups of 64 instead of 128 in 12 layers")
    found = group_sizes(tmp_path / "out")
    assert all(size in (64, -1) for name, size in found.items() if not name.endswith("down_proj"))
    assert load_reference(tmp_path / "out") is not None
    with pytest.raises(ParetoError, match=r"width 4g128: 128 does not divide the 192 input channels of .*q_proj"):
        compress_to_budget(
            odd, recipe(RTN(bits=4, group_size=64, group_size_fallback="refuse")), Budget("5bits", bits=5.0),
            tmp_path / "no", settings=settings, loss="hessian", text=text_file,
        )  # fmt: skip
    assert not (tmp_path / "no.partial").exists()


def test_a_tool_that_gives_all_layers_one_size_is_not_asked(odd: Path, tmp_path: Path) -> None:
    given = recipe(RTN(bits=4, group_size=128))
    with pytest.raises(
        ParetoError, match=r"group size 128 does not divide .*q_proj, .* choose another --group-size, e.g. 64"
    ):
        compress_with(BACKENDS["llm-compressor"], odd, given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_flags_and_recipe_files_choose(odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compress", str(odd), "--no-kv-scales", "--out", str(tmp_path / "out")]
    assert main([*words, "--recipe", "rtn-w4", "--group-size-fallback", "refuse"]) == 2
    error = capsys.readouterr().err
    assert "does not divide the 192 input channels" in error
    assert "--group-size-fallback" in error
    assert error.count("\n") == 1
    file = tmp_path / "own.yaml"
    file.write_text("steps: [{method: rtn, group_size: 128, group_size_fallback: shrink}]")
    assert main([*words, "--recipe", str(file)]) == 2
    assert "group_size_fallback: 'shrink' is not one of lower, skip, refuse" in capsys.readouterr().err


def test_a_width_that_fits_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    _, _, plan = prepare(tiny_model, recipe(RTN(group_size=64)), tmp_path / "out", device="cpu", overwrite=False)
    assert plan.notes == ()
    assert set(plan.steps.values()) == {RTN(group_size=64)}


@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_serves_layers_with_groups_of_different_sizes(odd: Path, text_file: Path, tmp_path: Path) -> None:
    """For stock vLLM and in the format of ours: what it computes is what PyTorch computes of the dequantized model."""
    steps = {"stock": W4, "ours": RTN(bits=3, group_size=128, symmetric=False)}
    for name, step in steps.items():
        compress(odd, recipe(step), tmp_path / name, text=text_file)
        assert set(group_sizes(tmp_path / name).values()) == {64, 128}
    tokens = torch.randint(8192, (2, 48), generator=torch.Generator().manual_seed(0))
    (tmp_path / "tokens.json").write_text(json.dumps(tokens.tolist()))
    original = scores(load_reference(odd)(tokens).logits)
    for name in steps:
        (tmp_path / f"{name}-served").mkdir()
        serve(tmp_path / "tokens.json", tmp_path / f"{name}-served", [tmp_path / name], plugin=name == "ours")
        result = torch.load(tmp_path / f"{name}-served" / f"{name}.pt")
        assert result.get("error") is None
        expected = scores(load_reference(tmp_path / name)(tokens).logits)
        found = result["logits"].log_softmax(-1)
        assert divergence(expected, found) < 0.05 * divergence(expected, original), name


def scores(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, :-1].log_softmax(-1).detach()
