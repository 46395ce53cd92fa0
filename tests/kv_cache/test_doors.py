"""Kernels see addresses alone: what has another dtype, shape or stride is refused at the door, not computed with."""

import pytest
import torch

from kv_cache import cpu_kernels
from kv_cache.cpu_kernels import PagedCache
from kv_cache.cuda.arguments import Geometry
from kv_cache.doors import in_line, is_table, is_vector
from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS
from kv_cache.layout import PageLayout
from quant_methods.formats import grid_search
from quant_methods.kernels import sparse_cuda
from quant_methods.kernels.beside import BesideParts
from quant_methods.kernels.low_bit_matrix import PackedMatrix
from tests.kv_cache.random_scales import random_scales

HEADS, DIM, BLOCK = 2, 64, 32


@pytest.fixture
def pages():
    try:
        cpu_kernels.best_isa()
    except ParetoError as missing:
        pytest.skip(str(missing))
    layout = PageLayout(FORMATS["int4_per_head"], DIM, BLOCK)
    cache = torch.zeros(4, HEADS, BLOCK, layout.bytes_per_token, dtype=torch.uint8)
    return PagedCache(cache, layout, random_scales(HEADS, DIM))


def attention(**changes):
    made = {
        "query": torch.randn(3, 4, DIM), "out": torch.zeros(3, 4, DIM),
        "block_table": torch.zeros(1, 2, dtype=torch.int32), "seq_lens": torch.tensor([3], dtype=torch.int32),
        "query_start": torch.tensor([0, 3], dtype=torch.int32),
    }  # fmt: skip
    return made | changes


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seq_lens": torch.tensor([3])}, "int32 lengths"),
        ({"query_start": torch.tensor([0, 3])}, "int32 starts"),
        ({"query_start": torch.tensor([0, 9, 3], dtype=torch.int32)[::2]}, "int32 starts"),
        ({"query_start": torch.tensor([0], dtype=torch.int32)}, "a start for each request"),
        ({"block_table": torch.zeros(1, 2, dtype=torch.int64)}, "int32 block table"),
        ({"block_table": torch.zeros(1, 4, dtype=torch.int32)[:, ::2]}, "contiguous rows"),
        ({"query": torch.randn(3, DIM, 4).transpose(1, 2)}, "queries .* contiguous channels"),
        ({"out": torch.zeros(3, 4, 2 * DIM)[:, :, ::2]}, "outputs .* contiguous channels"),
        ({"query": torch.randn(3, 4, DIM).double()}, "queries and outputs"),
        ({"out": torch.zeros(3, 4, DIM).half()}, "queries and outputs"),
        ({"query": torch.randn(3, 3, DIM), "out": torch.zeros(3, 3, DIM)}, "heads in multiples of 2"),
        ({"query": torch.randn(2, 4, DIM)}, "as many outputs"),
        ({"own": (torch.randn(3, HEADS, DIM), torch.randn(3, HEADS, DIM).half())}, "own keys and values like queries"),
        ({"own": (torch.randn(2, HEADS, DIM), torch.randn(3, HEADS, DIM))}, "own keys and values like queries"),
        ({"own": (torch.randn(3, HEADS, DIM), torch.randn(3, 4, DIM))}, "own keys and values like queries"),
        ({"own": (torch.randn(3, HEADS, 2 * DIM)[..., ::2], torch.randn(3, HEADS, DIM))}, "own .* contiguous channels"),
    ],
)
def test_cpu_attention(pages, changes, what):
    pages.attend(**attention(), scale=0.1)
    with pytest.raises(ParetoError, match=f"int4_per_head attention expects .*{what}"):
        pages.attend(**attention(**changes), scale=0.1)


