"""Whole checkpoints in other tools' formats, written here and read back as a model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import unpack_linear
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.formats.grid import Grid, round_static
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.methods.rtn import RTN
from quant_methods.model_source import resolve_model
from quant_methods.recipe import Recipe

LAYER = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS, GROUPS = 192, 128, 4
Tensors = dict[str, Tensor]


def words(codes: Tensor, order: list[int]) -> Tensor:
    """Eight 4-bit codes of a row into an int32, ``order`` saying which comes lowest."""
    eights = codes.long().unflatten(1, (-1, 8))
    joined = sum(eights[:, :, channel] << (4 * place) for place, channel in enumerate(order))
    assert isinstance(joined, Tensor)
    return ((joined + 2**31) % 2**32 - 2**31).to(torch.int32)


PLAIN, AWQ = list(range(8)), [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.fixture(scope="module")
def parts() -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes [in, out], zero-points and scales [groups, out]."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (COLUMNS, ROWS), generator=generator)
    zeros = torch.randint(1, 16, (GROUPS, ROWS), generator=generator)
    return codes, zeros, torch.rand((GROUPS, ROWS), generator=generator).half() / 8


def expected(parts: tuple[Tensor, Tensor, Tensor], group_of: Tensor) -> Tensor:
    codes, zeros, scales = parts
    return ((codes - zeros[group_of]).double() * scales[group_of].double()).float().T


def write(model: Path, out: Path, tensors: Tensors, settings: dict[str, Any], name: str = "model.safetensors") -> Path:
    """The model with one layer replaced."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors"))
    kept = {k: v for k, v in load_file(model / "model.safetensors").items() if not k.startswith(LAYER)}
    save_file(kept | {f"{LAYER}.{k}": v.contiguous() for k, v in tensors.items()}, out / name, {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | ({"quantization_config": settings} if settings else {})))
    return out


def read(checkpoint: Path) -> Tensor:
    weight = load_reference(resolve_model(checkpoint, quantized=True)).get_submodule(LAYER).weight
    assert isinstance(weight, Tensor)
    return weight


def gptq(parts: tuple[Tensor, Tensor, Tensor], group_of: Tensor, offset: int) -> Tensors:
    codes, zeros, scales = parts
    return {
        "qweight": words(codes.T, PLAIN).T,
        "qzeros": words(zeros - offset, PLAIN),
        "scales": scales,
        "g_idx": group_of.int(),
        "bias": torch.zeros(ROWS),
    }


