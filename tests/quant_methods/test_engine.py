"""vLLM computes for every built-in recipe, and every layout, what the dequantized model in PyTorch computes.

On a CPU; where there is a CUDA device, on that instead, recipes that are for CUDA alone included.
"""

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.lab.plant_outliers import plant
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints import reference
from quant_methods.checkpoints.checkpoint import Source, read_tensors, write_json, write_tensors
from quant_methods.compress import compress
from quant_methods.handlers import HANDLERS, Handler
from quant_methods.methods.awq import AWQ
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.omniquant import OmniQuant
from quant_methods.methods.rtn import RTN
from quant_methods.methods.smoothquant import SmoothQuant
from quant_methods.methods.squeezellm import SqueezeLLM
from quant_methods.model_source import resolve_model
from quant_methods.patterns import matches
from quant_methods.recipe import Calibration, Recipe
from quant_methods.recipe_file import built_in_recipes, load_recipe
from quant_methods.report import Report
from quant_methods.steps import RoundStep, Step
from quant_methods.stock_vllm import Serving
from quant_methods.training.movement import Movement
from quant_methods.training.recovery import Recover
from quant_methods.training.tuning import Tune
from tests.quant_methods.conftest import TOKENIZER_FILES
from tests.quant_methods.random_layers import Parts, quantize
from tests.quant_methods.serving import serve

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

# Scales moved into norms and layers, and one layout for each of ref-7m's six blocks.
STANDARD: tuple[Step, ...] = (
    SmoothQuant(targets=("model.layers.5.*",)),
    AWQ(targets=("model.layers.3.*", "model.layers.4.*")),
    GPTQ(bits=4, group_size=128, symmetric=False, targets=("model.layers.0.*",)),
    GPTQ(bits=4, group_size=32, symmetric=True, targets=("model.layers.1.*",)),
    GPTQ(bits=4, group_size=64, symmetric=False, act_order=False, targets=("model.layers.2.*",)),
    RTN(bits=4, group_size=-1, symmetric=True, targets=("model.layers.3.*",)),
    RTN(bits=4, group_size=-1, symmetric=False, targets=("model.layers.4.*",)),
    RTN(bits=8, group_size=-1, symmetric=True, activations="int8", targets=("model.layers.5.*",)),
)

# The same for the format of ours: bits, tables, columns, sparse and low-rank parts, rounded activations. Of these only
# a few layers: rounding turns a last bit of bfloat16 into a whole step.
OURS: tuple[Step, ...] = (
    Parts(bits=3, group_size=32, symmetric=False, product=4, targets=("model.layers.0.*",)),
    Parts(bits=6, group_size=64, activations="int6", targets=("model.layers.1.self_attn.o_proj",)),
    Parts(bits=6, group_size=64, targets=("model.layers.1.*",)),
    Parts(bits=2, group_size=32, symmetric=False, columns=16, targets=("model.layers.2.*",)),
    Parts(bits=3, group_size=-1, table=True, sparse=True, columns=3, targets=("model.layers.3.*",)),
    Parts(bits=8, group_size=-1, columns=4, column_bits=8, activations="int8", targets=("model.layers.4.*",)),
    Parts(bits=4, group_size=64, symmetric=False, activations="int8", targets=("model.layers.5.mlp.*",)),
    Parts(bits=5, group_size=32, sparse=True, columns=5, column_bits=8, product=2, targets=("model.layers.5.*",)),
)

# What makes methods quick and leaves what they store as it is.
QUICK: dict[type[Step], dict[str, Any]] = {
    AWQ: {"exponents": 4},
    OmniQuant: {"epochs": 1},
    SqueezeLLM: {"refits": 0},
    Tune: {"num_samples": 8, "length": 64, "held_out": 2, "batch": 4, "epochs": 4.0, "learning_rate": 5e-4},
    Recover: {"num_samples": 8, "length": 64, "held_out": 2, "batch": 4, "train_steps": 8},
    Movement: {"num_samples": 8, "length": 64, "held_out": 2, "batch": 4, "train_steps": 8},
}


def quick(recipe: Recipe) -> Recipe:
    """Return a recipe that takes a second; KV scales, which serving here does not look at, only if it is for them."""
    steps = tuple(dataclasses.replace(step, **QUICK.get(type(step), {})) for step in recipe.steps)
    return dataclasses.replace(recipe, steps=steps, calibration=Calibration(4, 64), kv_scales=not steps)


