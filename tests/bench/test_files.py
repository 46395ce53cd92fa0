import json

import numpy as np
import pytest

from bench.files import read_arrays, read_json, replacing, write_arrays, write_json, write_text
from kv_cache.errors import ParetoError


def test_round_trips(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"a": [1, None]})
    assert read_json(tmp_path / "new" / "a.json") == {"a": [1, None]}
    write_arrays(tmp_path / "a.npz", {"x": np.arange(3), "name": np.array("bfloat16")})
    arrays = read_arrays(tmp_path / "a.npz")
    assert arrays["x"].tolist() == [0, 1, 2]
    assert str(arrays["name"]) == "bfloat16"


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"new": float("nan")})
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_damaged_files_count_as_missing(tmp_path):
    write_arrays(tmp_path / "a.npz", {"x": np.arange(1000)})
    whole = (tmp_path / "a.npz").read_bytes()
    for size in (0, 3, 100, len(whole) - 30):
        (tmp_path / "a.npz").write_bytes(whole[:size])
        assert read_arrays(tmp_path / "a.npz") is None
    (tmp_path / "a.json").write_text(json.dumps({"a": 1})[:-1])
    assert read_json(tmp_path / "a.json") is None
    assert read_json(tmp_path / "missing.json") is None


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ParetoError, match="cannot be written"):
        write_text(tmp_path / "file" / "below.txt", "x")


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "folder" / "a.bin"
    with replacing(path) as one:
        with replacing(path) as other:
            other.write_bytes(b"other")
        assert path.read_bytes() == b"other"
        one.write_bytes(b"one")
    assert path.read_bytes() == b"one"

    def fail():
        with replacing(path) as third:
            third.write_bytes(b"half")
            raise ConnectionError("not a matter of files")

    with pytest.raises(ConnectionError):
        fail()
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]
    assert path.read_bytes() == b"one"


def test_json_has_an_entry_a_line_and_what_is_short_in_one(tmp_path):
    numbers, long = [1.5] * 100, {f"key {i}": i for i in range(30)}
    data = {"a": numbers, 3: {"b": [], "c": [{"x": "y[ ]"}, [1]]}, True: {}, "d": {"e": long, "f": [long, [2]]}}
    write_json(tmp_path / "x.json", data)
    assert json.loads((tmp_path / "x.json").read_text()) == json.loads(json.dumps(data))
    lines = (tmp_path / "x.json").read_text().splitlines()
    assert lines[:3] == ["{", f' "a": {json.dumps(numbers)},', ' "3": {"b": [], "c": [{"x": "y[ ]"}, [1]]},']
    assert lines[3:7] == [' "true": {},', ' "d": {', '  "e": {', '   "key 0": 0,']
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": [float("nan")]})