def test_rows_may_lie_apart(pages):
    """Queries, keys and values are slices of one product in vLLM."""
    whole = torch.randn(3, 8, DIM)
    tokens = torch.arange(3)
    pages.store(whole[:, 4:6], whole[:, 6:], tokens, tokens)
    apart, together = torch.zeros(3, 4, DIM), torch.zeros(3, 4, DIM)
    pages.attend(**attention(query=whole[:, :4], out=apart), scale=0.1)
    pages.attend(**attention(query=whole[:, :4].contiguous(), out=together), scale=0.1)
    assert torch.equal(apart, together)
    assert apart.abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"slots": torch.arange(3).int()}, "int64 slots"),
        ({"slots": torch.arange(6)[::2]}, "int64 slots"),
        ({"positions": torch.arange(3).int()}, "int64 positions"),
        ({"key": torch.randn(3, DIM, HEADS).transpose(1, 2)}, "keys .* contiguous channels"),
        ({"value": torch.randn(3, HEADS, 32)}, "values"),
        ({"value": torch.randn(3, HEADS, DIM).half()}, "alike"),
        ({"value": torch.randn(2, HEADS, DIM)}, "as many values"),
    ],
)
def test_cpu_store(pages, changes, what):
    made = {
        "key": torch.randn(3, HEADS, DIM), "value": torch.randn(3, HEADS, DIM), "slots": torch.arange(3),
        "positions": torch.arange(3),
    }  # fmt: skip
    pages.store(**made)
    with pytest.raises(ParetoError, match=f"int4_per_head store expects .*{what}"):
        pages.store(**(made | changes))


def test_decode_attention_on_a_gpu_asks_for_both_of_its_steps():
    layout = PageLayout(FORMATS["int4_per_head"], 128, BLOCK)
    shape = Geometry(layout, HEADS, 4, torch.bfloat16, 2, 3, 1, False)
    cpu = torch.device("cpu")
    query = torch.zeros(3, 4, 128, dtype=torch.bfloat16)
    own = torch.zeros(2, 3, HEADS, 128, dtype=torch.bfloat16).unbind()
    shape.verify_queries(query, None, cpu)
    shape.verify_queries(query, own, cpu)
    for wrong in (query.float(), query[:, :3], query.repeat(2, 1, 1), query.transpose(1, 2).contiguous().mT):
        with pytest.raises(ParetoError, match="decode attention expects"):
            shape.verify_queries(wrong, None, cpu)
    for wrong in (own[1].float(), own[1][:2], own[1].repeat(1, 2, 1), torch.zeros(3, HEADS, 256).bfloat16()[..., ::2]):
        with pytest.raises(ParetoError, match="own keys and values like queries"):
            shape.verify_queries(query, (own[0], wrong), cpu)
    cache = torch.zeros(4, HEADS, BLOCK, layout.bytes_per_token, dtype=torch.uint8)
    table, lens = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    start = torch.zeros(3, dtype=torch.int32)
    for sinks in (None, torch.zeros(4)):
        shape.verify_pages(query, cache, table, lens, start, 0.0, sinks, cpu)
    for wrong in ((table.long(), lens, start), (table, lens.long(), start), (table, lens, start[:2]),
                  (table, torch.zeros(4, dtype=torch.int32)[::2], start)):  # fmt: skip
        with pytest.raises(ParetoError, match="decode attention expects"):
            shape.verify_pages(query, cache, *wrong, 0.0, None, cpu)
    for sinks in (torch.zeros(2), torch.zeros(4).bfloat16(), torch.zeros(8)[::2], torch.zeros(4, device="meta")):
        with pytest.raises(ParetoError, match=r"contiguous float32 sinks \[4\]"):
            shape.verify_pages(query, cache, table, lens, start, 0.0, sinks, cpu)


