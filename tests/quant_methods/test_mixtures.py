"""Mixtures of experts: what is compressed of them, what calibration sees of an expert, what is stored and served."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from kv_cache.errors import ParetoError
from kv_cache.scales import KVScales
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.stages import expert_statistics, find_stages
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.checkpoints.quality import stored_bits
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.fused import families, is_expert
from quant_methods.group_sizes import fit_groups
from quant_methods.methods.awq import AWQ
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.pruning import Wanda
from quant_methods.methods.rotation import Rotate
from quant_methods.methods.rtn import RTN
from quant_methods.methods.sparsegpt import SparseGPT
from quant_methods.mixed_precision.budget import Budget, Loss
from quant_methods.mixed_precision.mixed import JSON_FILE, compress_to_budget
from quant_methods.mixed_precision.sensitivity import Sensitivity, Settings
from quant_methods.mixed_precision.units import Width
from quant_methods.plan import make_plan
from quant_methods.recipe import Calibration, Recipe
from quant_methods.steps import Step
from quant_methods.sweeps.file import Evaluation, Point, Sweep
from quant_methods.sweeps.sweep import SweepRun
from quant_methods.training.recovery import Recover
from quant_methods.training.tuning import Tune
from tests.quant_methods.checkpoints.test_readback import read_back
from tests.quant_methods.conftest import TOKENIZER_FILES
from tests.quant_methods.serving import serve
from tests.quant_methods.test_engine import divergence
from vllm_ext.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 8192, "max_position_embeddings": 256,
    "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, moe_intermediate_size=192, num_experts=4, num_experts_per_tok=2),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=None),
}
# Where a checkpoint has experts, what it calls their layers, and what chooses them.
STORED = {
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj"), "mlp.gate"),
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2"), "block_sparse_moe.gate"),
}
# Layers of attention and of experts.
LAYERS = 2 * (4 + 4 * 3)
W4 = RTN(bits=4, group_size=64, symmetric=False)


def recipe(*steps: Step, kv_scales: bool = False, ignore: tuple[str, ...] = ("lm_head",)) -> Recipe:
    return Recipe("test", steps=steps, calibration=Calibration(4, 32), kv_scales=kv_scales, ignore=ignore)


def write(config: Any, tokenizer: Path, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def mixture(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(CONFIGS[request.param], tiny_model, tmp_path_factory.mktemp("moe") / request.param)


def some_tokens(count: int = 2, length: int = 48) -> Tensor:
    return torch.randint(8192, (count, length), generator=torch.Generator().manual_seed(0))


def test_blocks_of_single_layers_compute_what_they_did(mixture: Path) -> None:
    where, names, _ = STORED[mixture.name]
    decoder = Decoder(mixture, Source(mixture))
    assert [name for name in decoder.linears(0) if is_expert(name)] == [
        f"{where}.{index}.{name}" for index in range(4) for name in names
    ]
    tokens = some_tokens()
    hidden = decoder.embed(tokens)
    with decoder.loaded(0) as block:
        decoder.advance(0, block, hidden)
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    expected = model(tokens, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(hidden, expected, rtol=1e-4, atol=1e-5)


def test_an_expert_is_calibrated_on_the_tokens_that_are_sent_to_it(mixture: Path) -> None:
    where, names, router = STORED[mixture.name]
    decoder = Decoder(mixture, Source(mixture))
    hidden = decoder.embed(some_tokens())
    with decoder.loaded(0) as block, torch.no_grad():
        stages = find_stages(decoder, 0, block, hidden)
        assert [stage.wave for stage in stages] == [None, None, *[0] * 4, *[1] * 4]
        assert stages[3].names == tuple(f"{where}.1.{name}" for name in names[:2])
        found = [expert_statistics(decoder, 0, block, hidden, stages=stages, wave=wave) for wave in (0, 1)]
        seen: list[Tensor] = []
        hook = block.get_submodule(router).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        decoder.run(0, block, hidden)
        hook.remove()
        x = seen[0].reshape(-1, 128)
        logits = x @ block.get_submodule(router).weight.T
        chosen = logits.topk(2, -1).indices
        for expert in range(4):
            mine = x[(chosen == expert).any(-1)]
            statistics = found[0][2 + expert]
            assert statistics is not None
            assert torch.allclose(statistics.hessian, mine.T @ mine / len(mine), rtol=1e-4, atol=1e-5)
            gate, up = (mine @ block.get_submodule(f"{where}.{expert}.{name}").weight.T for name in names[:2])
            inner = torch.nn.functional.silu(gate) * up
            statistics = found[1][6 + expert]
            assert statistics is not None
            assert torch.allclose(statistics.hessian, inner.T @ inner / len(mine), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("step", [W4, GPTQ(bits=4, group_size=64), RTN(bits=8, group_size=64)], ids=str)
def test_checkpoints_read_back(mixture: Path, text_file: Path, tmp_path: Path, step: Step) -> None:
    where, names, router = STORED[mixture.name]
    report = compress(mixture, recipe(step, kv_scales=True), tmp_path / "out", text=text_file)
    assert len(report.layers) == LAYERS
    stored = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(mixture / "model.safetensors")
    assert f"model.layers.1.{where}.3.{names[2]}.weight_packed" in stored
    assert f"model.layers.1.{where}.3.{names[2]}.weight" not in stored
    assert torch.equal(stored[f"model.layers.0.{router}.weight"], original[f"model.layers.0.{router}.weight"])
    found, plain = read_back(tmp_path / "out"), read_back(mixture)
    assert set(found.parameters) == set(plain.parameters)
    bits = step.bits  # type: ignore[attr-defined]
    for local in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{local}"
        before, after = plain.read(name).float(), found.read(name).float()
        error = (after - before).norm(dim=(1, 2)) / before.norm(dim=(1, 2))
        assert (error > 0).all()
        assert (error < {4: 0.25, 8: 0.02}[bits]).all()
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert f"model.layers.0.{router}" in settings["ignore"]
    assert KVScales.load(tmp_path / "out").num_layers == 2


@pytest.mark.parametrize(
    "steps",
    [
        (SparseGPT(pattern="2:4"),),
        (Wanda(pattern="2:4"), GPTQ(bits=4, group_size=64)),
        (SparseGPT(pattern="2:4", bits=4, group_size=64),),
        (SparseGPT(pattern="2:4", bits=4, group_size=64, store="2:4"),),
    ],
    ids=["pruned", "then rounded", "in one pass", "with zeros left out"],
)
def test_experts_are_pruned_like_other_layers(
    mixture: Path, text_file: Path, tmp_path: Path, steps: tuple[Step, ...]
) -> None:
    said: list[str] = []
    report = compress(mixture, recipe(*steps), tmp_path / "out", text=text_file, say=said.append)
    assert len(report.layers) == LAYERS
    left_out = getattr(steps[0], "store", "dense") == "2:4"
    assert left_out == ("zeros are stored as codes too: vLLM has no kernel of experts that leaves them out" in said)
    assert sum(is_expert(layer.name) for layer in report.layers) == 2 * 4 * 3
    assert all(0.5 <= layer.sparsity < 0.6 for layer in report.layers)
    source = Source(tmp_path / "out")
    dense = [f"{layer.name}.weight" in source for layer in report.layers]
    assert all(dense) if len(steps) == 1 and not steps[0].rounding else not any(dense)


def test_gptq_solves_experts_for_their_own_inputs(mixture: Path, text_file: Path, tmp_path: Path) -> None:
    """What comes out is nearer to the original than with rounding to nearest."""
    errors = {}
    tokens = load_sequences(mixture, text_file, 24, 64)
    for name, step in {
        "rtn": RTN(bits=4, group_size=-1, search="minmax"),
        "gptq": GPTQ(bits=4, group_size=-1, search="minmax", upstream=False),
    }.items():
        out = tmp_path / name
        given = recipe(step, ignore=("lm_head", "*.self_attn.*"))
        compress(mixture, dataclasses.replace(given, calibration=Calibration(24, 64)), out, text=text_file)
        original, found = (loaded(path).model(tokens).last_hidden_state.detach() for path in (mixture, out))
        errors[name] = (found - original).norm().item()
    assert errors["gptq"] < 0.8 * errors["rtn"]


@pytest.mark.parametrize("step", [None, W4, RTN(bits=8, group_size=64)], ids=str)
def test_the_reference_model_computes_what_a_checkpoint_means(
    mixture: Path, text_file: Path, tmp_path: Path, step: Step | None
) -> None:
    """It once said that the checkpoint lacks the joint parameters which transformers makes of the experts' layers."""
    checkpoint = mixture
    if step is not None:
        checkpoint = tmp_path / "out"
        compress(mixture, recipe(step), checkpoint, text=text_file)
    tokens = some_tokens()
    found = load_reference(checkpoint)
    assert torch.allclose(found(tokens).logits, loaded(checkpoint)(tokens).logits, rtol=1e-4, atol=1e-4)
    bits = stored_bits(checkpoint, found)
    # Of groups of 64: a scale of 16 bits, and 4 bits for the zero-point where there is one.
    wanted = 16 if step is None else {4: 4 + 20 / 64, 8: 8 + 16 / 64}[step.bits]  # type: ignore[attr-defined]
    assert bits == pytest.approx(wanted, rel=1e-3)


