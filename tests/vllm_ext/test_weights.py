"""vLLM's linear layers in the format of ours, on fake ranks: what they compute together is the reference's product."""

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora.layers.utils import _get_lora_device
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.quantization import get_quantization_config

from kv_cache.errors import ParetoError
from quant_methods.formats.flat_form import flat_form
from quant_methods.formats.form import ACTIVATION_BITS, Form
from quant_methods.formats.grid import round_tokens
from quant_methods.formats.native_format import NativeConfig, local_tensors, pack
from quant_methods.formats.parts.bitmap_codes import BitmapForm
from quant_methods.formats.parts.columns import Columns
from quant_methods.formats.parts.low_rank import LowRankForm
from quant_methods.formats.parts.part import Draw
from quant_methods.formats.parts.single_weights import Sparse
from quant_methods.formats.quantized import QuantizedLinear
from tests.quant_methods.random_layers import random_layer
from vllm_ext import plugin
from vllm_ext.weights_config import ParetoConfig

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
FORMS = [
    flat_form(2, 32, symmetric=False),
    flat_form(3, 32, symmetric=False, columns=3, rank=2),
    flat_form(3, 64, activations="int6"),
    flat_form(4, 32, sparse=True, columns=2, column_bits=8),
    flat_form(4, table=True, sparse=True, columns=3),
    flat_form(5, 32, symmetric=False),
    flat_form(6, 64, activations="int8", columns=2),
    flat_form(7, table=True, activations="int6", columns=2),
    flat_form(8, -1, activations="int8"),
    flat_form(8, -1, activations="int8", columns=4, rank=1),
    flat_form(8, -1, symmetric=False, sparse=True),
    Form((BitmapForm(4, 64, symmetric=False), LowRankForm(2))),
    Form((BitmapForm(4),), "int8"),
]


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What an engine sets up around loading: a configuration, the default dtype, bfloat16 arithmetic as asked for."""
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    # Linux lets a process use AMX's tiles once it has asked; PyTorch's kernels ask, vLLM's rely on it.
    torch.cpu._init_amx()
    torch.set_default_dtype(torch.bfloat16)
    on_rank(monkeypatch, 0, 1)
    with set_current_vllm_config(VllmConfig()):
        yield
    torch.set_default_dtype(torch.float32)


def on_rank(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    for module in (vllm_linear, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)


def config_of(forms: dict[str, Form]) -> ParetoConfig:
    config = ParetoConfig.from_config(NativeConfig(forms).to_dict())
    config.packed_modules_mapping = FUSED
    return config


def load(layer: torch.nn.Module, shard: Any, linear: QuantizedLinear) -> None:
    for local, tensor in local_tensors("a", pack("a", linear)).items():
        parameter = getattr(layer, local)
        assert parameter.dtype == tensor.dtype, local
        parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))


def finished(layer: torch.nn.Module) -> torch.nn.Module:
    layer.quant_method.process_weights_after_loading(layer)
    assert {name for name, _ in layer.named_parameters(recurse=False)} <= {"bias"}
    # Every layer takes LoRA adapters, which lie where it does.
    assert _get_lora_device(layer) == torch.device("cpu")
    return layer


def expected(linear: QuantizedLinear, form: Form, x: torch.Tensor) -> torch.Tensor:
    """Return what the format says that a layer computes, in float64."""
    bits, apart = ACTIVATION_BITS[form.activations], linear.apart()
    bulk, x = linear.read_bulk().double(), x.double()
    if bits is None:
        return x @ linear.read().double().T
    rounded = x.clone()
    if apart is not None:
        rounded[:, apart] = 0
    return round_tokens(rounded, bits) @ bulk.T + x @ (linear.read().double() - bulk).T


def close(y: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Outputs are about 1; bfloat16 arithmetic is off by some 2^-8 of that."""
    error = (y.double() - wanted).norm() / wanted.norm()
    return bool(error < 0.012)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_merged_column_parallel(form: Form, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [random_layer(form, 128, 128, seed) for seed in range(2)]
    config = config_of({"mlp.gate_proj": form, "mlp.up_proj": form})
    # The second call has more tokens than the sparse part multiplies one weight at a time.
    for tokens in (5, 40):
        x = torch.randn(tokens, 128, dtype=torch.bfloat16)
        whole = [expected(part, form, x).chunk(ranks, 1) for part in parts]
        for rank in range(ranks):
            on_rank(monkeypatch, rank, ranks)
            layer = vllm_linear.MergedColumnParallelLinear(
                128, [128, 128], bias=False, quant_config=config, prefix="mlp.gate_up_proj"
            )
            for shard, part in enumerate(parts):
                load(layer, shard, part)
            y = finished(layer).quant_method.apply(layer, x)
            assert close(y, torch.cat([part[rank] for part in whole], 1))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_row_parallel(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank rounds its own inputs, as vLLM's int8 layers do."""
    linear = random_layer(form, 64, 256)
    x = torch.randn(7, 256, dtype=torch.bfloat16)
    total = torch.zeros(7, 64, dtype=torch.float64)
    wanted = torch.zeros(7, 64, dtype=torch.float64)
    from quant_methods.formats.shards import cut

    for rank in range(2):
        on_rank(monkeypatch, rank, 2)
        layer = vllm_linear.RowParallelLinear(
            256, 64, bias=False, quant_config=config_of({"down": form}), prefix="down"
        )
        load(layer, None, linear)
        here = x[:, 128 * rank : 128 * (rank + 1)].contiguous()
        total += finished(layer).quant_method.apply(layer, here).double()
        wanted += expected(cut(linear, (0, 64), (128 * rank, 128 * (rank + 1))), form, here)
    assert close(total, wanted)
    if form.activations == "none":
        assert torch.allclose(wanted, x.double() @ linear.read().double().T, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_attention_heads(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four query heads on two key heads, with a bias; on four ranks two share each key head."""
    form = flat_form(3, 32, symmetric=False, columns=2, sparse=True)
    sizes = {"q": 128, "k": 64, "v": 64}
    parts = {shard: random_layer(form, rows, 64, seed) for seed, (shard, rows) in enumerate(sizes.items())}
    biases = {shard: torch.randn(rows, dtype=torch.bfloat16) for shard, rows in sizes.items()}
    config = config_of({f"attn.{shard}_proj": form for shard in sizes})
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        layer = vllm_linear.QKVParallelLinear(64, 32, 4, 2, bias=True, quant_config=config, prefix="attn.qkv_proj")
        for shard, part in parts.items():
            load(layer, shard, part)
            layer.bias.weight_loader(layer.bias, biases[shard], shard)
        y = finished(layer).quant_method.apply(layer, x, layer.bias)
        key = rank * 2 // ranks if ranks > 1 else 0
        heads = {"q": slice(128 // ranks * rank, 128 // ranks * (rank + 1))}
        width = max(32, 64 // ranks)
        heads["k"] = heads["v"] = slice(key * 32, key * 32 + width)
        wanted = [(expected(parts[s], form, x) + biases[s].double())[:, heads[s]] for s in sizes]
        assert close(y, torch.cat(wanted, 1))


def test_merged_layers_may_be_stored_differently() -> None:
    forms = {"mlp.gate_proj": flat_form(3, 32, rank=2), "mlp.up_proj": flat_form(6, 64, symmetric=False, columns=2)}
    parts = [random_layer(form, 64, 128, seed) for seed, form in enumerate(forms.values())]
    layer = vllm_linear.MergedColumnParallelLinear(
        128, [64, 64], bias=False, quant_config=config_of(forms), prefix="mlp.gate_up_proj"
    )
    for shard, part in enumerate(parts):
        for local, tensor in local_tensors("a", pack("a", part)).items():
            getattr(layer, local).weight_loader(getattr(layer, local), tensor, shard)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    wanted = [expected(part, form, x) for part, form in zip(parts, forms.values(), strict=True)]
    assert close(finished(layer).quant_method.apply(layer, x), torch.cat(wanted, 1))


def test_layers_merged_on_disk_are_cut_like_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    form = flat_form(4, 32, symmetric=False, rank=1)
    whole = random_layer(form, 256, 64)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    wanted = expected(whole, form, x)
    for rank in range(2):
        on_rank(monkeypatch, rank, 2)
        config = config_of({"attn.qkv_proj": form})
        layer = vllm_linear.QKVParallelLinear(64, 32, 4, 2, bias=False, quant_config=config, prefix="attn.qkv_proj")
        load(layer, None, whole)
        y = finished(layer).quant_method.apply(layer, x)
        at = [*range(64 * rank, 64 * rank + 64), *range(128 + 32 * rank, 160 + 32 * rank)]
        at += range(192 + 32 * rank, 224 + 32 * rank)
        assert close(y, wanted[:, at])


def test_what_is_missing_or_cut_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    form = flat_form(3, 128, rank=1)
    on_rank(monkeypatch, 0, 4)
    layer = vllm_linear.RowParallelLinear(256, 64, bias=False, quant_config=config_of({"down": form}), prefix="down")
    with pytest.raises(ParetoError, match=r"the checkpoint lacks down\.low_rank_down"):
        finished(layer)
    layer = vllm_linear.RowParallelLinear(256, 64, bias=False, quant_config=config_of({"down": form}), prefix="down")
    load(layer, None, random_layer(form, 64, 256))
    with pytest.raises(ParetoError, match="inside its groups of 128; use fewer ranks"):
        finished(layer)
    with pytest.raises(ParetoError, match=r"mlp\.up_proj is quantized and mlp\.gate_proj is not"):
        vllm_linear.MergedColumnParallelLinear(
            128, [64, 64], bias=False, quant_config=config_of({"mlp.up_proj": form}), prefix="mlp.gate_up_proj"
        )


def test_what_is_not_in_the_config_stays_as_it_is() -> None:
    layer = vllm_linear.RowParallelLinear(
        64, 64, bias=False, quant_config=config_of({"x": flat_form(3)}), prefix="down"
    )
    assert isinstance(layer.quant_method, vllm_linear.UnquantizedLinearMethod)
    assert config_of({"x": flat_form(3)}).get_quant_method(torch.nn.Embedding(2, 2), "lm_head") is None


def test_the_plugin_registers_the_format_and_doing_so_twice_changes_nothing() -> None:
    plugin.register()
    plugin.register()
    assert get_quantization_config("pareto") is ParetoConfig
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    assert QUANTIZATION_METHODS.count("pareto") == 1


@pytest.mark.parametrize("form", FORMS[1:5:3], ids=str)
def test_it_compiles_without_a_break(form: Form) -> None:
    """One graph, the same numbers; the sparse part is an operator that the compiler does not look into."""
    linear = random_layer(form, 64, 128)
    layer = vllm_linear.ReplicatedLinear(128, 64, bias=False, quant_config=config_of({"a": form}), prefix="a")
    load(layer, None, linear)
    finished(layer)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: layer.quant_method.apply(layer, x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer.quant_method.apply(layer, x))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_random_weights_of_a_shape(form: Form) -> None:
    config = VllmConfig()
    config.load_config.load_format = "dummy"
    with set_current_vllm_config(config):
        layer = vllm_linear.MergedColumnParallelLinear(
            128, [128, 64], bias=False, quant_config=config_of({"mlp.gate_proj": form, "mlp.up_proj": form}),
            prefix="mlp.gate_up_proj",
        )  # fmt: skip
        y = finished(layer).quant_method.apply(layer, torch.randn(3, 128, dtype=torch.bfloat16))
    assert y.shape == (3, 192)
    assert 0 < y.float().abs().max() < 1


def test_dummy_channels_are_those_of_the_layer_whatever_the_default_dtype() -> None:
    """bfloat16, PyTorch's default while an engine loads, has not all integers above 256."""
    draw = Draw(1e-3, torch.bfloat16, torch.device("cpu"))
    layer = flat_form(4, columns=41, sparse=True).random(3, 4096, draw)
    columns, sparse = layer.part(Columns), layer.part(Sparse)
    for index in (columns.index, sparse.columns[: sparse.starts[1]]):
        assert index.min() >= 0
        assert index.max() < 4096
        assert (index.diff() > 0).all()