def test_the_low_bit_kernels():
    words, scales = torch.zeros(1, 1, 512, dtype=torch.int32), torch.zeros(1, 4, 8, 4, 2, dtype=torch.bfloat16)
    matrix = PackedMatrix(words, scales, "grid", 32, 64, 4, 2)
    x, y = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(2, 32, dtype=torch.bfloat16)
    for wrong_x, wrong_y in ((x.float(), y), (x[:, :32], y), (x, y[:1]), (x, y.half()), (x.half(), y.half()),
                             (x, torch.zeros(32, 2, dtype=torch.bfloat16).T)):  # fmt: skip
        with pytest.raises(ParetoError, match="the low-bit kernel expects"):
            matrix.multiply(wrong_x, wrong_y)
    for kind in ("grid", "trellis", "semi_sparse"):
        for wrong_words, wrong_side in ((words.long(), scales), (words[..., :384], scales), (words, scales.half()),
                                        (words, scales.transpose(1, 2)), (words, scales.to("meta"))):  # fmt: skip
            with pytest.raises(ParetoError, match="the low-bit kernel expects"):
                PackedMatrix(wrong_words, wrong_side, kind, 32, 64, 4, 2).multiply(x, y)
    starts, inputs = torch.zeros(33, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    values, one = torch.zeros(0, dtype=torch.bfloat16), y[:1]
    for wrong in ((starts.long(), inputs, values), (starts[:-1], inputs, values), (starts, inputs.long(), values),
                  (starts, inputs, values.float()), (starts, torch.zeros(2, dtype=torch.int32), values)):  # fmt: skip
        with pytest.raises(ParetoError, match="the kernel of single weights expects"):
            sparse_cuda.add(one, x[:1], *wrong, one, early=False)
    for wrong_x in (x.float(), x.T, x[:1]):
        with pytest.raises(ParetoError, match="the kernel of single weights expects"):
            sparse_cuda.turn(wrong_x)


def test_strides_of_single_elements_do_not_matter():
    assert in_line(torch.zeros(4, 2)[:, :1])
    assert is_vector(torch.zeros(8)[::8], torch.float32)
    assert is_table(torch.zeros(4, 8)[:, :3], torch.float32)
    assert not is_table(torch.zeros(4, 8).T, torch.float32)


def columns(**changes):
    """What the Triton kernel of kept columns and a low-rank product is given: 3 tokens, 32 to 16 channels, 2 + 4."""
    made = {
        "y": torch.randn(3, 16).half(), "x": torch.randn(3, 32).half(), "low": torch.randn(3, 4).half(),
        "index": torch.tensor([1, 5], dtype=torch.int32), "ends": torch.randn(6, 16).half(), "result": None,
    }  # fmt: skip
    return made | changes


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"y": torch.randn(3, 16)}, "16-bit numbers, not torch.float32"),
        ({"y": torch.randn(3, 32).half()[:, ::2]}, "outputs .* rows have no gaps"),
        ({"y": torch.randn(65, 16).half()}, "1 to 64 tokens, not 65"),
        ({"x": torch.randn(3, 32).bfloat16()}, "as many inputs .* their dtype"),
        ({"x": torch.randn(2, 32).half()}, "as many inputs"),
        ({"x": torch.randn(32, 3).half().T}, "no gaps"),
        ({"index": torch.tensor([1, 5])}, "int32 channels"),
        ({"index": None, "low": None}, "channels kept apart or a low-rank product"),
        ({"low": torch.randn(3, 4)}, "second matrix in their dtype"),
        ({"ends": torch.randn(6, 16)}, r"contiguous weights \[6, 16\] of torch.float16"),
        ({"ends": torch.randn(16, 6).half().T}, "contiguous weights"),
        ({"ends": torch.randn(5, 16).half()}, r"contiguous weights \[6, 16\]"),
        ({"result": torch.empty(3, 16)}, "a result like the outputs"),
        ({"result": torch.empty(3, 16, dtype=torch.float16, device="meta")}, "tensors on cpu"),
    ],
)
def test_columns_beside_a_bulk_are_what_their_kernel_reads(changes, what):
    triton_kernels = pytest.importorskip("quant_methods.kernels.beside_triton")
    with pytest.raises(ParetoError, match=what):
        triton_kernels.add(**columns(**changes))


