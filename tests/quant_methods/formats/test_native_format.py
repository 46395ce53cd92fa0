"""The format of ours: planes and layers read back exactly, and what is damaged is refused in one line."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.formats.native_format import (
    PLANES,
    Form,
    NativeConfig,
    form_of,
    local_tensors,
    pack,
    pack_codes,
    unpack,
    unpack_codes,
)
from tests.quant_methods.random_layers import random_layer

FORMS = [
    Form(3, 32, symmetric=False),
    Form(6, 64, activations="int6"),
    Form(2, -1, symmetric=False, rank=3),
    Form(3, table=True, sparse=True),
    Form(7, table=True, columns=2),
    Form(5, 32, columns=3, column_bits=8, sparse=True, rank=1),
    Form(8, -1, columns=4, activations="int8"),
    Form(7, 128, symmetric=False, sparse=True),
    Form(4, 64),
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
    stored = pack("a.b", linear, form.bits, form.symmetric)
    assert all(tensor.is_contiguous() for tensor in stored.values())
    own = local_tensors("a.b", stored | {"a.b.bias": torch.zeros(rows), "a.bc.weight_scale": torch.zeros(1)})
    assert form_of({name: tuple(t.shape) for name, t in own.items()}, form.activations) == form
    assert own.keys() == form.shapes(rows, 256).keys()
    back = unpack("a.b", own, form)
    assert torch.equal(back.read(), linear.read())
    assert torch.equal(back.bulk(), linear.bulk())
    assert torch.equal(back.codes, linear.codes)


def test_one_group_is_one_scale_per_channel() -> None:
    """A group as wide as the layer and a whole row are the same thing, and read as the same form."""
    linear = random_layer(Form(3, 64), 4, 64)
    own = local_tensors("a", pack("a", linear, 3, True))
    assert form_of({name: tuple(t.shape) for name, t in own.items()}, "none") == Form(3, -1)


def test_what_does_not_fit_is_refused() -> None:
    linear = random_layer(Form(4, -1), 4, 64)
    with pytest.raises(ParetoError, match="a: its codes do not fit into 3 bits"):
        pack("a", linear, 3, True)
    with pytest.raises(ParetoError, match="a has 48 input channels; this format holds multiples of 32"):
        pack("a", random_layer(Form(4, -1), 4, 48), 4, True)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_damaged_layer_is_one_line(form: Form) -> None:
    own = local_tensors("a", pack("a", random_layer(form, 8, 256), form.bits, form.symmetric))
    for missing in own:
        with pytest.raises(ParetoError, match=f"the checkpoint lacks a.{missing}$"):
            unpack("a", {name: tensor for name, tensor in own.items() if name != missing}, form)
        shorter = own | {missing: own[missing][:0]}
        if -1 not in form.shapes(8, 256)[missing]:
            with pytest.raises(ParetoError, match=r"is \[.*\], expected \[.*\]; the checkpoint is damaged"):
                unpack("a", shorter, form)
    with pytest.raises(ParetoError, match=r"has a\.g_idx, which its quantization_config does not speak of"):
        unpack("a", own | {"g_idx": torch.zeros(1)}, form)


def test_the_config_survives_json() -> None:
    config = NativeConfig({f"m.{i}": form for i, form in enumerate([*FORMS, FORMS[0]])}, ("lm_head",))
    data = json.loads(json.dumps(config.to_dict()))
    assert NativeConfig.parse(data) == config
    assert len(data["groups"]) == len(FORMS)
    assert data["groups"][0]["targets"] == ["m.0", f"m.{len(FORMS)}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 of the format; this vllm-pareto reads version 1"),
        ({"version": None}, "version None of the format"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq', expected 'pareto'"),
        ({"groups": {}}, "groups: expected a list of mappings"),
        ({"ignore": "lm_head"}, "ignore: expected a list of module names"),
        ({"groups": [{"targets": ["a"]}]}, "group 0: bits is missing"),
        ({"groups": [{"bits": 3}]}, "group 0: targets: expected a list"),
        ({"groups": [{"bits": 9, "targets": ["a"]}]}, "bits is 9, expected one of 2, 3, 4"),
        ({"groups": [{"bits": 8, "table": True, "targets": ["a"]}]}, "bits is 8, expected one of 2, .*, 7$"),
        ({"groups": [{"bits": True, "targets": ["a"]}]}, "bits is True, expected int"),
        ({"groups": [{"bits": 3, "group_size": 0, "targets": ["a"]}]}, "group_size is 0, expected -1 or a positive"),
        ({"groups": [{"bits": 3, "table": True, "group_size": 32, "targets": ["a"]}]}, "expected -1 with a table"),
        ({"groups": [{"bits": 3, "rank": -1, "targets": ["a"]}]}, "cannot be negative"),
        ({"groups": [{"bits": 3, "activations": "fp8", "targets": ["a"]}]}, "expected one of none, int8, int6"),
        ({"groups": [{"bits": 3, "column_bits": 4, "targets": ["a"]}]}, "expected one of 8, 16"),
        ({"groups": [{"bits": 3, "wits": 3, "targets": ["a"]}]}, "unknown key 'wits'; known: activations, bits"),
        ({"groups": [{"bits": 3, "targets": ["a"]}, {"bits": 4, "targets": ["a"]}]}, "a is in another group too"),
    ],
)
def test_a_bad_config_is_one_line(change: dict, message: str) -> None:
    data = NativeConfig({"a": Form(3)}).to_dict() | change
    with pytest.raises(ParetoError, match=message) as error:
        NativeConfig.parse(data)
    assert "\n" not in str(error.value)


def test_defaults_may_be_left_out(tmp_path: Path) -> None:
    data = {"quant_method": "pareto", "version": 1, "groups": [{"bits": 3, "targets": ["a"]}]}
    assert NativeConfig.parse(data).forms == {"a": Form(3)}
    assert dataclasses.asdict(Form(3))["activations"] == "none"
