"""Every part has kernels or is refused in one line; a new part is served once it has some."""

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear

from kv_cache.errors import ParetoError
from quant_methods.formats.form import Form
from quant_methods.formats.parts.bitmap_codes import BitmapForm
from quant_methods.formats.parts.columns import ColumnsForm
from quant_methods.formats.parts.grid_codes import GridForm
from quant_methods.formats.parts.low_rank import LowRankForm
from quant_methods.formats.parts.part import Draw
from quant_methods.formats.parts.registry import FORMS
from quant_methods.formats.parts.semi_sparse import SemiSparseForm
from quant_methods.formats.parts.single_weights import SparseForm
from quant_methods.formats.parts.table_codes import TableForm
from quant_methods.formats.parts.trellis_codes import TrellisForm
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.kernels.beside import Beside
from tests.quant_methods.toy_part import AddOffsets, Offsets, OffsetsForm
from tests.vllm_ext.test_weights import close, config_of, engine, finished, load, on_rank  # noqa: F401  # a fixture
from vllm_ext import bulk
from vllm_ext.bulk import MixedBulk
from vllm_ext.part_kernels import KERNELS, kernels_for
from vllm_ext.served_linear import ServedLinear, serve

DRAW = Draw(0.1, torch.bfloat16, torch.device("cpu"))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, Offsets.kind, OffsetsForm)


def served(linear: QuantizedLinear) -> ServedLinear:
    return ServedLinear(linear, "none", torch.bfloat16)


def test_every_part_of_the_format_has_kernels_on_cpus_and_gpus() -> None:
    ours = {form.part for form in FORMS.values()} - {Offsets}
    assert set(KERNELS) == ours
    assert all(set(kernels) == {"cpu", "cuda"} for kernels in KERNELS.values())


def test_an_unknown_part_is_one_line() -> None:
    linear = Form((GridForm(4, 32), OffsetsForm())).random(64, 128, DRAW)
    message = (
        r"^nothing multiplies by a weight's 'offsets' part \(offsets of rows\); parts that are served: grid, table, .*$"
    )
    with pytest.raises(ParetoError, match=message):
        served(linear)
    # Already when a layer is built, before its weights are read.
    config = config_of({"a": Form((GridForm(4, 32), OffsetsForm()))})
    with pytest.raises(ParetoError, match=message):
        vllm_linear.ReplicatedLinear(128, 64, bias=False, quant_config=config, prefix="a")


@pytest.mark.parametrize(
    "part",
    [GridForm(4), TableForm(3), SemiSparseForm(4), ColumnsForm(2), SparseForm(), LowRankForm(1)],
    ids=lambda part: part.part.kind,
)
def test_a_device_without_kernels_is_one_line(part: Any) -> None:
    own = part.random(8, 64, DRAW)
    with pytest.raises(
        ParetoError, match=rf"^a weight's '{own.kind}' part .* has no kernel on xpu; it has on cpu, cuda$"
    ):
        kernels_for(own, torch.device("xpu"))


def test_the_kernels_beside_a_bulk_refuse_a_part_that_they_do_not_add() -> None:
    with pytest.raises(ParetoError, match="offsets of rows: the kernels beside a bulk add columns"):
        Beside([Offsets(torch.zeros(4))], torch.bfloat16)


def test_a_trellis_code_is_dequantized_on_a_cpu_and_stacked_if_its_tiles_are_full() -> None:
    form = Form((TrellisForm(3, 64),))
    layers = [form.random(rows, 128, DRAW) for rows in (64, 32, 40, 64)]
    parts = serve(layers, ["none"] * 4, torch.bfloat16)
    assert len(parts) == 3, "40 rows do not fill their tiles, and begin and end a layer"
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    found = torch.cat([part(x) for part in parts], 1)
    assert close(found, x.double() @ torch.cat([layer.read() for layer in layers]).double().T)