@pytest.mark.parametrize(
    ("weight", "first", "changes", "what"),
    [
        (torch.randn(4, 32), 0, {}, "16-bit numbers"),
        (torch.randn(32, 4).half().T, 0, {}, "a contiguous weight"),
        (torch.randn(4, 32).half(), 0, {"channels": torch.tensor([1, 5])}, "int32 channels"),
        (torch.randn(4, 32).half(), 0, {"ends": torch.randn(2, 16)}, "contiguous weights of channels kept apart"),
        (torch.randn(4, 32).half(), 0, {"ends": torch.randn(1, 16).half()}, "weights of each channel kept apart"),
        (torch.randn(4, 32).half(), 13, {}, "for 17 output channels"),
        (torch.randn(4, 32).half(), 0, {"starts": torch.zeros(17, dtype=torch.int64)}, "int32 starts"),
        (torch.randn(4, 32).half(), 0, {"starts": torch.zeros(4, dtype=torch.int32)}, "int32 starts of 4"),
        (torch.randn(4, 32).half(), 0, {"values": torch.randn(7)}, "single weights of torch.float16"),
        (torch.randn(4, 32).half(), 0, {"inputs": torch.zeros(6, dtype=torch.int32)}, "an int32 channel for each"),
        (torch.randn(4, 32).half(), 0, {"values": torch.randn(7).half().to("meta")}, "tensors on cpu"),
    ],
)
def test_what_is_added_to_a_weight_is_what_its_kernel_reads(weight, first, changes, what):
    triton_kernels = pytest.importorskip("quant_methods.kernels.beside_triton")
    parts = BesideParts(
        None, torch.tensor([1, 5], dtype=torch.int32), torch.randn(2, 16).half(), torch.zeros(17, dtype=torch.int32),
        torch.zeros(7, dtype=torch.int32), torch.randn(7).half(),
    )  # fmt: skip
    with pytest.raises(ParetoError, match=what):
        triton_kernels.merge(weight, first, parts._replace(**changes))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"work": torch.randn(8, 6).double()}, "float32 weights"),
        ({"upper": torch.randn(8, 8).double()}, "float32 weights, factor"),
        ({"work": torch.randn(6, 8).T}, "contiguous matrices"),
        ({"codes": torch.randn(8, 5)}, "codes of the weights' shape"),
        ({"upper": torch.randn(7, 8)}, r"a factor \[8, 8\]"),
        ({"zero": torch.randn(1, 6)}, "scales and zero-points"),
        ({"scale": torch.randn(2, 5), "zero": torch.randn(2, 5)}, "scales and zero-points"),
        ({"group_of": torch.zeros(8, dtype=torch.int64)}, "an int32 group for each channel"),
        ({"stop": 9}, "channels within 8, not 2 to 9"),
        ({"group_of": torch.zeros(8, dtype=torch.int32, device="meta")}, "tensors on cpu"),
    ],
)
def test_the_loop_of_gptq_is_given_what_its_kernel_reads(changes, what):
    feedback = pytest.importorskip("quant_methods.kernels.feedback")
    made = {
        "work": torch.randn(8, 6), "upper": torch.randn(8, 8), "scale": torch.randn(2, 6), "zero": torch.randn(2, 6),
        "group_of": torch.zeros(8, dtype=torch.int32), "codes": torch.zeros(8, 6), "start": 2, "stop": 6, "low": -8,
        "high": 7,
    }  # fmt: skip
    with pytest.raises(ParetoError, match=what):
        feedback.round_block(**made | changes)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"scales": torch.rand(5, 3, 2).double()}, "float32 weights, scales"),
        ({"zeros": torch.rand(4, 3, 2)}, "candidates for each group"),
        ({"importance": torch.rand(2, 15)}, r"an importance \[2, 16\]"),
        ({"importance": torch.rand(2, 16, 15)}, "or of pairs in groups of a multiple of 8"),
        ({"scales": torch.rand(129, 3, 2), "zeros": torch.zeros(129, 3, 2)}, "1 to 128 candidates, not 129"),
        ({"zeros": torch.zeros(5, 3, 2, device="meta")}, "tensors on the CPU"),
    ],
)
def test_the_search_for_ranges_is_given_what_its_library_reads(changes, what):
    if not grid_search.serves(torch.randn(3, 2, 16), torch.rand(2, 16)):
        pytest.skip("the library is not compiled")
    made = {
        "grouped": torch.randn(3, 2, 16), "importance": torch.rand(2, 16), "scales": torch.rand(5, 3, 2),
        "zeros": torch.zeros(5, 3, 2), "low": -8, "high": 7,
    }  # fmt: skip
    with pytest.raises(ParetoError, match=what):
        grid_search.best_candidates(**made | changes)