def test_a_sweep_measures_mixtures(mixture: Path, text_file: Path, tmp_path: Path) -> None:
    evaluation = Evaluation(text_file, 2, 64)
    points = [
        Point("4 bits", {}, recipe(W4), None),
        Point("8 bits", {}, recipe(RTN(bits=8, group_size=64)), None),
        Point("a budget", {}, recipe(W4), Budget("6bits", bits=6.0)),
    ]
    settings = Settings(kl_sequences=1, hessian_sequences=2)
    rows = SweepRun(mixture, Sweep(points, evaluation), tmp_path / "sweep", text=text_file, settings=settings).run()
    four, eight, mixed = rows
    assert four["bits_per_weight"] < mixed["bits_per_weight"] <= 6 < eight["bits_per_weight"]
    assert eight["kl"] < mixed["kl"] < four["kl"]


@pytest.mark.parametrize("loss", ["kl", "hessian"])
def test_a_budget_gives_all_experts_of_a_block_one_width(
    mixture: Path, text_file: Path, tmp_path: Path, loss: Loss
) -> None:
    where, names, _ = STORED[mixture.name]
    # Groups of 128 do not fit the 192 input channels of the last layers; then none has them.
    step = RTN(bits=4, group_size=128, symmetric=False)
    settings = Settings(kl_sequences=1, hessian_sequences=2)
    report, mixed = compress_to_budget(
        mixture, recipe(step), Budget("6bits", bits=6.0), tmp_path / "out", settings=settings, loss=loss, text=text_file
    )
    document = json.loads((tmp_path / "out" / JSON_FILE).read_text())
    units = {unit["name"]: unit for unit in document["units"]}
    experts = [f"model.layers.{block}.{where}.*" for block in range(2)]
    assert set(experts) < set(units)
    assert all(len(units[name]["layers"]) == 12 for name in experts)
    chosen = {unit["chosen"] for unit in units.values()}
    assert chosen <= {"4", "8", "16"}
    assert len(chosen) > 1
    targets = {target for step in mixed.steps for target in step.targets}  # type: ignore[attr-defined]
    assert {*experts} & {*targets, *mixed.ignore} == {*experts}
    assert report.serving.plugin is False
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name in (name for name in experts if units[name]["chosen"] != "16"):
        scales = [
            stored[f"{name.removesuffix('*')}{index}.{local}.weight_scale"] for index in range(4) for local in names
        ]
        assert [scale.shape[1] for scale in scales] == [128 // 64, 128 // 64, 192 // 64] * 4
    bits = stored_bits(tmp_path / "out", load_reference(tmp_path / "out"))
    # The budget counts 8 bits for a zero-point, of which this format stores 4.
    assert document["bits_per_weight"] - 4 / 64 <= bits <= document["bits_per_weight"] <= 6


def test_an_expert_without_tokens_loses_nothing(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    many = Qwen3MoeConfig(**SHAPE | {"num_hidden_layers": 1}, moe_intermediate_size=192, num_experts=64)
    model = write(many, tiny_model, tmp_path / "model")
    decoder = Decoder(model, Source(model))
    plan = make_plan(decoder, recipe(W4), model)
    settings = Settings(widths=(Width(4), Width(16)), kl=False)
    (units,) = [
        Sensitivity(
            decoder, plan, some_tokens(1, 4), settings=settings, folder=tmp_path / "measures", key="",
            progress=lambda done, total, what: None,
        ).measure()
    ]  # fmt: skip
    (experts,) = [unit for unit in units if unit.name.endswith("experts.*")]
    assert 0 < experts.choices[0].error < 0.1


def loaded(checkpoint: Path) -> Any:
    """The model that a checkpoint means, float32."""
    found = read_back(checkpoint)
    model = AutoModelForCausalLM.from_config(found.model.config, dtype=torch.float32)
    state = {name: found.read(name).float() for name in found.parameters}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def test_experts_without_a_token_are_said(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = Qwen3MoeConfig(**SHAPE, moe_intermediate_size=192, num_experts=64, num_experts_per_tok=1)
    model = write(many, tiny_model, tmp_path / "model")
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten")
    words = ["compress", str(model), "--recipe", "gptq-w4", "--group-size", "64", "--text", str(tmp_path / "text.txt")]
    words += ["--num-calibration-samples", "1", "--calibration-length", "8", "--no-kv-scales"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no calibration token" in line]
    assert "was sent to 1" in line
    assert "model.layers.0.mlp.experts." in line
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())


REFUSED: dict[str, tuple[tuple[Step, ...], str]] = {
    "awq": ((AWQ(), W4), r"awq does not know mixtures of experts; use gptq or rtn alone"),
    "tune": ((W4, Tune()), r"tune does not know mixtures of experts"),
    "recover": ((Wanda(), Recover()), r"recover does not know mixtures of experts"),
    "3 bits": ((RTN(bits=3, group_size=64),), r"vLLM serves experts of 4 bits, or of 8 bits without zero-points"),
    "int8": ((RTN(bits=8, group_size=-1, activations="int8"),), r"with 16-bit activations: use gptq-w4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_experts_cannot_have_is_refused_before_any_work(
    mixture: Path, text_file: Path, tmp_path: Path, name: str
) -> None:
    steps, message = REFUSED[name]
    with pytest.raises(ParetoError, match=message) as caught:
        compress(mixture, recipe(*steps), tmp_path / "out", text=text_file)
    assert "--ignore '*.experts.*'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def test_rotation_and_other_widths_are_too(mixture: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ParetoError, match=r"rotate serves models built like Llama"):
        compress(mixture, recipe(Rotate(), W4), tmp_path / "out", text=text_file)
    three = Settings(widths=(Width(3), Width(4)))
    with pytest.raises(ParetoError, match=r"width 3: the recipe rounds experts, and stock vLLM, which serves these"):
        compress_to_budget(
            mixture, recipe(W4), Budget("5bits", bits=5.0), tmp_path / "out", text=text_file, settings=three
        )
    assert not (tmp_path / "out.partial").exists()


def test_attention_alone_may_have_what_experts_may_not(mixture: Path, text_file: Path, tmp_path: Path) -> None:
    given = recipe(AWQ(exponents=2), RTN(bits=3, group_size=64), ignore=("lm_head", "*.experts.*"))
    assert len(compress(mixture, given, tmp_path / "out", text=text_file).layers) == 8
    found, plain = read_back(tmp_path / "out"), read_back(mixture)
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(found.read(name), plain.read(name))


def test_all_experts_of_a_block_are_stored_alike(mixture: Path, text_file: Path, tmp_path: Path) -> None:
    where, names, _ = STORED[mixture.name]
    with pytest.raises(ParetoError, match=r"vLLM merges a block's experts into one; ignore or target them together"):
        compress(mixture, recipe(W4, ignore=("lm_head", names[2])), tmp_path / "out", text=text_file)
    local = [f"{where}.{index}.{name}" for index in range(2) for name in names]
    attention = ["self_attn.q_proj", "self_attn.k_proj"]
    assert families([attention[0], *local, attention[1]]) == [attention, local]
    shapes = {name: (192, 128) if name.endswith(names[:2]) else (128, 192) for name in local}
    fit = fit_groups(dict.fromkeys(local, RTN(group_size=128)), shapes)
    assert {step.group_size for step in fit.steps.values()} == {64}
    assert [note.partition(": ")[2] for note in fit.notes] == [
        "vLLM wants all experts of a block in groups of one size",
        "128 does not divide their 192 input channels",
    ]


@pytest.mark.parametrize(
    ("widths", "asked", "fitted"), [((128, 64), 64, 32), ((128, 64), 128, 32), ((64, 192), 64, 32), ((64, 64), 64, 64)]
)
def test_experts_have_more_groups_than_one_if_any_has(widths: tuple[int, int], asked: int, fitted: int) -> None:
    """vLLM answered with a KL of 0.5 instead of 0.1: it orders the first layers' scales by the last one's width."""
    hidden, inner = widths
    local = ("gate_proj", "up_proj", "down_proj")
    shapes = {
        f"model.layers.0.mlp.experts.{index}.{name}": (hidden, inner) if name == local[2] else (inner, hidden)
        for index in range(2)
        for name in local
    }
    fit = fit_groups(dict.fromkeys(shapes, RTN(group_size=asked)), shapes)
    assert {step.group_size for step in fit.steps.values()} == {fitted}
    assert bool(fit.notes) == (asked != fitted)
    assert all("one group wide" in note for note in fit.notes)
    if asked == inner:
        refusing = dict.fromkeys(shapes, RTN(group_size=asked, group_size_fallback="refuse"))
        if asked == fitted:
            assert fit_groups(refusing, shapes).steps == refusing
        else:
            with pytest.raises(ParetoError, match=f"use {fitted}, or let --group-size-fallback lower it"):
                fit_groups(refusing, shapes)
        skipped = fit_groups(dict.fromkeys(shapes, RTN(group_size=asked, group_size_fallback="skip")), shapes)
        assert bool(skipped.steps) == (asked == fitted)


def test_experts_that_are_stored_in_one_are_refused_in_one_line(mixture: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    where, names, _ = STORED[mixture.name]
    tensors = load_file(mixture / "model.safetensors")
    shutil.copytree(mixture, tmp_path / "joint", ignore=shutil.ignore_patterns("*.safetensors"))
    renamed = {name.replace(f"{where}.", f"{where}.of."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "joint" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ParetoError, match="not one tensor a parameter, which is all that compressing weights supports"):
        compress(tmp_path / "joint", recipe(W4), tmp_path / "out")
    assert names


CUDA = torch.cuda.is_available()


@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(
    "ignore",
    [
        pytest.param(("lm_head", "*.experts.*"), id="attention"),
        pytest.param(
            ("lm_head",),
            marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="experts of few bits are served on CUDA")],
            id="all",
        ),
    ],
)
def test_vllm_serves_them(mixture: Path, text_file: Path, tmp_path: Path, ignore: tuple[str, ...]) -> None:
    """Stock vLLM computes what PyTorch computes of the dequantized layers, and leaves experts and routers be."""
    report = compress(mixture, recipe(GPTQ(bits=4, group_size=64), ignore=ignore), tmp_path / "w4", text=text_file)
    assert report.serving.devices == (("cuda",) if len(report.layers) == LAYERS else ("cpu", "cuda"))
    tokens = some_tokens()
    (tmp_path / "tokens.json").write_text(json.dumps(tokens.tolist()))
    (tmp_path / "served").mkdir()
    serve(tmp_path / "tokens.json", tmp_path / "served", [tmp_path / "w4"], plugin=False)
    result = torch.load(tmp_path / "served" / "w4.pt")
    assert result.get("error") is None
    original, expected = (
        loaded(path)(tokens).logits[:, :-1].log_softmax(-1).detach() for path in (mixture, tmp_path / "w4")
    )
    assert divergence(expected, result["logits"].log_softmax(-1)) < 0.1 * divergence(expected, original)
