"""A library that was compiled from other sources is refused, not called with parameters that it takes for others."""

import ctypes

import pytest

from kv_cache.compiled import compiled_library
from kv_cache.cpu_kernels import _Attention, _Store
from kv_cache.errors import ParetoError
from quant_methods.formats.grid_search import _Search


class Longer(ctypes.Structure):
    _fields_ = (*_Store._fields_, ("added", ctypes.c_int64))


def test_the_libraries_take_what_they_are_given() -> None:
    assert compiled_library("kv_cache._cpu", attention=_Attention, store=_Store) is not None
    assert compiled_library("quant_methods._cpu", search=_Search) is not None
    assert compiled_library("kv_cache._none") is None


@pytest.mark.parametrize(
    ("name", "found"), [("store", ctypes.sizeof(_Store)), ("something_that_older_ones_do_not_say", None)]
)
def test_a_library_of_other_sources_is_refused_in_one_line(name: str, found: int | None) -> None:
    wanted = ctypes.sizeof(Longer)
    with pytest.raises(ParetoError, match=rf"parameters of {name}: {found} bytes instead of {wanted}\); run 'pip inst"):
        compiled_library("kv_cache._cpu", **{name: Longer})
