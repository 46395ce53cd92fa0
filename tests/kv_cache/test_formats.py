import re

import pytest

from kv_cache.errors import ParetoError
from kv_cache.formats import DTYPES, FORMATS, HEAD_SIZES, META_BYTES, MIXED, PLANES, KVFormat, get_format, layer_format
from kv_cache.layout import META, PageLayout


@pytest.mark.parametrize(
    ("name", "key_bits", "value_bits"),
    [
        ("int8_per_head", 8, 8),
        ("int6_per_head", 6, 6),
        ("int4_per_head", 4, 4),
        ("k4v3_per_head", 4, 3),
        ("int3_per_head", 3, 3),
    ],
)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_bits_are_what_the_name_promises_and_four_bytes_a_token(name, key_bits, value_bits, head_dim):
    fmt = get_format(name)
    assert (fmt.bits("key"), fmt.bits("value")) == (key_bits, value_bits)
    assert fmt.bits_per_element(head_dim) == (key_bits + value_bits) / 2 + 8 * META_BYTES / (2 * head_dim)
    assert fmt.compression_ratio(head_dim) == pytest.approx(16 / fmt.bits_per_element(head_dim))


def test_bytes_of_a_token():
    assert get_format("int4_per_head").bytes_per_token(64) == 64 + 4
    assert get_format("int3_per_head").bytes_per_token(128) == 96 + 4
    assert get_format("k4v3_per_head").bytes_per_token(64) == 32 + 24 + 4
    assert layer_format(2, 8).bytes_per_token(80) == 20 + 80 + 4


def test_planes_make_up_their_bits_with_widths_that_masks_unpack():
    for bits, widths in PLANES.items():
        assert sum(widths) == bits
        assert set(widths) <= {1, 2, 4, 8}


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(ParetoError, match=r"unknown KV-cache format 'int5'.*int4_per_head.*" + MIXED):
        get_format("int5")


def test_the_mixed_dtype_has_no_bits_of_its_own():
    assert MIXED in DTYPES
    assert MIXED not in FORMATS
    with pytest.raises(ParetoError, match="bits of its own for each layer"):
        get_format(MIXED)
    assert layer_format(4, 2) == KVFormat("mixed_k4v2", 4, 2) == get_format("mixed_k4v2")


@pytest.mark.parametrize("pair", [(5, 4), (4, 1), (16, 8)])
def test_bits_without_planes_are_refused(pair):
    with pytest.raises(ParetoError, match=r"bits are not served \(only 2, 3, 4, 6, 8\)"):
        layer_format(*pair)


ALL = [*FORMATS.values(), *(layer_format(k, v) for k in PLANES for v in PLANES)]


def served(fmt: KVFormat, head_dim: int) -> bool:
    return head_dim % 32 == 0 or not any(1 in PLANES[bits] for bits in (fmt.key_bits, fmt.value_bits))


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f"{f.name}-{f.key_bits}-{f.value_bits}")
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_planes_fill_the_page_without_gaps_or_overlap(fmt, head_dim, block_size):
    if not served(fmt, head_dim):
        with pytest.raises(ParetoError, match=r"multiple of 32, not 80: use int4_per_head"):
            PageLayout(fmt, head_dim, block_size)
        return
    layout = PageLayout(fmt, head_dim, block_size)
    end = 0
    for plane, row in layout.row_bytes.items():
        assert layout.offsets[plane] == end
        assert end % 16 == 0
        assert row > 0
        end += row * block_size
    assert end == layout.page_bytes == block_size * fmt.bytes_per_token(head_dim)
    names = [f"{kind}.{i}" for kind in ("key", "value") for i in range(len(PLANES[fmt.bits(kind)]))]
    assert list(layout.row_bytes) == [*names, META]
    assert [layout.row_bytes[name] for name in names] == [
        head_dim * width // 8 for kind in ("key", "value") for width in PLANES[fmt.bits(kind)]
    ]


def test_rows_are_aligned_for_the_common_head_sizes():
    for head_dim in (64, 128, 256):
        for name in ("int8_per_head", "int6_per_head", "int4_per_head"):
            rows = PageLayout(get_format(name), head_dim, 16).row_bytes
            assert all(row % 16 == 0 for plane, row in rows.items() if plane != META)
    # Rows of single bits are whole 32-bit words, which is what the kernels need of them.
    for head_dim in (64, 96, 128, 256):
        rows = PageLayout(get_format("int3_per_head"), head_dim, 16).row_bytes
        assert all(row % 4 == 0 for row in rows.values())


def test_bits_of_any_number_with_a_plane_of_single_ones_need_whole_words(monkeypatch):
    """The rule once asked for 3 bits by name, and 5 bits, as a plane of 4 and one of 1, computed nonsense."""
    monkeypatch.setitem(PLANES, 5, (4, 1))
    assert PageLayout(KVFormat("int5_per_head", 5, 5), 96, 16).row_bytes["key.1"] == 12
    with pytest.raises(ParetoError, match=r"codes of 5 bits need a head size that is a multiple of 32, not 80"):
        PageLayout(KVFormat("k8v5", 8, 5), 80, 16)


def test_a_head_size_that_is_not_served_names_the_alternative():
    with pytest.raises(ParetoError, match=r"does not serve head size 72.*--kv-cache-dtype auto"):
        PageLayout(get_format("int4_per_head"), 72, 16)


@pytest.mark.parametrize("block_size", [8, 24])
def test_a_block_size_that_breaks_alignment_is_refused(block_size):
    with pytest.raises(ParetoError, match="multiple of 16"):
        PageLayout(get_format("int4_per_head"), 64, block_size)


def test_names_are_what_the_bits_say():
    for name, fmt in FORMATS.items():
        digits = [int(n) for n in re.findall(r"\d+", name)]
        assert [fmt.key_bits, fmt.value_bits] == (digits * 2)[:2]
