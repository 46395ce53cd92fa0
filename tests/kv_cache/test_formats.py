import pytest

from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS, HEAD_SIZES, get_format
from kv_cache.layout import PageLayout


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int8_per_head", 8.0),
        ("int6_per_head", 6.0),
        ("k8v4_per_head", 6.0),
        ("int4_per_head", 4.0),
        ("int8_per_tensor", 8.0),
        ("int4_per_tensor", 4.0),
        ("int8_per_group", 9.0),
        ("int4_per_group", 5.0),
    ],
)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_bits_are_what_the_name_promises(name, bits, head_dim):
    assert get_format(name).bits_per_element(head_dim) == bits
    assert get_format(name).compression_ratio(head_dim) == pytest.approx(16 / bits)


def test_int4_is_exactly_four_times_smaller():
    for head_dim in HEAD_SIZES:
        assert get_format("int4_per_head").bytes_per_token(head_dim) * 4 == 2 * head_dim * 2


def test_a_last_group_that_is_shorter_has_its_own_scale():
    assert get_format("int4_per_group").groups(80) == 3
    assert get_format("int4_per_group").bytes_per_token(80) == 80 + 2 * 3 * 4


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(ParetoError, match=r"unknown KV-cache format 'int5'.*int4_per_head"):
        get_format("int5")


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_planes_fill_the_page_without_gaps_or_overlap(fmt, head_dim, block_size):
    layout = PageLayout(fmt, head_dim, block_size)
    end = 0
    for plane, row in layout.row_bytes().items():
        assert layout.offsets()[plane] == end
        assert end % 16 == 0 or not row
        end += row * block_size
    assert end == layout.page_bytes


def test_rows_are_aligned_for_the_common_head_sizes():
    for head_dim in (64, 128, 256):
        for name in ("int8_per_head", "int6_per_head", "int4_per_head"):
            rows = PageLayout(get_format(name), head_dim, 16).row_bytes()
            assert all(rows[plane] % 16 == 0 for plane in ("key", "key_high", "value", "value_high"))


def test_a_head_size_that_is_not_served_names_the_alternative():
    with pytest.raises(ParetoError, match=r"does not serve head size 72.*--kv-cache-dtype auto"):
        PageLayout(get_format("int4_per_head"), 72, 16)


def test_a_block_size_that_breaks_alignment_is_refused():
    with pytest.raises(ParetoError, match="multiple of 16"):
        PageLayout(get_format("int4_per_head"), 64, 24)
