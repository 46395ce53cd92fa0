"""Files that are there whole or not at all."""

import os
import stat

import pytest

from kv_cache.atomic import replacing, write_bytes


def test_a_file_is_written_and_replaced_in_a_folder_that_was_not_there(tmp_path):
    path = tmp_path / "one" / "two" / "a.bin"
    for data in (b"first", b""):
        write_bytes(path, data)
        assert path.read_bytes() == data
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_a_new_file(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "a.bin", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, OSError])
def test_what_ends_early_leaves_the_old_file_and_no_rest(trouble, tmp_path):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def write_half():
        with replacing(path) as partial:
            partial.write_bytes(b"half")
            raise trouble

    with pytest.raises(trouble):
        write_half()
    assert [(file, file.read_bytes()) for file in tmp_path.iterdir()] == [(path, b"old")]


def test_it_is_on_the_disk_before_it_is_seen(tmp_path, monkeypatch):
    path, steps = tmp_path / "a.bin", []

    def noted(name):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: (steps.append((name, path.exists())), real(*args))[1])

    noted("fsync")
    noted("replace")
    write_bytes(path, b"new")
    assert steps == [("fsync", False), ("replace", False)]
    assert path.read_bytes() == b"new"


def test_a_file_where_a_folder_should_be_is_an_error_of_the_system(tmp_path):
    write_bytes(tmp_path / "file", b"")
    with pytest.raises(OSError, match="file"):
        write_bytes(tmp_path / "file" / "below", b"x")
