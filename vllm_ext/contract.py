"""Compares vLLM's source text with what ``compat.py`` expects of it: which names moved, and which take other arguments.

Nothing of vLLM is imported, so that this takes a second or two and also judges a vLLM that this machine cannot run.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kv_cache.errors import ParetoError
from vllm_ext.compat import NAMES, Name
from vllm_ext.versions import SUPPORTED_VLLM, release_of, vllm_version
from vllm_ext.vllm_source import Found, Parameters, Source

OK, CHANGED, MISSING = "ok", "changed", "missing"


@dataclass(frozen=True)
class Verdict:
    """What became of one name.

    Attributes:
        name: in ``compat.py``.
        place: where vLLM shall have it.
        state: "ok"; "missing", it or an attribute of it is not there; "changed", it takes other arguments.
        reason: what is wrong; "" if nothing is.

    """

    name: str
    place: str
    state: str
    reason: str = ""


def installed_folder() -> Path:
    """Return the folder that holds the installed vLLM's package, without importing it.

    Raises:
        ParetoError: vLLM is not installed.

    """
    vllm_version()
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ParetoError("vLLM's distribution is installed, but there is no package vllm")
    return Path(spec.origin).parents[1]


def version_in(folder: Path) -> str:
    """Return the version of the vLLM in a folder, as its own ``_version.py`` says it.

    Raises:
        ParetoError: there is no vLLM in the folder.

    """
    if not (folder / "vllm" / "__init__.py").is_file():
        raise ParetoError(f"{folder} does not hold an unpacked vLLM: there is no vllm/__init__.py in it")
    file = folder / "vllm" / "_version.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r"""^__version__ = .*['"]([^'"]+)['"]$""", text, re.MULTILINE)
    if found is None:
        raise ParetoError(f"{file} does not say the version: name the folder that a wheel of vLLM was unpacked into")
    return found[1].partition("+")[0]


def check(folder: Path, version: str) -> list[Verdict]:
    """Return what became of every name that is used with a version of vLLM.

    Args:
        folder: that holds the package.
        version: of it. One that is not supported is judged as the newest that is, to see what it would take.

    """
    release = release_of(version) or SUPPORTED_VLLM[-1]
    source = Source(folder)
    return [_judge(source, name, entry, release) for name, entry in NAMES.items() if release in entry.releases]


def _judge(source: Source, name: str, entry: Name, release: str) -> Verdict:
    module = entry.module_in(release)
    place = f"{module}.{entry.attribute}" if entry.attribute else module
    if not source.has_module(module):
        return Verdict(name, place, MISSING, f"there is no module {module}")
    if not entry.attribute:
        absent = [word for word in entry.has.split() if source.find(module, word) is None]
        return Verdict(name, place, MISSING, f"it has no {', '.join(absent)}") if absent else Verdict(name, place, OK)
    found = source.find(module, entry.attribute)
    if found is None:
        return Verdict(name, place, MISSING, f"{module} has no {entry.attribute}")
    members = source.members(found)
    methods = {*entry.calls, *entry.overrides, *entry.wraps} - {"", "__init__"}
    absent = [word for word in (*entry.has.split(), *sorted(methods)) if word not in members]
    if absent:
        return Verdict(name, place, MISSING, f"it has no {', '.join(absent)}")
    reasons = list(_changes(source, found, entry))
    return Verdict(name, place, CHANGED, "; ".join(reasons)) if reasons else Verdict(name, place, OK)


def _changes(source: Source, found: Found, entry: Name) -> Iterator[str]:
    """Yield what the name, or a method of it, no longer takes as we expect."""
    for part in (entry.calls, entry.wraps, entry.overrides):
        for method, words in part.items():
            takes = source.parameters(found, method)
            called = method or entry.attribute
            if takes is None:
                yield f"{called} is no function"
                continue
            reason = _difference(takes, words.split(), exact=part is entry.overrides, complete=part is entry.calls)
            if reason:
                yield f"{called}{takes}: {reason}"


def _difference(takes: Parameters, names: list[str], *, exact: bool, complete: bool) -> str:
    """Return what is wrong with a function's parameters; "" if nothing is.

    Args:
        takes: the function's.
        names: those that we know.
        exact: there must be no others.
        complete: all others must have default values.

    """
    if exact:
        return "" if list(takes.names) == names else f"ours has ({', '.join(names)})"
    reasons = []
    if refused := [name for name in names if not takes.takes(name)]:
        reasons.append(f"it does not take {', '.join(refused)}")
    if complete and (more := sorted(takes.required - set(names))):
        reasons.append(f"it needs {', '.join(more)}, which we do not give")
    return ", ".join(reasons)