RECIPES = {name: quick(load_recipe(name)) for name in built_in_recipes()}
LAYOUTS = {
    name: Recipe(name, steps=steps, calibration=Calibration(4, 64), kv_scales=False)
    for name, steps in {"standard layouts": STANDARD, "our layouts": OURS}.items()
}
# Whether the bulk really rounds without the channels kept apart only shows where these are large.
ON_OUTLIERS = {"llm-int8 on outliers": RECIPES["llm-int8"]}
CASES = RECIPES | LAYOUTS | ON_OUTLIERS


def serving(recipe: Recipe) -> Serving:
    return Serving.of(recipe.rounding)


CUDA = torch.cuda.is_available()
on_cpu = pytest.mark.skipif(CUDA, reason="vLLM serves on the CUDA device here")
on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
PROCESSES = max(4, len(os.sched_getaffinity(0)) // 3) if CUDA else 1
"""That compress at once, and that serve at once, with the plugin and without."""
# Of the formats and kernels that others have too: compressed and served on CPUs only where long tests run.
ALIKE = {
    "gptq-w3-tuned", "gptq-w4-g32", "gptq-w4-g64", "gptq-w4-sym", "movement-50", "rtn-w3", "rtn-w4", "rtn-w8",
    "rtn-w8a16", "sparsegpt-2of4", "sparsegpt-2of4-recovered", "sparsegpt-2of4-w4-recovered", "sparsegpt-50-recovered",
    "squeezellm-w3", "trellis-w2", "trellis-w4", "trellis-w4-tuned", "wanda-2of4", "wanda-50",
}  # fmt: skip
ON_CPU = [name for name, recipe in CASES.items() if "cpu" in serving(recipe).devices]
NAMED_ON_CPU = [pytest.param(name, marks=pytest.mark.long) if name in ALIKE else name for name in ON_CPU]
CUDA_ONLY = [name for name in CASES if name not in ON_CPU]
STATIC = [name for name in CASES if any(step.static for step in CASES[name].rounding)]
# Checkpoints that are damaged before they are served: 8 bits for stock vLLM, 6 in the format of ours.
DAMAGED = {"damaged gptq-w8": "gptq-w8", "damaged gptq-w6": "gptq-w6"}


@dataclass(frozen=True)
class Compressed:
    """A checkpoint, the model and the recipe that it was made from, and what compressing said."""

    model: Path
    recipe: Recipe
    out: Path
    report: Report


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write ref-7m without its last four blocks."""
    whole, out = resolve_model("ref-7m"), tmp_path_factory.mktemp("models") / "two-blocks"
    out.mkdir()
    tensors, metadata = read_tensors(whole / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not any(f"layers.{i}." in name for i in range(2, 6))}
    write_tensors(out / "model.safetensors", kept, metadata)
    write_json(out / "config.json", json.loads((whole / "config.json").read_text()) | {"num_hidden_layers": 2})
    for name in TOKENIZER_FILES:
        shutil.copyfile(whole / name, out / name)
    return out


@pytest.fixture(scope="module")
def planted(two_blocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model that computes the same with 3 channels of each norm 128 times as large."""
    out = tmp_path_factory.mktemp("models") / "planted"
    shutil.copytree(two_blocks, out)
    write_tensors(out / "model.safetensors", plant(Source(two_blocks), 128, 3, seed=0), {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def compressed(
    two_blocks: Path,
    planted: Path,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    one_thread: None,
    request: pytest.FixtureRequest,
) -> dict[str, Compressed]:
    """Compress by every recipe that is tested two blocks of ref-7m, and by layouts all six."""
    tested = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    cases = {name: recipe for name, recipe in CASES.items() if name not in ALIKE or name in tested}
    folder = tmp_path_factory.mktemp("compressed")
    models = dict.fromkeys(CASES, two_blocks) | dict.fromkeys(LAYOUTS, resolve_model("ref-7m"))
    models |= dict.fromkeys(ON_OUTLIERS, planted)
    jobs = [(models[name], recipe, folder / name, text_file) for name, recipe in cases.items()]
    if PROCESSES == 1:
        return dict(zip(cases, map(compress_case, jobs), strict=True))
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        return dict(zip(cases, pool.map(compress_case, jobs), strict=True))


def compress_case(job: tuple[Path, Recipe, Path, Path]) -> Compressed:
    """Compress a model by a recipe into a folder, with a text; in a process of its own, if need be, on one thread."""
    model, recipe, out, text = job
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(HANDLERS, Parts, Handler(quantize))
        return Compressed(model, recipe, out, compress(model, recipe, out, text=text))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Text by ref-7m itself, [2, 96]; calibration saw none like it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARETO_CACHE", str(tmp_path_factory.getbasetemp() / "pareto-cache"))
        return load_sequences(resolve_model("ref-7m"), None, 2, 96, split="evaluation")


@dataclass(frozen=True)
class Served:
    """What engines with and without the plugin wrote, by checkpoint, and what they printed.

    On CUDA those with the plugin served everything.
    """

    stock: dict[str, Any]
    plugin: dict[str, Any]
    log: str

    def of(self, case: Compressed) -> dict[str, Any]:
        """Return what was served by what the report says serves it."""
        return (self.plugin if case.report.serving.plugin else self.stock)[case.out.name]


@pytest.fixture(scope="module")
def served(compressed: dict[str, Compressed], tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Serve everything in two processes, one with the plugin and one without."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    for name, source in DAMAGED.items():
        damage(compressed[source].out, folder / name)
    jobs: list[tuple[bool, list[Path]]] = []
    for plugin in (False, True):
        (folder / str(plugin)).mkdir()
        given = [case.out for case in compressed.values() if case.report.serving.plugin == plugin or (CUDA and plugin)]
        given += [
            folder / name for name, source in DAMAGED.items() if compressed[source].report.serving.plugin == plugin
        ]
        if not plugin:
            given += sorted({case.model for case in compressed.values()})
            # What is refused comes last: it may leave half an engine behind.
            given = sorted(given, key=lambda path: path.name in CUDA_ONLY)
            given += [case.out for case in compressed.values() if case.report.serving.plugin][:1]
        jobs += [(plugin, given[i::PROCESSES]) for i in range(PROCESSES)]

    def run(job: tuple[bool, list[Path]]) -> str:
        return serve(folder / "tokens.json", folder / str(job[0]), job[1], plugin=job[0])

    with ThreadPoolExecutor(2 * PROCESSES if CUDA else 1) as pool:
        log = "".join(pool.map(run, jobs))
    stock, plugin = ({path.stem: torch.load(path) for path in (folder / name).iterdir()} for name in ("False", "True"))
    return Served(stock, plugin, log)


def damage(checkpoint: Path, out: Path) -> None:
    """Copy a checkpoint and let 16 of the 256 output channels of one layer exchange their scales."""
    shutil.copytree(checkpoint, out)
    tensors, metadata = read_tensors(out / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight_scale"
    tensors[name][:16] = tensors[name][:16].roll(1, 0)
    write_tensors(out / "model.safetensors", tensors, metadata)


@dataclass(frozen=True)
class Computed:
    """Log-probabilities [prompts, tokens - 1, vocabulary] in PyTorch, computed in float32 and in bfloat16."""

    exact: Tensor
    bfloat16: Tensor


Expected = Callable[..., Computed]


@pytest.fixture(scope="module")
def expected(tokens: Tensor, one_thread: None) -> Expected:
    """Return what computes them for a checkpoint, and on request as if its activations were not rounded."""

    @cache
    @torch.no_grad()
    def compute(checkpoint: Path, *, rounded: bool = True) -> Computed:
        with pytest.MonkeyPatch.context() as patch:
            if not rounded:
                patch.setattr(reference, "round_inputs", lambda module, linear, rounding: None)
            model = reference.load_reference(checkpoint)
        exact = model(tokens).logits[:, :-1].log_softmax(-1)
        return Computed(exact, model.to(torch.bfloat16)(tokens).logits[:, :-1].float().log_softmax(-1))

    return compute


def divergence(p: Tensor, q: Tensor) -> float:
    """Return KL(p || q) of log-probabilities, the mean over tokens."""
    return (p.exp() * (p - q)).sum(-1).mean().item()


def shares(parts: list[Tensor], change: Tensor, weight: Tensor) -> list[float]:
    """Return how much of each part is in a change, by weighted least squares: 1 for all of it, 0 for none."""
    columns = torch.stack([(part * weight.sqrt()).flatten() for part in parts], 1).double()
    return torch.linalg.lstsq(columns, (change * weight.sqrt()).double().view(-1, 1)).solution.flatten().tolist()


def check_same(case: Compressed, logits: Tensor, expected: Expected) -> None:
    """Assert that logits [prompts, tokens - 1, vocabulary] are those of a checkpoint."""
    scores = logits.log_softmax(-1)
    original, computed = expected(case.model).exact, expected(case.out)
    quantized = computed.exact
    arithmetic, noise = divergence(quantized, computed.bfloat16), divergence(quantized, scores)
    # What quantization changes, rounded weights and rounded activations apart.
    weights = expected(case.out, rounded=False).exact if rounds(case.recipe) else quantized
    changes = [weights - original, quantized - weights] if rounds(case.recipe) else [quantized - original]
    found = shares(changes, scores - original, original.exp()) if case.recipe.steps else []
    print(
        f"{case.out.name}: KL of quantization {divergence(original, quantized):.5f}, of bfloat16 in PyTorch "
        f"{arithmetic:.5f}, of what is served {noise:.5f}; shares {', '.join(f'{share:.3f}' for share in found)}"
    )
    # Without VNNI vLLM's 8-bit products, by oneDNN, saturate in 16 bits: 0.006 instead of 0.002.
    assert noise < (2 if torch.cpu._is_vnni_supported() or not rounds(case.recipe) else 8) * arithmetic
    if found:
        assert abs(found[0] - 1) < (0.25 if rounds(case.recipe) else 0.05)
    if rounds(case.recipe):
        # A last bit of bfloat16 often turns the rounding of an activation into another, in PyTorch as in vLLM.
        assert found[1] > 0.25


def rounds(recipe: Recipe) -> bool:
    """Return whether serving rounds activations."""
    return any(step.activations != "none" for step in recipe.rounding)


def check_served(name: str, compressed: dict[str, Compressed], served: Served, expected: Expected) -> None:
    case = compressed[name]
    assert case.report.serving == serving(case.recipe)
    result = served.of(case)
    assert result.get("error") is None
    assert result["plugin"] == case.report.serving.plugin
    check_same(case, result["logits"], expected)
    if case.recipe.steps:
        with pytest.raises(AssertionError):  # The original model, served, is told from it.
            check_same(case, served.stock[case.model.name]["logits"], expected)
    if rounds(case.recipe):
        with pytest.raises(AssertionError):  # So is a model whose activations are not rounded.
            check_same(case, expected(case.out, rounded=False).bfloat16, expected)


@on_cpu
@pytest.mark.parametrize("name", NAMED_ON_CPU)
def test_vllm_computes_what_the_dequantized_model_computes(
    name: str, compressed: dict[str, Compressed], served: Served, expected: Expected
) -> None:
    check_served(name, compressed, served, expected)


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_cuda) for name in CASES])
def test_vllm_on_cuda_computes_what_the_dequantized_model_computes(
    name: str, compressed: dict[str, Compressed], served: Served, expected: Expected
) -> None:
    check_served(name, compressed, served, expected)


def four_bits(recipe: Recipe) -> bool:
    """Return whether there are layers of 4 bits that stock vLLM serves too."""
    return not serving(recipe).plugin and any(step.bits == 4 for step in recipe.rounding)


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_cuda) for name in CASES if four_bits(CASES[name])])
def test_the_kernel_of_ours_computes_it_too(
    name: str, compressed: dict[str, Compressed], served: Served, expected: Expected
) -> None:
    case = compressed[name]
    result = served.plugin[case.out.name]
    kernels = {kernel for layer in result["layers"].values() for _, kernel in layer["by"]}
    assert "ParetoLowBitLinearKernel" in kernels
    check_same(case, result["logits"], expected)