def test_gptq_of_two_versions_with_sorted_channels(
    tiny_model: Path, tmp_path: Path, parts: tuple[Tensor, Tensor, Tensor]
) -> None:
    group_of = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(2)) % GROUPS
    v1 = write(tiny_model, tmp_path / "v1", gptq(parts, group_of, 1), {}, "gptq_model-4bit-32g.safetensors")
    (v1 / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": True}))
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
    v2 = write(tiny_model, tmp_path / "v2", gptq(parts, group_of, 0), settings)
    assert torch.equal(read(v1), expected(parts, group_of))
    assert torch.equal(read(v2), expected(parts, group_of))
    # What the format does not touch is the original's.
    original = load_reference(tiny_model).model
    assert torch.equal(load_reference(v2).model.layers[1].mlp.up_proj.weight, original.layers[1].mlp.up_proj.weight)
    with pytest.raises(ParetoError, match=r"v1 is already quantized \(gptq\); compress the original"):
        compress(v1, Recipe("r", steps=(RTN(),), kv_scales=False), tmp_path / "x")


def test_awq(tiny_model: Path, tmp_path: Path, parts: tuple[Tensor, Tensor, Tensor]) -> None:
    codes, zeros, scales = parts
    tensors = {"qweight": words(codes, AWQ), "qzeros": words(zeros, AWQ), "scales": scales}
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    out = write(tiny_model, tmp_path / "awq", tensors, settings)
    assert torch.equal(read(out), expected(parts, torch.arange(COLUMNS) // 32))


def compressed(weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    weights = {"type": "int", "num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False} | weights
    group = {"targets": [LAYER], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": []}


def test_compressed_tensors_with_sorted_channels(
    tiny_model: Path, tmp_path: Path, parts: tuple[Tensor, Tensor, Tensor]
) -> None:
    codes, zeros, scales = parts
    group_of = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3)) % GROUPS
    tensors = {
        "weight_packed": words(codes.T, PLAIN),
        "weight_zero_point": words(zeros, PLAIN).T,
        "weight_scale": scales.T,
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
        "weight_g_idx": group_of.int(),
    }
    out = write(tiny_model, tmp_path / "ct", tensors, compressed({"actorder": "group"}))
    assert torch.equal(read(out), expected(parts, group_of))
    unset = write(
        tiny_model, tmp_path / "unset", tensors | {"weight_g_idx": torch.full((COLUMNS,), -1)}, compressed({})
    )
    assert torch.equal(read(unset), expected(parts, torch.arange(COLUMNS) // 32))


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7])
def test_compressed_tensors_of_both_packings(bits: int) -> None:
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (128, 160), dtype=torch.int8)
    zeros = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (128, 5), dtype=torch.int8)

    def stream(rows: Tensor) -> Tensor:
        """Codes of a row behind each other, by Python's integers."""
        words = []
        for row in rows.tolist():
            whole = sum((code + (1 << (bits - 1))) << (bits * place) for place, code in enumerate(row))
            words.append([whole >> shift & 0xFFFFFFFF for shift in range(0, bits * len(row), 32)])
        return torch.tensor(words).to(torch.int32)

    packings = {
        "whole codes": (pack_to_int32(codes, bits), pack_to_int32(zeros, bits, packed_dim=0)),
        "stream": (stream(codes), stream(zeros.T).T),
    }
    for name, (weight, zero) in packings.items():
        tensors = {"a.weight_packed": weight, "a.weight_zero_point": zero, "a.weight_scale": torch.ones(128, 5)}
        tensors["a.weight_shape"] = torch.tensor(codes.shape)
        layer = unpack_linear("a", tensors, Grid(bits, 32, False)).part(GridCodes)
        assert torch.equal(layer.codes, codes), name
        assert torch.equal(layer.zero_point, zeros), name


def test_eight_bits_with_static_activations(tiny_model: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-128, 128, (ROWS, COLUMNS), generator=generator, dtype=torch.int8)
    tensors = {
        "weight": codes,
        "weight_scale": torch.tensor([0.01]),
        "weight_zero_point": torch.tensor([3], dtype=torch.int8),
        "input_scale": torch.tensor([0.05]),
        "input_zero_point": torch.tensor([-7], dtype=torch.int8),
    }
    activations = {"type": "int", "num_bits": 8, "dynamic": False, "strategy": "tensor", "symmetric": False}
    weights = {"num_bits": 8, "strategy": "tensor", "group_size": None}
    model = load_reference(write(tiny_model, tmp_path / "w8a8", tensors, compressed(weights, activations)))
    layer = model.get_submodule(LAYER)
    assert torch.allclose(layer.weight, (codes.double() - 3).float() * 0.01)
    x = torch.randn((5, COLUMNS), generator=generator) * 4
    codes_of_x = (x.double() / 0.05).round().add(-7).clamp(-128, 127)
    assert (codes_of_x == -128).any()
    assert torch.allclose(layer(x), ((codes_of_x + 7) * 0.05).float() @ layer.weight.T, atol=1e-4)
    one = torch.tensor([0.05])
    assert torch.equal(round_static(torch.zeros(3), one, torch.tensor([-7.0]), 8), torch.zeros(3))


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (
            lambda t: t,
            {"quant_method": "bitsandbytes"},
            "quantized by 'bitsandbytes'; expected compressed-tensors, pareto, gptq",
        ),
        (lambda t: t, {"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; expected"),
        (lambda t: t, {"quant_method": "gptq", "is_marlin_format": True}, "checkpoint_format 'marlin'; expected"),
        (lambda t: t, {"quant_method": "awq", "version": "gemv"}, "AWQ version 'gemv' with 4 bits; expected gemm"),
        (lambda t: t | {"bias": torch.ones(ROWS)}, {"quant_method": "gptq"}, "up_proj.bias, and the model that"),
        (lambda t: {k: v for k, v in t.items() if k != "scales"}, {"quant_method": "gptq"}, "a qweight and no scales"),
        (lambda t: t | {"qweight": t["qweight"][:10]}, {"quant_method": "gptq"}, "a qweight of 10 rows for 128 input"),
    ],
)
def test_what_is_not_read_is_refused(
    change: Callable[[Tensors], Tensors],
    settings: dict[str, Any],
    message: str,
    tiny_model: Path,
    tmp_path: Path,
    parts: tuple[Tensor, Tensor, Tensor],
) -> None:
    tensors = change(gptq(parts, torch.arange(COLUMNS) // 32, 1))
    with pytest.raises(ParetoError, match=message):
        load_reference(write(tiny_model, tmp_path / "bad", tensors, settings))


def test_a_quantized_layer_that_the_model_lacks_is_refused(
    tiny_model: Path, tmp_path: Path, parts: tuple[Tensor, Tensor, Tensor]
) -> None:
    out = write(tiny_model, tmp_path / "more", gptq(parts, torch.arange(COLUMNS) // 32, 1), {"quant_method": "gptq"})
    tensors = load_file(out / "model.safetensors")
    extra = {name.replace("layers.0.", "layers.9."): tensors[name].clone() for name in tensors if LAYER in name}
    save_file(tensors | extra, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(ParetoError, match=r"no linear layer model\.layers\.9\.mlp\.up_proj, which is quantized"):
        load_reference(out)
