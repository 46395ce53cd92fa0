"""Codes with a bitmap are the weights of the grid that they were made of: packed, read, cut and stacked."""

import pytest
import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.parts import bitmap_codes
from quant_methods.formats.parts.bitmap_codes import BitmapCodes, BitmapForm
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.quantized import QuantizedLinear

pytestmark = pytest.mark.usefixtures("fresh_numbers")


def grid_of(rows: int, inputs: int, groups: int, zeros: float | Tensor) -> GridCodes:
    """Random codes, of which a share, or what a mask says, is zero."""
    codes = torch.randint(-8, 8, (rows, inputs), dtype=torch.int8)
    zero = torch.randint(-8, 8, (rows, groups), dtype=torch.int8)
    mask = torch.rand(rows, inputs) < zeros if isinstance(zeros, float) else zeros
    codes = torch.where(mask, zero.repeat_interleave(inputs // groups, 1), codes)
    return GridCodes(codes, torch.randn(rows, groups).bfloat16(), zero, 4)


def same(found: BitmapCodes, wanted: GridCodes) -> bool:
    read = found.grid()
    assert found.shape == wanted.shape
    assert torch.equal(found.read(), wanted.read())
    return all(torch.equal(getattr(read, name), getattr(wanted, name)) for name in ("codes", "scale", "zero_point"))


@pytest.mark.parametrize("zeros", [0.0, 0.2, 0.5, 0.6, 0.97, 1.0])
@pytest.mark.parametrize(("rows", "inputs", "groups"), [(32, 128, 1), (70, 416, 13), (1, 32, 1), (33, 640, 10)])
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_codes_survive_any_share_of_zeros(
    zeros: float, rows: int, inputs: int, groups: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitmap_codes, "_AT_ONCE", at_once)
    grid = grid_of(rows, inputs, groups, zeros)
    packed = BitmapCodes.of(grid)
    assert same(packed, grid)
    assert len(packed.kept) >= -(-int((packed.read() != 0).sum()) // 32)


def test_each_block_has_the_lines_that_its_codes_need() -> None:
    grid = grid_of(64, 256, 2, 1.0)
    grid.codes[0, :33] = grid.zero_point[0, :1] ^ 1
    grid.codes[32:, 128:] = grid.zero_point[32:, 1:] ^ 1
    packed = BitmapCodes.of(grid)
    assert packed.starts.tolist() == [0, 2, 2, 2, 130]
    # What fills a line is a zero.
    assert packed.kept[0].tolist() == [0x11111111] * 4
    assert packed.kept[1].tolist() == [1, 0, 0, 0]
    assert same(packed, grid)


def test_the_bits_of_a_weight_are_those_that_are_stored() -> None:
    packed = BitmapCodes.of(grid_of(256, 4096, 32, 0.5))
    form = BitmapForm(4, 128, symmetric=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in packed.pack().items()}
    bits = form.stored_bits(256, 4096, shapes) / packed.read().numel()
    # A bit and half a code; a scale and a zero-point for 128; a start for a block, of whose last line half is empty.
    assert bits == pytest.approx(1 + 4 * 15 / 32 + 24 / 128 + (32 + 64) / 4096, abs=0.02)


@pytest.mark.parametrize("rows", [(0, 96), (32, 64), (64, 96), (8, 40), (0, 10)], ids=str)
@pytest.mark.parametrize("inputs", [(0, 416), (128, 384), (256, 416), (32, 416), (0, 64)], ids=str)
def test_any_channels_are_cut(rows: tuple[int, int], inputs: tuple[int, int]) -> None:
    grid = grid_of(96, 416, 13, 0.5)
    assert same(BitmapCodes.of(grid).cut(rows, inputs), grid.cut(rows, inputs))


def test_rows_of_a_last_tile_that_is_not_full_are_cut_with_it() -> None:
    grid = grid_of(70, 256, 1, 0.5)
    assert same(BitmapCodes.of(grid).cut((32, 70), (128, 256)), grid.cut((32, 70), (128, 256)))


def test_a_group_is_not_cut() -> None:
    packed = BitmapCodes.of(grid_of(32, 512, 2, 0.5))
    for inputs in ((0, 128), (32, 256)):
        with pytest.raises(ParetoError, match=r"a layer of 512 input channels inside its groups of 256; use fewer"):
            packed.cut((0, 32), inputs)


def test_layers_are_stacked_at_whole_tiles() -> None:
    grids = [grid_of(rows, 160, 5, 0.6) for rows in (64, 32, 96)]
    layers = [QuantizedLinear(BitmapCodes.of(grid)) for grid in grids]
    assert all(one.bulk.stacks_with(other.bulk) for one in layers for other in layers)
    assert same(BitmapCodes.stack(layers), GridCodes.stack([QuantizedLinear(grid) for grid in grids]))
    for other in (grid_of(40, 160, 5, 0.5), grid_of(32, 160, 1, 0.5)):
        assert not layers[0].bulk.stacks_with(BitmapCodes.of(other))
    assert not layers[0].bulk.stacks_with(grids[0])


def test_what_a_bitmap_does_not_hold_is_one_line() -> None:
    grid = grid_of(32, 64, 1, 0.5)
    with pytest.raises(ParetoError, match=r"^codes of 3 bits; a bitmap goes with codes of 4$"):
        BitmapCodes.of(GridCodes(grid.codes, grid.scale, grid.zero_point, 3))
    with pytest.raises(ParetoError, match=r"^48 input channels; a bitmap has multiples of 32$"):
        BitmapCodes.of(grid.cut((0, 32), (0, 48)))
    for zero in (8, -9):
        with pytest.raises(ParetoError, match=r"^zero-points that are no codes of 4 bits, so that nothing there"):
            BitmapCodes.of(GridCodes(grid.codes, grid.scale, torch.full_like(grid.zero_point, zero), 4))
    with pytest.raises(ParetoError, match="a: bits is 3, expected one of 4"):
        BitmapForm(3).check("a")
    with pytest.raises(ParetoError, match="a: group_size is 0, expected -1 or a positive number"):
        BitmapForm(4, 0).check("a")


@pytest.mark.parametrize("name", ["weight_bitmap", "weight_starts", "weight_kept"])
def test_a_damaged_bitmap_is_refused(name: str) -> None:
    tensors = BitmapCodes.of(grid_of(32, 256, 2, 0.5)).pack()
    assert BitmapForm(4, 128, symmetric=False).unpack(tensors)
    if name == "weight_bitmap":
        tensors[name] = tensors[name].clone()
        tensors[name][0, 0] = 0
    else:
        tensors[name] = tensors[name][:-1] if name == "weight_kept" else tensors[name].flip(0)
    with pytest.raises(ParetoError, match="weight_starts and weight_kept are not what weight_bitmap counts; the check"):
        BitmapForm(4, 128, symmetric=False).unpack(tensors)