@on_cpu
@pytest.mark.parametrize("name", DAMAGED)
def test_a_few_channels_with_the_scales_of_others_are_noticed(
    name: str, compressed: dict[str, Compressed], served: Served, expected: Expected
) -> None:
    case = compressed[DAMAGED[name]]
    result = (served.plugin if case.report.serving.plugin else served.stock)[name]
    with pytest.raises(AssertionError):
        check_same(case, result["logits"], expected)


@on_cpu
@pytest.mark.parametrize("name", NAMED_ON_CPU)
def test_layers_stay_quantized_where_the_documentation_says_so(
    name: str, compressed: dict[str, Compressed], served: Served
) -> None:
    case = compressed[name]
    layers = served.of(case)["layers"]
    assert len(layers) == 4 * (6 if name in LAYOUTS else 2)
    for layer, found in layers.items():
        member = layer.replace("qkv_proj", "q_proj").replace("gate_up_proj", "gate_proj")
        step = next((step for step in case.recipe.rounding if matches(member, step.targets)), None)
        if step is None:
            assert found["method"].endswith(".UnquantizedLinearMethod")
            continue
        plugin = case.report.serving.plugin
        assert found["method"].endswith(
            "vllm_ext.weights_method.ParetoLinearMethod" if plugin else ".CompressedTensorsLinearMethod"
        )
        what, kernel, held = kernel_on_cpu(step, plugin=plugin)
        assert set(found["by"]) == {(what, kernel)}, layer
        if held is None:
            assert f"{step.bits}-bit {bulk_of(step)} weights have no CPU kernel: dequantized" in served.log
            continue
        dtype, per_number = held
        total = sum(size for kind, size in found["tensors"].values() if kind == dtype)
        # Without AMX vLLM keeps 8-bit weights out of sight, in oneDNN.
        if dtype == "torch.int32" or torch.cpu._is_amx_tile_supported():
            assert found["size"] <= per_number * total < 1.1 * found["size"], layer
        assert sum(size for kind, size in found["tensors"].values() if "float" in kind) < found["size"] / 3, layer


