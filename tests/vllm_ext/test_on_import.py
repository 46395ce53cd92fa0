"""Actions that wait for a module."""

import importlib
import sys

import pytest

from vllm_ext.on_import import on_import


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder to import from, and the modules of it forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("made_up_")]:
        del sys.modules[name]


def test_an_action_waits_for_its_module_and_sees_all_of_it(modules):
    (modules / "made_up_one.py").write_text("import made_up_two\nvalue = 1\n")
    (modules / "made_up_two.py").write_text("")
    seen = []
    on_import("made_up_one", lambda: seen.append(sys.modules["made_up_one"].value))
    on_import("made_up_one", lambda: seen.append(2))
    importlib.import_module("made_up_two")
    assert seen == []
    importlib.import_module("made_up_one")
    assert seen == [1, 2]
    importlib.reload(sys.modules["made_up_one"])
    assert seen == [1, 2]


def test_an_imported_module_is_not_waited_for(modules):
    (modules / "made_up_three.py").write_text("")
    importlib.import_module("made_up_three")
    seen = []
    on_import("made_up_three", lambda: seen.append(1))
    assert seen == [1]


def test_an_import_that_fails_may_be_tried_again(modules):
    (modules / "made_up_four.py").write_text("import made_up_five\n")
    seen = []
    on_import("made_up_four", lambda: seen.append(1))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("made_up_four")
    assert seen == []
    (modules / "made_up_five.py").write_text("")
    importlib.invalidate_caches()
    importlib.import_module("made_up_four")
    assert seen == [1]


def test_a_module_that_is_not_there_stays_missing(modules):
    on_import("made_up_six", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="made_up_six"):
        importlib.import_module("made_up_six")
