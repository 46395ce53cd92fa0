import pytest

from kv_cache.sizes import readable


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1000, "1000 B"), (2000, "1.953 KiB"), (1 << 20, "1 MiB"), (1 << 30, "1 GiB"), (5e12, "4657 GiB")],
)
def test_bytes_as_people_read_them(count, text):
    assert readable(count) == text
