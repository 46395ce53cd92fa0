"""Every part means what its formula says, survives storage, and is cut and stacked as the weight is.

One that only the tests know shows that a new part needs nothing but its file and an entry in the registry.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.formats.form import Form, form_of
from quant_methods.formats.native_format import NativeConfig, local_tensors, pack, unpack
from quant_methods.formats.parts.bitmap_codes import BitmapCodes, BitmapForm
from quant_methods.formats.parts.columns import Columns, ColumnsForm
from quant_methods.formats.parts.grid_codes import GridCodes, GridForm
from quant_methods.formats.parts.low_rank import LowRank, LowRankForm
from quant_methods.formats.parts.part import Addition, BulkForm, Draw, Part, PartForm
from quant_methods.formats.parts.registry import FORMS
from quant_methods.formats.parts.semi_sparse import SemiSparseCodes, SemiSparseForm
from quant_methods.formats.parts.single_weights import Sparse, SparseForm
from quant_methods.formats.parts.table_codes import TableCodes, TableForm
from quant_methods.formats.parts.trellis import pair_values
from quant_methods.formats.parts.trellis_codes import TrellisCodes, TrellisForm
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.formats.shards import cut, stack
from quant_methods.handlers import HANDLERS, Handler, LinearProblem
from quant_methods.recipe import Calibration, Recipe
from tests.quant_methods.random_layers import Parts, quantize
from tests.quant_methods.toy_part import Offsets, OffsetsForm

ROWS, INPUTS = 56, 128
TILE = 32
"""Rows in which all parts can be cut."""


def spread(per_group: Tensor) -> Tensor:
    return per_group.double().repeat_interleave(INPUTS // per_group.shape[1], 1)


def columns_mean(part: Columns) -> Tensor:
    weight = torch.zeros(ROWS, INPUTS, dtype=torch.float64)
    scale = 1 if part.scale is None else part.scale.double()[:, None]
    weight[:, part.index.long()] = part.weight.double() * scale
    return weight


def sparse_means(part: Sparse) -> Tensor:
    weight = torch.zeros(ROWS, INPUTS, dtype=torch.float64)
    for row in range(ROWS):
        for at in range(int(part.starts[row]), int(part.starts[row + 1])):
            weight[row, int(part.columns[at])] += part.values[at].double()
    return weight


def trellis_means(part: TrellisCodes) -> Tensor:
    weight, bits = torch.zeros(64, INPUTS, dtype=torch.float64), part.bits
    for tile_row, along in enumerate(part.words.tolist()):
        for tile, words in enumerate(along):
            stream = sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(words))
            stream |= stream << 256 * bits
            for pair in range(128):
                row, channel = 32 * tile_row + pair // 4, 8 * tile + pair % 4 * 2
                weight[row, channel : channel + 2] = pair_values()[stream >> 2 * bits * pair & 0xFFFF]
    return weight[:ROWS] * spread(part.scale)


def semi_sparse_means(part: SemiSparseCodes) -> Tensor:
    weight = torch.zeros(ROWS, INPUTS, dtype=torch.float64)
    zero, scale = spread(part.zero_point), spread(part.scale)
    for row in range(ROWS):
        for four in range(INPUTS // 4):
            nibble = int(part.places[row, four])
            first, second = 4 * four + nibble % 4, 4 * four + nibble // 4
            assert first < second
            for nth, channel in enumerate((first, second)):
                code = float(part.codes[row, 2 * four + nth])
                weight[row, channel] = (code - zero[row, channel]) * scale[row, channel]
    return weight


def bitmap_means(part: BitmapCodes) -> Tensor:
    weight, zero = torch.zeros(64, INPUTS, dtype=torch.float64), part.zero_point.double()
    for tile, steps in enumerate(part.bitmap.tolist()):
        # INPUTS channels are a block.
        words = part.kept[part.starts[tile] : part.starts[tile + 1]].flatten().tolist()
        stream = sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(words))
        for step, lanes in enumerate(steps):
            for lane, word in enumerate(lanes):
                for bit in range(32):
                    if word >> bit & 1:
                        row, channel = 32 * tile + lane // 4 + bit // 8 * 8, 32 * step + lane % 4 * 8 + bit % 8
                        z = int(zero[row, channel * zero.shape[1] // INPUTS])
                        code = (stream & 15) ^ (z & 15)
                        weight[row, channel] = (code - 16 if code >= 8 else code) - z
                        stream >>= 4
        assert not stream
    return weight[:ROWS] * spread(part.scale)


MEANING: dict[type[Part], Callable[..., Tensor]] = {
    GridCodes: lambda part: (part.codes.double() - spread(part.zero_point)) * spread(part.scale),
    TableCodes: lambda part: torch.stack([t[c.long()] for t, c in zip(part.table.double(), part.codes, strict=True)]),
    TrellisCodes: trellis_means,
    SemiSparseCodes: semi_sparse_means,
    BitmapCodes: bitmap_means,
    Columns: columns_mean,
    Sparse: sparse_means,
    LowRank: lambda part: part.up.double() @ part.down.double(),
    Offsets: lambda part: part.values.double()[:, None].expand(-1, INPUTS),
}
CASES = [
    GridForm(3, 32, symmetric=False),
    GridForm(6),
    TableForm(4),
    TrellisForm(2),
    TrellisForm(3, 32),
    TrellisForm(4, 64),
    SemiSparseForm(4),
    SemiSparseForm(4, 32, symmetric=False),
    BitmapForm(4),
    BitmapForm(4, 32, symmetric=False),
    ColumnsForm(5),
    ColumnsForm(7, 8),
    SparseForm(),
    LowRankForm(3),
    OffsetsForm(),
]

pytestmark = pytest.mark.usefixtures("fresh_numbers")
each = pytest.mark.parametrize("part", CASES, ids=str)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line that a new part takes beside its file."""
    monkeypatch.setitem(FORMS, Offsets.kind, OffsetsForm)


