"""vLLM's layers of other people's sparse checkpoints on fake ranks: together they compute the dense product."""

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.quantization import get_quantization_config

from kv_cache.errors import ParetoError
from quant_methods.formats.sparse_formats import expanded, has_marlin
from tests.quant_methods.sparse_writer import PER_TOKEN, bitmask, bitmask_24, kept, marlin_24, rounded, scheme
from tests.vllm_ext.test_weights import FUSED, close, engine, on_rank  # noqa: F401  (engine is a fixture)
from vllm_ext import plugin
from vllm_ext.sparse_checkpoints import SPARSE, expand

SPARSITY = {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": ["lm_head"]}
BASE = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "bitmask": BASE | {"sparsity_config": SPARSITY | {"format": "sparse-bitmask"}},
    "bitmask-24": BASE | {"sparsity_config": SPARSITY},
    "marlin-4": BASE | {"format": "marlin-24", "config_groups": scheme(4, group_size=128)},
    "marlin-8": BASE | {"format": "marlin-24", "config_groups": scheme(8)},
    "int-24": BASE
    | {"format": "int-quantized", "config_groups": scheme(8, PER_TOKEN), "sparsity_config": SPARSITY},
}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", SETTINGS)


def config_of(kind: str) -> Any:
    plugin.register()
    kept_in_config = SETTINGS[kind]
    method = get_quantization_config(SPARSE)
    assert method.override_quantization_method(kept_in_config, None) == SPARSE
    config = method.from_config({**kept_in_config})
    config.packed_modules_mapping = FUSED
    return config


def stored(kind: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a layer's tensors as vLLM is given them, and the weight that they mean in float64."""
    if kind.startswith("bitmask"):
        dense = torch.where(weight > 0, weight, 0) if kind == "bitmask" else weight * kept(weight)
        tensors = bitmask(dense) if kind == "bitmask" else bitmask_24(dense)
    else:
        bits, groups = (4, weight.shape[1] // 128) if kind == "marlin-4" else (8, 1)
        codes, scale = rounded(weight.float(), bits, groups)
        dense = codes * scale.repeat_interleave(weight.shape[1] // groups, 1)
        tensors = marlin_24(codes, scale, bits)
        if kind == "int-24":
            tensors = {**bitmask_24(codes.to(torch.int8)), "weight_scale": scale}
    named = ((f"a.{name}", tensor) for name, tensor in tensors.items())
    found = dict(expanded(named, marlin=has_marlin(SETTINGS[kind])))
    return {name.removeprefix("a."): tensor for name, tensor in found.items()}, dense.double()


def fill(layer: torch.nn.Module, tensors: dict[str, torch.Tensor], shard: Any = None) -> None:
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))


def product(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    layer.quant_method.process_weights_after_loading(layer)
    y: torch.Tensor = layer.quant_method.apply(layer, x)
    return y


def weights(rows: int, inputs: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [(torch.randn(rows, inputs, generator=generator) / inputs**0.5).bfloat16() for _ in range(count)]


@KINDS
def test_merged_layers_on_two_ranks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, x = config_of(kind), torch.randn(5, 256, dtype=torch.bfloat16)
    made = [stored(kind, weight) for weight in weights(128, 256, 2)]
    for rank in range(2):
        on_rank(monkeypatch, rank, 2)
        layer = vllm_linear.MergedColumnParallelLinear(
            256, [128, 128], bias=False, quant_config=config, prefix="mlp.gate_up_proj"
        )
        for shard, (tensors, _) in enumerate(made):
            fill(layer, tensors, shard)
        wanted = [(x.double() @ dense.T).chunk(2, 1)[rank] for _, dense in made]
        assert close(product(layer, x), torch.cat(wanted, 1))


@KINDS
def test_attention_and_row_parallel_on_two_ranks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, x = config_of(kind), torch.randn(5, 256, dtype=torch.bfloat16)
    made = {shard: stored(kind, weights(rows, 256, 1)[0]) for shard, rows in {"q": 256, "k": 128, "v": 128}.items()}
    tensors, dense = stored(kind, weights(64, 256, 1)[0])
    total = torch.zeros(5, 64, dtype=torch.float64)
    for rank in range(2):
        on_rank(monkeypatch, rank, 2)
        layer = vllm_linear.QKVParallelLinear(256, 64, 4, 2, bias=False, quant_config=config, prefix="a.qkv_proj")
        for shard, (own, _) in made.items():
            fill(layer, own, shard)
        wanted = [(x.double() @ part.T).chunk(2, 1)[rank] for _, part in made.values()]
        assert close(product(layer, x), torch.cat(wanted, 1))
        row = vllm_linear.RowParallelLinear(256, 64, bias=False, quant_config=config, prefix="a.o_proj")
        fill(row, tensors)
        total += product(row, x[:, 128 * rank : 128 * rank + 128].contiguous()).double()
    assert close(total, x.double() @ dense.T)


def test_ignored_layers_and_other_checkpoints_stay_as_they_are() -> None:
    config = config_of("marlin-4")
    layer = vllm_linear.ReplicatedLinear(128, 64, bias=False, quant_config=config, prefix="lm_head")
    assert isinstance(layer.quant_method, vllm_linear.UnquantizedLinearMethod)
    assert torch.float32 not in config.get_supported_act_dtypes()
    other = {**BASE, "format": "pack-quantized", "config_groups": scheme(4)}
    assert get_quantization_config(SPARSE).override_quantization_method(other, None) is None
    untouched = iter([("a.shape", torch.ones(1))])
    assert expand(untouched, type("Config", (), {"quantization_config": other})()) is untouched


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (scheme(3), "marlin-24 with 3 bits"),
        (scheme(4, group_size=64), "group_size 64"),
        (scheme(8, PER_TOKEN), "quantized activations; expected integers of 4 or 8 bits"),
    ],
)
def test_what_marlin_24_never_had_is_refused(group: dict[str, Any], message: str) -> None:
    plugin.register()
    with pytest.raises(ParetoError, match=message):
        get_quantization_config(SPARSE).from_config({**BASE, "format": "marlin-24", "config_groups": group})
