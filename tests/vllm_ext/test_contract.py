"""What we use of vLLM: the installed one has it, and where another has not, that is said."""

import argparse
import ast
from pathlib import Path

import pytest

from kv_cache.errors import ParetoError
from vllm_ext import compat, contract, contract_command
from vllm_ext.compat import NAMES, Name
from vllm_ext.versions import SUPPORTED_VLLM, vllm_version

ROOT = Path(__file__).parents[2]


def test_the_installed_vllm_has_all_that_we_use():
    pytest.importorskip("vllm")
    found = contract.check(contract.installed_folder(), vllm_version())
    assert [verdict for verdict in found if verdict.state != contract.OK] == []
    assert len(found) > 60


def test_what_is_imported_from_the_table_is_in_it():
    for room in ("vllm_ext", "bench"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                used = set()
                if isinstance(node, ast.ImportFrom) and node.module == "vllm_ext.compat":
                    used = {alias.name for alias in node.names}
                elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "compat":
                    used = {node.attr}
                assert used <= {*NAMES, *vars(compat)}, path


def test_every_entry_is_for_releases_that_are_supported():
    for name, entry in NAMES.items():
        assert set(entry.releases) <= set(SUPPORTED_VLLM), name
        assert set(entry.moved) < set(entry.releases), name


def test_a_name_is_looked_up_when_it_is_asked_for(monkeypatch):
    import json

    monkeypatch.setitem(NAMES, "dumps", Name("json", "dumps"))
    monkeypatch.setitem(NAMES, "json_module", Name("json"))
    assert compat.dumps is json.dumps
    assert compat.json_module is json
    monkeypatch.setattr(json, "dumps", str)
    assert compat.dumps is str
    with pytest.raises(AttributeError, match="no attribute 'loads'"):
        compat.loads  # noqa: B018


def test_a_name_that_moved_is_looked_up_where_the_installed_release_has_it(monkeypatch):
    entry = Name("json.encoder", "JSONEncoder", moved={"0.32": "json"})
    assert entry.module_in("0.32") == "json"
    assert entry.module_in("0.33") == "json.encoder"
    monkeypatch.setitem(NAMES, "encoder", entry)
    for release, module in (("0.32", "json"), ("0.33", "json.encoder")):
        monkeypatch.setattr(compat, "vllm_release", lambda release=release: release)
        assert compat.module_of("encoder") == module


FILES = {
    "__init__.py": "",
    "_version.py": "__version__: str\n__version__ = version = '0.33.1'\n",
    "parts/__init__.py": "from .base import *\nfrom vllm.parts.kernels import run as start\n",
    "parts/base.py": (
        "from typing import Generic\n"
        "class Root(Generic[T]):\n"
        "    def __init__(self, size, *, deep=False):\n"
        "        self.size = size\n"
        "    def build(self, tokens, fast=False): ...\n"
        "class Layer(Root[int]):\n"
        "    kind: str = 'plain'\n"
        "    @staticmethod\n"
        "    def sizes(spec=None): ...\n"
        "@dataclass\n"
        "class Config:\n"
        "    width: int\n"
        "    bits: int = 4\n"
    ),
    "parts/kernels.py": (
        "if GPU:\n"
        "    from vllm.nowhere import run\n"
        "else:\n"
        "    def run(x, scale, out=None): ...\n"
        "try:\n"
        "    LIST = []\n"
        "except Exception:\n"
        "    pass\n"
        "def anything(*args, **kwargs): ...\n"
    ),
}


@pytest.fixture
def unpacked(tmp_path):
    """A made-up vLLM."""
    for name, text in FILES.items():
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def judge(monkeypatch, folder, **names):
    monkeypatch.setattr(contract, "NAMES", names)
    return [(verdict.state, verdict.reason) for verdict in contract.check(folder, "0.33.1")]


GOOD = {
    "module": Name("vllm.parts.kernels", has="run LIST"),
    "inherited": Name(
        "vllm.parts",
        "Layer",
        "kind size",
        calls={"__init__": "size"},
        overrides={"build": "tokens fast", "sizes": "spec"},
        wraps={"__init__": "deep"},
    ),
    "renamed": Name("vllm.parts", "start", calls={"": "x scale"}),
    "fields": Name("vllm.parts.base", "Config", "bits", calls={"__init__": "width"}),
    "open": Name("vllm.parts.kernels", "anything", calls={"": "whatever"}),
    "elsewhere": Name("vllm.gone", "Layer", moved={"0.33": "vllm.parts"}),
    "of another release": Name("vllm.gone", releases=("0.32",)),
}


def test_names_are_followed_to_where_they_are_defined(unpacked, monkeypatch):
    assert judge(monkeypatch, unpacked, **GOOD) == [(contract.OK, "")] * 6


@pytest.mark.parametrize(
    ("entry", "state", "reason"),
    [
        (Name("vllm.gone"), contract.MISSING, "there is no module vllm.gone"),
        (Name("vllm.parts", "Gone"), contract.MISSING, "vllm.parts has no Gone"),
        (Name("vllm.parts.kernels", has="LIST OTHER"), contract.MISSING, "it has no OTHER"),
        (Name("vllm.parts", "Layer", "size colour"), contract.MISSING, "it has no colour"),
        (Name("vllm.parts", "Layer", calls={"stop": ""}), contract.MISSING, "it has no stop"),
        (
            Name("vllm.parts", "start", calls={"": "x"}),
            contract.CHANGED,
            "start(x, scale, out): it needs scale, which we do not give",
        ),
        (
            Name("vllm.parts", "start", calls={"": "x scale into"}),
            contract.CHANGED,
            "start(x, scale, out): it does not take into",
        ),
        (
            Name("vllm.parts", "Layer", overrides={"build": "tokens"}),
            contract.CHANGED,
            "build(tokens, fast): ours has (tokens)",
        ),
        (
            Name("vllm.parts", "Layer", wraps={"__init__": "prefix"}),
            contract.CHANGED,
            "__init__(size, deep): it does not take prefix",
        ),
        (Name("vllm.parts.kernels", "LIST", calls={"": ""}), contract.CHANGED, "LIST is no function"),
    ],
)
def test_what_does_not_fit_is_said(unpacked, monkeypatch, entry, state, reason):
    assert judge(monkeypatch, unpacked, name=entry) == [(state, reason)]


def run(*words):
    parser = argparse.ArgumentParser()
    contract_command.add_arguments(parser)
    return contract_command.run(parser.parse_args(words))


def test_the_command_prints_every_name_and_fails_where_one_is_missing(unpacked, monkeypatch, capsys):
    monkeypatch.setattr(contract, "NAMES", GOOD)
    assert run("--source", str(unpacked)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"vLLM 0.33.1 in {unpacked}"
    assert lines[-1] == "6 names: 6 ok, 0 changed, 0 missing"
    assert lines[2].split() == ["ok", "inherited", "vllm.parts.Layer"]
    (unpacked / "vllm/parts/base.py").write_text("")
    assert run("--source", str(unpacked)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "missing  inherited vllm.parts.Layer: vllm.parts has no Layer" in lines
    assert lines[-1] == "6 names: 3 ok, 0 changed, 3 missing"


def test_the_command_compares_an_unknown_release_with_the_newest(unpacked, monkeypatch, capsys):
    monkeypatch.setattr(contract, "NAMES", GOOD)
    (unpacked / "vllm/_version.py").write_text("__version__ = version = '0.99.0+cpu'\n")
    run("--source", str(unpacked))
    assert capsys.readouterr().out.splitlines()[0] == f"vLLM 0.99.0 in {unpacked}, compared with {SUPPORTED_VLLM[-1]}"


def test_a_folder_without_vllm_is_bad_input(unpacked, tmp_path):
    with pytest.raises(ParetoError, match=r"does not hold an unpacked vLLM: there is no vllm/__init__\.py in it"):
        run("--source", str(tmp_path / "vllm"))
    (unpacked / "vllm/_version.py").unlink()
    with pytest.raises(ParetoError, match="does not say the version"):
        run("--source", str(unpacked))