def form_with(part: PartForm) -> Form:
    return Form((part,) if isinstance(part, BulkForm) else (GridForm(4, 64, symmetric=False), part))


def layer(part: PartForm, rows: int = ROWS) -> QuantizedLinear:
    """A random layer with a part, as ``--load-format dummy`` has it."""
    return form_with(part).random(rows, INPUTS, Draw(0.1, torch.bfloat16, torch.device("cpu")))


def test_every_registered_part_is_among_the_cases() -> None:
    assert {type(case) for case in CASES} == set(FORMS.values())
    assert MEANING.keys() == {form.part for form in FORMS.values()}
    assert all(kind == form.part.kind for kind, form in FORMS.items())


@each
def test_a_part_means_what_its_formula_says(part: PartForm) -> None:
    linear = layer(part)
    own = linear.part(part.part)
    if isinstance(own, Addition):
        weight = torch.randn(ROWS, INPUTS)
        added = weight.clone()
        own.add(added)
        assert torch.allclose(added.double() - weight.double(), MEANING[type(own)](own), atol=1e-6)
        assert torch.allclose((linear.read() - linear.read_bulk()).double(), MEANING[type(own)](own), atol=1e-6)
    else:
        assert torch.allclose(linear.read().double(), MEANING[type(own)](own), atol=1e-6)


@each
def test_without_channels_a_bulk_and_an_addition_still_add_up(part: PartForm) -> None:
    """As they are served where inputs are not rounded: the whole bulk is multiplied by."""
    linear = layer(part)
    for own in linear.additions:
        bulk, corrected = own.take_over(linear.bulk)
        weight = bulk.read()
        corrected.add(weight)
        assert torch.allclose(weight, linear.read(), atol=1e-6)
    if isinstance(part, BulkForm):
        channels = torch.tensor([3, 40, 127])
        bulk, left = linear.bulk.without(channels)
        read, wanted = bulk.read(), linear.read()
        read[:, channels] -= 0 if left is None else left
        wanted[:, channels] = 0
        assert torch.equal(read, wanted)


@each
def test_a_part_survives_storage(part: PartForm) -> None:
    form, linear = form_with(part), layer(part)
    own = local_tensors("a", pack("a", linear))
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    assert form_of(shapes, "none") == form
    assert form.stored_bits(shapes) == 8 * sum(tensor.numel() * tensor.element_size() for tensor in own.values())
    config = NativeConfig.parse(NativeConfig({"a": form}).to_dict())
    back = unpack("a", own, config.forms["a"])
    assert [type(found) for found in back.parts] == [type(found) for found in linear.parts]
    assert torch.equal(back.read(), linear.read())
    for missing in part.tensors(ROWS, INPUTS):
        with pytest.raises(ParetoError, match=f"the checkpoint lacks a.{missing}$"):
            unpack("a", {name: tensor for name, tensor in own.items() if name != missing}, form)


@each
def test_a_part_is_cut_as_the_weight_is(part: PartForm) -> None:
    linear = layer(part)
    weight = linear.read()
    for rows in ((0, ROWS), (0, TILE), (TILE, ROWS)):
        for inputs in ((0, INPUTS), (0, 64), (64, INPUTS)):
            found = cut(linear, rows, inputs)
            assert found.shape == (rows[1] - rows[0], inputs[1] - inputs[0])
            assert torch.allclose(found.read(), weight[slice(*rows), slice(*inputs)], atol=1e-6)