def test_2_of_4_codes_are_dequantized_on_a_cpu_and_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(bulk.logger, "warning_once", lambda line, *values: said.append(line % values))
    linear = Form((SemiSparseForm(4, 32, symmetric=False),)).random(64, 128, DRAW)
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    assert close(served(linear)(x), x.double() @ linear.read().double().T)
    assert said == ["4-bit 2:4 weights have no CPU kernel: dequantized to torch.bfloat16 at load"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_2_of_4_codes_are_loaded_cut_and_merged_by_vllm(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    form = Form((SemiSparseForm(4, 32, symmetric=False), LowRankForm(2)))
    layers, x = [form.random(64, 128, DRAW) for _ in range(2)], torch.randn(5, 128, dtype=torch.bfloat16)
    config = config_of({"mlp.gate_proj": form, "mlp.up_proj": form, "mlp.down_proj": form})
    wanted = [x.double() @ layer.read().double().T for layer in layers]
    added = 0
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        merged = vllm_linear.MergedColumnParallelLinear(
            128, [64, 64], bias=False, quant_config=config, prefix="mlp.gate_up_proj"
        )
        for shard, layer in enumerate(layers):
            load(merged, shard, layer)
        y = finished(merged).quant_method.apply(merged, x)
        assert close(y, torch.cat([part.chunk(ranks, 1)[rank] for part in wanted], 1))
        # Of a layer that is cut along its inputs, what the ranks find is added up.
        row = vllm_linear.RowParallelLinear(
            128, 64, bias=False, quant_config=config, prefix="mlp.down_proj", reduce_results=False
        )
        load(row, None, layers[0])
        added = added + finished(row).quant_method.apply(row, x.chunk(ranks, 1)[rank].contiguous()).double()
    assert close(added, wanted[0])


def test_on_a_cpu_codes_with_a_bitmap_are_codes_on_a_grid() -> None:
    form = Form((BitmapForm(4, 64, symmetric=False), LowRankForm(2)))
    layers = [form.random(rows, 128, DRAW) for rows in (64, 32)]
    (part,) = serve(layers, ["none"] * 2, torch.bfloat16)
    assert isinstance(part.bulk, MixedBulk), "what vLLM serves dense 4 bits with"
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    assert close(part(x), x.double() @ torch.cat([layer.read() for layer in layers]).double().T)


@pytest.mark.parametrize("others", [(), (ColumnsForm(3), SparseForm(), LowRankForm(2))], ids=["alone", "with others"])
def test_a_new_part_is_served_once_it_has_kernels(others: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, Offsets, {"cpu": AddOffsets})
    form = Form((GridForm(4, 32, symmetric=False), *others, OffsetsForm()))
    layers = [form.random(64, 128, DRAW), Form(form.parts[:-1]).random(32, 128, DRAW)]
    parts = serve(layers, ["none"] * 2, torch.bfloat16)
    assert len(parts) == 1, "they are stacked, though only one has offsets"
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    wanted = x.double() @ torch.cat([layer.read() for layer in layers]).double().T
    assert close(parts[0](x), wanted)
    # Without the part it is another layer.
    assert not close(served(layers[0].having(Offsets(torch.zeros(64))))(x), wanted[:, :64])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_new_part_is_loaded_cut_and_merged_by_vllm(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, Offsets, {"cpu": AddOffsets})
    form = Form((GridForm(4, 32, symmetric=False), OffsetsForm()))
    layers, x = [form.random(64, 128, DRAW) for _ in range(2)], torch.randn(5, 128, dtype=torch.bfloat16)
    config = config_of({"mlp.gate_proj": form, "mlp.up_proj": form})
    wanted = [(x.double() @ layer.read().double().T).chunk(ranks, 1) for layer in layers]
    for rank in range(ranks):
        on_rank(monkeypatch, rank, ranks)
        merged = vllm_linear.MergedColumnParallelLinear(
            128, [64, 64], bias=False, quant_config=config, prefix="mlp.gate_up_proj"
        )
        for shard, layer in enumerate(layers):
            load(merged, shard, layer)
        y = finished(merged).quant_method.apply(merged, x)
        assert close(y, torch.cat([part[rank] for part in wanted], 1))
    dummy = VllmConfig()
    dummy.load_config.load_format = "dummy"
    with set_current_vllm_config(dummy):
        merged = vllm_linear.MergedColumnParallelLinear(
            128, [64, 64], bias=False, quant_config=config, prefix="mlp.gate_up_proj"
        )
        y = finished(merged).quant_method.apply(merged, x)
    assert 0 < y.float().abs().max() < 1