def bulk_of(step: RoundStep) -> str:
    """Return what the log calls a step's codes."""
    kind = step.bulk_form.part.kind
    return {"table": "look-up", "semi_sparse": "2:4", "bitmap": "grid"}.get(kind, kind)


def kernel_on_cpu(step: RoundStep, *, plugin: bool) -> tuple[str, str, tuple[str, int] | None]:
    """Return what docs/compression.md says multiplies: the class, vLLM's kernel, and the dtype and weights a number."""
    eight = step.bits == 8 and step.group_size == -1 and step.symmetric and step.activations == "int8"
    if eight and bulk_of(step) == "grid":
        what = "Int8Bulk" if plugin else "CompressedTensorsW8A8Int8"
        return what, "CPUInt8ScaledMMLinearKernel", ("torch.int8", 1)
    if step.bits <= 4 and bulk_of(step) == "grid":
        what = "MixedBulk" if plugin else "CompressedTensorsWNA16"
        return what, "CPUWNA16LinearKernel", ("torch.int32", 8)
    return "DenseBulk", "NoneType", None


@on_cpu
@pytest.mark.parametrize("name", [name for name in CUDA_ONLY if name not in STATIC])
def test_what_is_for_cuda_alone_is_said_to_be_and_refused_here(
    name: str, compressed: dict[str, Compressed], served: Served
) -> None:
    case = compressed[name]
    assert str(case.report.serving) == "stock vLLM on CUDA"
    assert "CPUWNA16LinearKernel cannot implement" in served.of(case)["error"]