@each
def test_parts_are_stacked_as_weights_are(part: PartForm) -> None:
    layers = [layer(part, 2 * TILE), layer(part, TILE)]
    if not isinstance(part, BulkForm):
        # A layer without, in the middle.
        layers.insert(1, layer(GridForm(4, 64, symmetric=False), 12))
    assert all(one.bulk.stacks_with(layers[0].bulk) for one in layers)
    found = stack(layers)
    assert found.shape == (sum(one.shape[0] for one in layers), INPUTS)
    # Columns that only some keep apart are rounded to 16 bits in the others.
    assert torch.allclose(found.read(), torch.cat([one.read() for one in layers]), atol=2e-3)


@each
def test_output_channels_are_multiplied_and_codes_stay(part: PartForm) -> None:
    before = layer(part, 2 * TILE)
    factors = 0.5 + torch.rand(2 * TILE)
    found, wanted = before.times(factors).read(), factors[:, None] * before.read()
    # What multiplies codes is stored in 16 bits; columns that are apart add to codes that do not mean zero there.
    assert ((found - wanted).norm(dim=1) < 2**-7 * wanted.norm(dim=1)).all()
    for name, value in vars(before.part(part.part)).items():
        if isinstance(value, Tensor) and not value.is_floating_point():
            assert torch.equal(getattr(before.times(factors).part(part.part), name), value)


@each
def test_what_may_be_trained_is_floating_point(part: PartForm) -> None:
    own = layer(part).part(part.part)
    for name in own.learns:
        tensor = getattr(own, name)
        assert tensor is None or tensor.is_floating_point() or name == "weight"
    assert own.learns


@pytest.mark.parametrize(
    ("group_size", "rows", "inputs", "inside"),
    [
        (64, (0, 40), (0, INPUTS), "56 output channels inside a trellis code's tiles of 32; use fewer ranks, or"),
        (64, (8, ROWS), (0, INPUTS), "56 output channels inside a trellis code's tiles of 32; use fewer ranks, or"),
        (64, (0, ROWS), (0, 32), "128 input channels inside its groups of 64; use fewer ranks, or"),
        (-1, (0, ROWS), (4, INPUTS), "128 input channels inside a trellis code's tiles of 8; use fewer ranks, or"),
    ],
)
def test_a_tile_or_a_group_of_a_trellis_is_not_cut(
    group_size: int, rows: tuple[int, int], inputs: tuple[int, int], inside: str
) -> None:
    with pytest.raises(ParetoError, match=f"^tensor parallelism would cut a layer of {inside}"):
        cut(layer(TrellisForm(3, group_size)), rows, inputs)


def test_rows_that_do_not_fill_a_tile_are_not_stacked() -> None:
    part = TrellisForm(3, 64)
    odd, whole = layer(part).bulk, layer(part, 64).bulk
    assert whole.stacks_with(whole)
    assert not whole.stacks_with(layer(TrellisForm(4, 64), 64).bulk)
    assert not whole.stacks_with(layer(TrellisForm(3, 32), 64).bulk)
    assert not odd.stacks_with(whole)
    assert not whole.stacks_with(odd)


@pytest.mark.parametrize(
    ("form", "wrong"),
    [
        (TrellisForm(5), "a: bits is 5, expected one of 2, 3, 4"),
        (TrellisForm(3, 20), "a: group_size is 20, expected -1 or a multiple of 8"),
        (SemiSparseForm(3), "a: bits is 3, expected one of 4"),
        (SemiSparseForm(4, 6), "a: group_size is 6, expected -1 or a multiple of 4"),
    ],
)
def test_settings_that_a_form_has_not_are_one_line(form: PartForm, wrong: str) -> None:
    with pytest.raises(ParetoError, match=f"^{wrong}$"):
        form.check("a")


