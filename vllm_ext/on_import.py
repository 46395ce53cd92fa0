"""Does something to a module when it is imported: now if it already is, else at that moment.

vLLM loads plugins in every process, also in those that never build a model. To change an attention layer there, its
module would have to be imported, with a thousand others. Waiting for it costs nothing.
"""

from __future__ import annotations

import importlib.abc
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec

Action = Callable[[], None]


class _Waiting(importlib.abc.MetaPathFinder):
    """Stands before Python's own finders and lets them find; what they find, it makes call the actions."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return another finder's answer; None for a module that nobody waits for."""
        if fullname not in self.actions:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            # Not before: an import that failed may be tried again.
            for action in self.actions.pop(fullname, []):
                action()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_WAITING = _Waiting()


def on_import(module: str, action: Action) -> None:
    """Call ``action`` once, as soon as a module of that name has been imported."""
    if module in sys.modules:
        action()
        return
    _WAITING.actions.setdefault(module, []).append(action)
    if _WAITING not in sys.meta_path:
        sys.meta_path.insert(0, _WAITING)
