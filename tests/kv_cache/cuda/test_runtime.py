"""Compiled kernels on disk, and what the compiler is told."""

import pytest

from kv_cache.cuda.runtime import cubins, nvrtc
from kv_cache.errors import ParetoError

SOURCE = """#include "ptx.cuh"
#include "number.cuh"
struct Params { int* to; };
static_assert(sizeof(Params) == PARAMS_BYTES, "the host passes other parameters");
extern "C" __global__ void number(const __grid_constant__ Params p) { *p.to = NUMBER; }
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


class Maker:
    """Machine code of a kind, and how often it was made."""

    def __init__(self, code=b"code" * 100):
        self.code, self.times = code, 0

    def __call__(self):
        self.times += 1
        return self.code


def test_what_was_made_once_is_read(folder):
    maker = Maker()
    for _ in range(3):
        assert cubins.kept(b"key", maker) == maker.code
    assert maker.times == 1
    assert cubins.kept(b"another key", Maker(b"another code")) == b"another code"
    assert [path.suffix for path in folder.iterdir()] == [".cubin"] * 2  # Nothing partial is left.


@pytest.mark.parametrize("harm", [lambda x: x[:-1], lambda x: x[:-5] + b"!" + x[-4:], lambda x: b"", lambda x: x[:20]])
def test_a_corrupt_entry_is_made_again(folder, harm):
    maker = Maker()
    cubins.kept(b"key", maker)
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(harm(whole))
    assert cubins.kept(b"key", maker) == maker.code
    assert maker.times == 2
    assert entry.read_bytes() == whole


def test_without_a_folder_to_write_to_kernels_are_made_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "file"))
    maker = Maker()
    for _ in range(2):
        assert cubins.kept(b"key", maker) == maker.code
    assert maker.times == 2


def test_what_fails_to_be_made_leaves_nothing(folder):
    def fail():
        raise ParetoError("no")

    with pytest.raises(ParetoError, match="no"):
        cubins.kept(b"key", fail)
    assert not folder.exists()


class TestCompilation:
    @pytest.fixture(autouse=True)
    def source(self, tmp_path, folder, monkeypatch):
        """Nothing that this process has compiled already is known to it."""
        (tmp_path / "number.cu").write_text(SOURCE)
        (tmp_path / "number.cuh").write_text("#define NUMBER 1\n")
        self.path, self.folder, self.compiled = tmp_path, folder, []
        whole = nvrtc._compile

        def compile_(source, flags, place):
            self.compiled.append(flags)
            return whole(source, flags, place)

        monkeypatch.setattr(nvrtc, "_compile", compile_)

    def compile(self, arch="sm_90", size=8, **macros):
        nvrtc.compile_cubin.cache_clear()
        return nvrtc.compile_cubin("number.cu", arch, (("PARAMS_BYTES", size), *macros.items()), self.path)

    def test_a_second_process_compiles_nothing(self):
        assert self.compile() == self.compile()
        assert len(self.compiled) == 1

    def test_all_that_code_depends_on_is_in_the_key(self, monkeypatch):
        self.compile()
        self.compile(arch="sm_80")
        self.compile(ANOTHER=1)
        (self.path / "number.cuh").write_text("#define NUMBER 2\n")
        self.compile()
        (self.path / "number.cu").write_text(SOURCE.replace("NUMBER;", "NUMBER + 1;"))
        self.compile()
        major, minor = nvrtc.version()
        monkeypatch.setattr(nvrtc, "version", lambda: (major, minor + 1))
        self.compile()
        assert len(self.compiled) == len(list(self.folder.iterdir())) == 6

    def test_parameters_of_another_size_are_refused(self):
        with pytest.raises(ParetoError, match="the host passes other parameters"):
            self.compile(size=12)