def test_built_in_recipes_for_cuda_alone_have_8_bits_and_16_bit_activations_or_static_scales() -> None:
    assert ["gptq-w8a16", "rtn-w8a16", *STATIC] == CUDA_ONLY
    assert STATIC == ["smoothquant-w8a8-static"]


@on_cpu
@pytest.mark.parametrize("name", STATIC)
def test_static_scales_load_and_are_near_what_they_mean(
    name: str, compressed: dict[str, Compressed], served: Served, expected: Expected
) -> None:
    """On CPUs with AMX vLLM takes a scale for each token instead, which is why they are said to be for CUDA."""
    case = compressed[name]
    assert str(case.report.serving) == "stock vLLM on CUDA"
    meant = expected(case.out).exact
    found = divergence(meant, served.of(case)["logits"].log_softmax(-1))
    assert found < 2 * divergence(expected(case.model).exact, meant)
    original, _ = read_tensors(case.out / "model.safetensors")
    assert sum(key.endswith(".input_scale") for key in original) == 14


@on_cpu
def test_without_the_plugin_vllm_refuses_the_format_of_ours(compressed: dict[str, Compressed], served: Served) -> None:
    refused = [
        served.stock[name] for name, case in compressed.items() if case.report.serving.plugin and name in served.stock
    ]
    assert len(refused) == 1
    assert "Unknown quantization method: pareto" in refused[0]["error"]


def test_tuned_recipes_are_served_as_tuned(compressed: dict[str, Compressed]) -> None:
    """Else they were those without tuning."""
    tuned = [case for case in compressed.values() if any(isinstance(step, Tune) for step in case.recipe.steps)]
    assert tuned
    for case in tuned:
        recipe = json.loads((case.out / "pareto_recipe.json").read_text())
        assert recipe["tuned"]["kept_step"] > 0
