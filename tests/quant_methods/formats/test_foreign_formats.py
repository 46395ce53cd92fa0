"""Layouts of other tools, packed here bit by bit with Python integers and read back."""

import pytest
import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.foreign_formats import unpack_awq, unpack_gptq, unpack_mxfp4, unpack_stream

INPUTS, OUTPUTS, GROUP = 96, 64, 32


def as_int32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def pack_gptq(codes: Tensor, bits: int) -> Tensor:
    """[n, columns] to int32 words along n: each column one arbitrarily long integer, cut into 32 bits."""
    columns = []
    for column in codes.T.tolist():
        stream = sum(code << (bits * i) for i, code in enumerate(column))
        columns.append([as_int32((stream >> (32 * i)) & 0xFFFFFFFF) for i in range(len(column) * bits // 32)])
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def pack_awq(codes: Tensor) -> Tensor:
    """[rows, 8n] to int32 [rows, n], as AutoAWQ's from_linear does."""
    rows = []
    for row in codes.tolist():
        words = []
        for start in range(0, len(row), 8):
            word = 0
            for place, channel in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                word |= row[start + channel] << (4 * place)
            words.append(as_int32(word))
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def auto_gptq_pack_3(values: list[int]) -> list[int]:
    """AutoGPTQ 0.7.1's own loop for 32 codes of 3 bits: ten, one split 2 + 1, ten, one split 1 + 2, ten."""
    words = [0, 0, 0]
    for j in range(10):
        words[0] |= values[j] << (3 * j)
    words[0] |= (values[10] << 30) & 0xFFFFFFFF
    words[1] |= (values[10] >> 2) & 1
    for j in range(10):
        words[1] |= values[11 + j] << (3 * j + 1)
    words[1] |= (values[21] << 31) & 0xFFFFFFFF
    words[2] |= (values[21] >> 1) & 0x3
    for j in range(10):
        words[2] |= values[22 + j] << (3 * j + 2)
    return [as_int32(word) for word in words]


def layer(bits: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (INPUTS, OUTPUTS), generator=generator)
    # Zero-points from 1: v1 stores one less.
    zeros = torch.randint(1, 1 << bits, (groups, OUTPUTS), generator=generator)
    scales = torch.rand((groups, OUTPUTS), generator=generator).half()
    return codes, zeros, scales


def weights(codes: Tensor, zeros: Tensor, scales: Tensor, group_of: list[int]) -> Tensor:
    rows = [(codes[i] - zeros[g]).double() * scales[g].double() for i, g in enumerate(group_of)]
    return torch.stack(rows, 1).float()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("desc_act", [False, True])
def test_gptq_reads_what_was_packed(bits: int, version: int, desc_act: bool) -> None:
    groups = INPUTS // GROUP
    codes, zeros, scales = layer(bits, groups)
    group_of = [i // GROUP for i in range(INPUTS)]
    if desc_act:
        group_of = [group_of[i] for i in torch.randperm(INPUTS, generator=torch.Generator().manual_seed(9)).tolist()]
    offset = 2 - version
    qweight, qzeros = pack_gptq(codes, bits), pack_gptq((zeros - offset).T, bits).T
    assert qweight.shape == (INPUTS * bits // 32, OUTPUTS)
    assert qzeros.shape == (groups, OUTPUTS * bits // 32)
    expected = weights(codes, zeros, scales, group_of)
    found = unpack_gptq(qweight, qzeros, scales, torch.tensor(group_of, dtype=torch.int32), bits, offset).read()
    assert torch.equal(found, expected)
    without = unpack_gptq(qweight, qzeros, scales, None, bits, offset).read()
    assert torch.equal(without, expected) is not desc_act


def test_three_bits_as_autogptq_packs_them() -> None:
    values = torch.randint(0, 8, (32,), generator=torch.Generator().manual_seed(3)).tolist()
    words = torch.tensor(auto_gptq_pack_3(values), dtype=torch.int32)[:, None]
    assert unpack_stream(words, 3)[:, 0].tolist() == values


def test_gptq_without_g_idx_has_groups_of_equal_length() -> None:
    codes, zeros, scales = layer(4, 2)
    found = unpack_gptq(pack_gptq(codes, 4), pack_gptq(zeros.T, 4).T, scales, None, 4, 0).read()
    assert torch.equal(found, weights(codes, zeros, scales, [i // 48 for i in range(INPUTS)]))


def test_a_stored_zero_point_of_all_ones_is_not_wrapped() -> None:
    codes, _, scales = layer(4, 1)
    qzeros = torch.full((1, OUTPUTS // 8), -1, dtype=torch.int32)
    found = unpack_gptq(pack_gptq(codes, 4), qzeros, scales, None, 4, 1).read()
    assert torch.equal(found, weights(codes, torch.full((1, OUTPUTS), 16), scales, [0] * INPUTS))


def test_awq_reads_what_was_packed() -> None:
    codes, zeros, scales = layer(4, INPUTS // GROUP)
    found = unpack_awq(pack_awq(codes), pack_awq(zeros), scales).read()
    assert torch.equal(found, weights(codes, zeros, scales, [i // GROUP for i in range(INPUTS)]))


def test_what_does_not_fit_together_is_refused() -> None:
    codes, zeros, scales = layer(4, 3)
    qweight, qzeros = pack_gptq(codes, 4), pack_gptq(zeros.T, 4).T
    with pytest.raises(ParetoError, match="do not belong together"):
        unpack_gptq(qweight, qzeros[:2], scales, None, 4, 1)
    with pytest.raises(ParetoError, match="do not belong together"):
        unpack_gptq(pack_gptq(codes[:64], 4), qzeros, scales, None, 4, 1)
    with pytest.raises(ParetoError, match="does not name one of 3 groups for 96 channels"):
        unpack_gptq(qweight, qzeros, scales, torch.full((INPUTS,), 3), 4, 1)
    with pytest.raises(ParetoError, match="whole number of 3-bit codes"):
        unpack_gptq(qweight[:11], qzeros, scales, None, 3, 1)


@pytest.mark.parametrize("shape", [(3, 5, 2), (4, 7), (2, 2, 3, 1)])
def test_mxfp4_is_what_transformers_reads(shape: tuple[int, ...]) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, shape, dtype=torch.uint8, generator=generator)
    found = unpack_mxfp4(blocks, scales)
    assert found.dtype == torch.bfloat16
    assert found.shape == (*shape[:-1], 32 * shape[-1])
    flat = convert_moe_packed_tensors(
        blocks.flatten(0, -4) if len(shape) > 2 else blocks[None], scales.reshape(-1, *shape[-2:])
    )
    assert torch.equal(found.reshape(-1, *found.shape[-2:]), flat.mT)


def test_mxfp4_by_hand() -> None:
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0], blocks[0, 0, 15] = 0xA3, 0x7F  # codes 3 and 10 come first, 15 and 7 last
    found = unpack_mxfp4(blocks, torch.tensor([[128]], dtype=torch.uint8))
    assert found[0, [0, 1, 30, 31]].tolist() == [3.0, -2.0, -12.0, 12.0]
    with pytest.raises(ParetoError, match=r"MXFP4 blocks .* and scales .* \[1, 2\] do not belong together"):
        unpack_mxfp4(blocks, torch.zeros(1, 2, dtype=torch.uint8))
