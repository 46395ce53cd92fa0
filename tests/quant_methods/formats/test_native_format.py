"""The format of ours: planes and layers read back exactly, and what is damaged is refused in one line."""

import dataclasses
import json

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.formats.flat_form import flat_form
from quant_methods.formats.form import Form, form_of
from quant_methods.formats.native_format import NativeConfig, local_tensors, pack, unpack
from quant_methods.formats.parts.columns import ColumnsForm
from quant_methods.formats.parts.grid_codes import GridForm
from quant_methods.formats.parts.low_rank import LowRankForm
from quant_methods.formats.parts.planes import PLANES, pack_codes, unpack_codes
from quant_methods.formats.parts.single_weights import SparseForm
from quant_methods.formats.parts.table_codes import TableForm
from quant_methods.formats.quantized import QuantizedLinear
from tests.quant_methods.random_layers import random_layer

FORMS = [
    flat_form(3, 32, symmetric=False),
    flat_form(6, 64, activations="int6"),
    flat_form(2, -1, symmetric=False, rank=3),
    flat_form(3, table=True, sparse=True),
    flat_form(7, table=True, columns=2),
    flat_form(5, 32, columns=3, column_bits=8, sparse=True, rank=1),
    flat_form(8, -1, columns=4, activations="int8"),
    flat_form(7, 128, symmetric=False, sparse=True),
    flat_form(4, 64),
]


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 32), (7, 32), (33, 96), (256, 160)])
def test_codes_survive_their_planes(bits: int, rows: int, inputs: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, inputs), dtype=torch.uint8)
    codes[0, :2] = torch.tensor([0, (1 << bits) - 1])
    planes = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(planes, bits), codes)
    assert [tuple(words.shape) for words in planes.values()] == [(rows, inputs * width // 32) for width in PLANES[bits]]
    assert sum(words.numel() * 32 for words in planes.values()) == rows * inputs * bits, "not a bit is wasted"


@pytest.mark.parametrize("bits", PLANES)
def test_every_code_at_every_place(bits: int) -> None:
    # Each row holds one value everywhere, and the rows after it a single other value at one of 32 places.
    values = torch.arange(1 << bits, dtype=torch.uint8)[:, None].expand(-1, 32).clone()
    assert torch.equal(unpack_codes(pack_codes(values, bits), bits), values)
    single = torch.zeros((32, 32), dtype=torch.uint8).fill_diagonal_((1 << bits) - 1)
    assert torch.equal(unpack_codes(pack_codes(single, bits), bits), single)


@pytest.mark.parametrize("bits", PLANES)
def test_planes_are_laid_out_as_documented(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 64), dtype=torch.uint8)
    planes = pack_codes(codes, bits)
    for row, column in [(0, 0), (1, 5), (2, 31), (0, 32), (1, 63)]:
        code, shift = 0, 0
        for width in PLANES[bits]:
            bit = column * width
            word = planes[width][row, bit // 32].item() & 0xFFFFFFFF
            code |= ((word >> (bit % 32)) & ((1 << width) - 1)) << shift
            shift += width
        assert code == codes[row, column]
    assert all(words.dtype == torch.int32 for words in planes.values())


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rows", [1, 48, 70])
def test_a_layer_survives_storage(form: Form, rows: int) -> None:
    linear = random_layer(form, rows, 256)
    stored = pack("a.b", linear)
    assert all(tensor.is_contiguous() for tensor in stored.values())
    own = local_tensors("a.b", stored | {"a.b.bias": torch.zeros(rows), "a.bc.weight_scale": torch.zeros(1)})
    assert form_of({name: tuple(t.shape) for name, t in own.items()}, form.activations) == form
    wanted = form.tensors(rows, 256)
    assert own.keys() == wanted.keys()
    assert all(tensor.dtype == (wanted[name].dtype or torch.bfloat16) for name, tensor in own.items())
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    assert form.stored_bits(shapes) == 8 * sum(tensor.numel() * tensor.element_size() for tensor in own.values())
    back = unpack("a.b", own, form)
    assert torch.equal(back.read(), linear.read())
    assert torch.equal(back.read_bulk(), linear.read_bulk())
    assert torch.equal(back.bulk.codes, linear.bulk.codes)


def test_one_group_is_one_scale_per_channel() -> None:
    """A group as wide as the layer and a whole row are the same thing, and read as the same form."""
    linear = random_layer(flat_form(3, 64), 4, 64)
    own = local_tensors("a", pack("a", linear))
    assert form_of({name: tuple(t.shape) for name, t in own.items()}, "none") == flat_form(3, -1)


def test_what_does_not_fit_is_refused() -> None:
    linear = random_layer(flat_form(4, -1), 4, 64)
    with pytest.raises(ParetoError, match="a: codes that do not fit into 3 bits"):
        pack("a", QuantizedLinear(dataclasses.replace(linear.bulk, bits=3)))
    with pytest.raises(ParetoError, match="a: 48 input channels; this format holds multiples of 32"):
        pack("a", random_layer(flat_form(4, -1), 4, 48))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_damaged_layer_is_one_line(form: Form) -> None:
    own = local_tensors("a", pack("a", random_layer(form, 8, 256)))
    for missing in own:
        with pytest.raises(ParetoError, match=f"the checkpoint lacks a.{missing}$"):
            unpack("a", {name: tensor for name, tensor in own.items() if name != missing}, form)
        shorter = own | {missing: own[missing][:0]}
        if -1 not in form.tensors(8, 256)[missing].shape:
            with pytest.raises(ParetoError, match=r"is \[.*\], expected \[.*\]; the checkpoint is damaged"):
                unpack("a", shorter, form)
        other = own[missing].int() if own[missing].is_floating_point() else own[missing].double()
        with pytest.raises(ParetoError, match=rf"a\.{missing} is torch.*, expected .*; the checkpoint is damaged"):
            unpack("a", own | {missing: other}, form)
    with pytest.raises(ParetoError, match=r"has a\.g_idx, which its quantization_config does not speak of"):
        unpack("a", own | {"g_idx": torch.zeros(1)}, form)


def test_the_config_survives_json() -> None:
    config = NativeConfig({f"m.{i}": form for i, form in enumerate([*FORMS, FORMS[0]])}, ("lm_head",))
    data = json.loads(json.dumps(config.to_dict()))
    assert NativeConfig.parse(data) == config
    assert len(data["groups"]) == len(FORMS)
    assert data["groups"][0]["targets"] == ["m.0", f"m.{len(FORMS)}"]


G = {"part": "grid", "bits": 3}


def of(*parts: dict, **others: object) -> dict:
    """One group of one layer with these parts."""
    return {"groups": [{"parts": list(parts), "targets": ["a"], **others}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version 3 of the format; this vllm-pareto reads versions 1 and 2: compress the model again"),
        ({"version": True}, "version True of the format"),
        ({"version": None}, "version None of the format"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq', expected 'pareto'"),
        ({"groups": {}}, "groups: expected a list of mappings"),
        ({"ignore": "lm_head"}, "ignore: expected a list of module names"),
        ({"groups": [{"parts": [G]}]}, "group 0: targets: expected a list"),
        ({"groups": [{"targets": ["a"]}]}, "group 0: parts: expected a list of mappings with the key 'part'"),
        ({"groups": [{"parts": [{"bits": 3}], "targets": ["a"]}]}, "expected a list of mappings with the key 'part'"),
        (
            of({"part": "masks"}),
            "group 0: part 'masks' is unknown .* knows grid, table, .*; install the vllm-pareto that",
        ),
        (of({"part": ["grid"]}), r"part \['grid'\] is unknown"),
        (of(), r"group 0: parts are none; expected exactly one .* whole weight \(grid, table, .*semi.*, bitmap\)"),
        (of(G, {"part": "table", "bits": 3}), "parts are grid, table; expected exactly one"),
        (of(G, {"part": "sparse"}, {"part": "sparse"}), "part 'sparse' is there twice"),
        (of({"part": "grid"}), "group 0: grid: bits is missing"),
        (of({"part": "grid", "bits": 9}), "grid: bits is 9, expected one of 2, 3, 4"),
        (of({"part": "table", "bits": 8}), "table: bits is 8, expected one of 2, .*, 7$"),
        (of({"part": "grid", "bits": True}), "grid: bits is True, expected int"),
        (of({"part": "grid", "bits": 3, "group_size": 0}), "group_size is 0, expected -1 or a positive number"),
        (of({"part": "table", "bits": 3, "group_size": 32}), "table: unknown key 'group_size'; known: bits"),
        (of({"part": "grid", "bits": 3, "wits": 3}), "grid: unknown key 'wits'; known: bits, group_size, symmetric"),
        (of(G, {"part": "sparse", "n": 3}), "sparse: unknown key 'n'; known: none"),
        (of(G, {"part": "low_rank", "rank": -1}), "low_rank: rank is -1, expected a positive number"),
        (of(G, {"part": "columns", "count": 0}), "columns: count is 0, expected a positive number"),
        (of(G, {"part": "columns", "count": 2, "bits": 4}), "columns: bits is 4, expected one of 8, 16"),
        (of(G, activations="fp8"), "activations is 'fp8', expected one of none, int8, int6"),
        (of(G, activations=["int8"]), r"activations is \['int8'\], expected one of none"),
        (of(G, wits=3), "group 0: unknown key 'wits'; known: activations, parts, targets"),
        ({"groups": [*of(G)["groups"], *of(G)["groups"]]}, "group 1: a is in another group too"),
    ],
)
def test_a_bad_config_is_one_line(change: dict, message: str) -> None:
    data = NativeConfig({"a": flat_form(3)}).to_dict() | change
    with pytest.raises(ParetoError, match=message) as error:
        NativeConfig.parse(data)
    assert "\n" not in str(error.value)


def test_defaults_may_be_left_out_and_parts_come_in_any_order() -> None:
    data = {"quant_method": "pareto", "version": 2} | of({"part": "columns", "count": 2}, G)
    assert NativeConfig.parse(data).forms == {"a": flat_form(3, columns=2)}


@pytest.mark.parametrize(
    ("group", "form"),
    [
        ({"bits": 3}, Form((GridForm(3),))),
        (
            {"bits": 5, "group_size": 32, "symmetric": False, "table": False, "columns": 3, "column_bits": 8,
             "sparse": True, "rank": 2, "activations": "int8"},
            Form((GridForm(5, 32, False), ColumnsForm(3, 8), SparseForm(), LowRankForm(2)), "int8"),
        ),
        ({"bits": 4, "table": True, "sparse": True}, Form((TableForm(4), SparseForm()))),
    ],
    ids=str,
)  # fmt: skip
def test_the_flat_records_of_version_1_are_still_read(group: dict, form: Form) -> None:
    data = {"quant_method": "pareto", "version": 1, "groups": [group | {"targets": ["a"]}]}
    assert NativeConfig.parse(data).forms == {"a": form}


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({}, "group 0: bits is missing"),
        ({"bits": 9}, "bits is 9, expected one of 2, 3, 4"),
        ({"bits": 8, "table": True}, "bits is 8, expected one of 2, .*, 7$"),
        ({"bits": 3, "table": 1}, "group 0: table is 1, expected bool"),
        ({"bits": 3, "table": True, "group_size": 32}, "group_size is 32, expected -1 with a table"),
        ({"bits": 3, "rank": -1}, "rank is -1, expected a positive number"),
        ({"bits": 3, "columns": 2, "column_bits": 4}, "expected one of 8, 16"),
        ({"bits": 3, "wits": 3}, "unknown key 'wits'; known: activations, bits"),
    ],
)
def test_bad_flat_records_are_one_line_too(group: dict, message: str) -> None:
    data = {"quant_method": "pareto", "version": 1, "groups": [group | {"targets": ["a"]}]}
    with pytest.raises(ParetoError, match=message) as error:
        NativeConfig.parse(data)
    assert "\n" not in str(error.value)