def pruned_grid(kept: tuple[int, ...], symmetric: bool) -> GridCodes:
    """Codes on a grid of which in each four neighbours as many are not zero as ``kept`` says, in turn."""
    grid = GridForm(4, 32, symmetric=symmetric).random(ROWS, INPUTS, Draw(0.1, torch.bfloat16, torch.device("cpu")))
    zero = grid.zero_point.repeat_interleave(32, 1)
    assert isinstance(grid, GridCodes)
    held = torch.tensor(kept).repeat(ROWS * INPUTS // 4 // len(kept) + 1)[: ROWS * INPUTS // 4].view(ROWS, -1, 1)
    order = torch.rand(ROWS, INPUTS // 4, 4).argsort(-1).argsort(-1)
    other = torch.where(grid.codes == zero, zero + torch.where(zero < 7, 1, -1), grid.codes).to(torch.int8)
    return dataclasses.replace(grid, codes=torch.where((order < held).flatten(1), other, zero))


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_of_which_two_in_four_are_kept_mean_what_the_grid_means(symmetric: bool) -> None:
    grid = pruned_grid((2, 2, 1, 2, 0), symmetric)
    part = SemiSparseCodes.of(grid)
    assert part.codes.shape == (ROWS, INPUTS // 2)
    assert torch.equal(part.read(), grid.read())
    assert torch.equal(semi_sparse_means(part), MEANING[GridCodes](grid))
    stored = sum(tensor.numel() * tensor.element_size() for tensor in part.pack().values())
    dense = sum(tensor.numel() * tensor.element_size() for tensor in grid.pack().values())
    assert 8 * (dense - stored) == ROWS * INPUTS, "a bit a weight less"


def test_what_is_not_two_of_four_is_one_line() -> None:
    with pytest.raises(ParetoError, match=r"^448 of 1792 fours of neighbouring weights hold more than two"):
        SemiSparseCodes.of(pruned_grid((2, 3, 1, 0), symmetric=True))
    grid = pruned_grid((2, 1), symmetric=False)
    off = dataclasses.replace(grid, zero_point=grid.zero_point + 20)
    off.codes = torch.where(grid.codes == grid.zero_point.repeat_interleave(32, 1), grid.codes + 20, grid.codes)
    with pytest.raises(ParetoError, match=r"are kept, the grid has no code for zero$"):
        SemiSparseCodes.of(off)
    odd = dataclasses.replace(grid, codes=grid.codes[:, :6], scale=grid.scale[:, :1], zero_point=grid.zero_point[:, :1])
    with pytest.raises(ParetoError, match=r"^6 input channels, which are not whole fours"):
        SemiSparseCodes.of(odd)
    part = layer(SemiSparseForm(4)).bulk
    with pytest.raises(ParetoError, match="inside the four neighbours of 2:4 codes; use fewer ranks, or"):
        part.cut((0, ROWS), (0, 66))
    with pytest.raises(ParetoError, match="inside its groups of 32; use fewer ranks, or"):
        layer(SemiSparseForm(4, 32)).bulk.cut((0, ROWS), (0, 48))


@pytest.mark.parametrize("nibble", [0, 5, 6])
def test_places_that_are_not_two_in_order_are_a_damaged_checkpoint(nibble: int) -> None:
    form = Form((SemiSparseForm(4, 32),))
    tensors = local_tensors("a", pack("a", layer(SemiSparseForm(4, 32))))
    tensors["weight_place"][3, 2] = tensors["weight_place"][3, 2] & ~0xF0 | nibble << 4
    with pytest.raises(ParetoError, match=r"^a: weight_place holds places that are not two of four"):
        unpack("a", tensors, form)


def test_a_part_that_is_not_registered_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    bulk = layer(GridForm(4)).bulk
    monkeypatch.delitem(FORMS, Offsets.kind)
    with pytest.raises(ParetoError, match=r"Offsets is no registered part of a weight; enter its form in .*registry"):
        QuantizedLinear(bulk, Offsets(torch.zeros(ROWS)))
    config = NativeConfig({"a": Form((GridForm(4), OffsetsForm()))}).to_dict()
    with pytest.raises(ParetoError, match="part 'offsets' is unknown to this vllm-pareto"):
        NativeConfig.parse(config)


def test_parts_have_one_order_and_no_kind_is_there_twice() -> None:
    bulk, values = layer(GridForm(4)).bulk, torch.ones(ROWS)
    linear = QuantizedLinear(Offsets(values), bulk)
    assert [part.kind for part in linear.parts] == ["grid", "offsets"]
    changed = linear.having(Offsets(2 * values))
    assert [part.kind for part in changed.parts] == ["grid", "offsets"]
    assert torch.allclose(changed.read() - linear.read(), torch.ones(ROWS, INPUTS), atol=1e-6)
    for parts in ((bulk, bulk), (Offsets(values),), (bulk, Offsets(values), Offsets(values))):
        with pytest.raises(AssertionError, match="a weight has one"):
            QuantizedLinear(*parts)


def test_a_new_part_goes_from_a_step_to_a_checkpoint_and_back(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_offsets(step: Parts, problem: LinearProblem) -> QuantizedLinear:
        values = torch.full((len(problem.weight),), 0.0625)
        problem.weight -= values[:, None]
        return quantize(step, problem).having(Offsets(values.to(problem.scale_dtype)))

    class Offset(Parts):
        plain = False

    monkeypatch.setitem(HANDLERS, Offset, Handler(with_offsets))
    recipe = Recipe("test", steps=(Offset(bits=8, group_size=32),), calibration=Calibration(4, 32), kv_scales=False)
    report = compress(tiny_model, recipe, tmp_path / "out", text=text_file)
    assert report.serving.plugin
    assert report.bits_per_weight > 8.5
    tokens = load_sequences(tiny_model, text_file, 4, 32, 0)
    with torch.no_grad():
        found, wanted = (load_reference(path)(tokens).logits for path in (tmp_path / "out", tiny_model))
    assert (found - wanted).norm() < 0.1 * wanted.norm(), "without the offsets it is more than the whole"
