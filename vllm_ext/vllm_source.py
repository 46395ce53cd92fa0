"""Reads vLLM's source text without importing it: which names a module has, and what a function's parameters are.

A vLLM for another device than this machine's cannot be imported, and one that can takes seconds. So names are followed
through the text: over ``from x import y`` to where they are defined, and over the bases of a class.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Parameters:
    """What a function takes, without ``self`` and ``cls``.

    Attributes:
        names: in their order; ``*args`` and ``**kwargs`` with their stars.
        required: those without a default value.

    """

    names: tuple[str, ...]
    required: frozenset[str]

    def takes(self, name: str) -> bool:
        """Return whether the function can be given an argument of that name."""
        return name in self.names or any(found.startswith("**") for found in self.names)

    def __str__(self) -> str:
        return f"({', '.join(self.names)})"


@dataclass(frozen=True)
class Found:
    """Where a name is defined.

    Attributes:
        module: there.
        node: a class, a function, or the statement that gives the name its value.

    """

    module: str
    node: ast.stmt


class Source:
    """The text of an unpacked package.

    Args:
        folder: the one that holds the package's own.

    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trees: dict[str, list[ast.stmt] | None] = {}

    def has_module(self, module: str) -> bool:
        """Return whether there is such a module."""
        return self._body(module) is not None

    def find(self, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Found | None:
        """Return where a name of a module is defined; None if the module or the name is not there."""
        body = self._body(module)
        if body is None or (module, name) in seen:
            return None
        seen |= {(module, name)}
        stars: list[str] = []
        # A module may define a name in several branches, one for each device. The first that leads somewhere counts.
        for node in _flat(body):
            if isinstance(node, ast.ImportFrom):
                source = self._imported_module(module, node)
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(source)
                    elif (alias.asname or alias.name) == name:
                        found = self.find(source, alias.name, seen)
                        if found is None and self.has_module(f"{source}.{alias.name}"):
                            return Found(f"{source}.{alias.name}", node)
                        if found is not None:
                            return found
            elif name in _defined(node):
                return Found(module, node)
        return next((found for star in stars if (found := self.find(star, name, seen)) is not None), None)

    def members(self, found: Found) -> dict[str, ast.stmt]:
        """Return a class's attributes and methods, those of its bases included, by name."""
        if not isinstance(found.node, ast.ClassDef):
            return {}
        own: dict[str, ast.stmt] = {}
        for node in _flat(found.node.body):
            for name in _defined(node):
                # A property and its setter have one name; so have the overloads of a method.
                own.setdefault(name, node)
        for function in ast.walk(found.node):
            if isinstance(function, ast.Assign | ast.AnnAssign):
                for target in _targets(function):
                    if isinstance(target, ast.Attribute) and ast.unparse(target.value) in ("self", "cls"):
                        own.setdefault(target.attr, function)
        for base in self._bases(found):
            for name, node in self.members(base).items():
                own.setdefault(name, node)
        return own

    def parameters(self, found: Found, method: str = "") -> Parameters | None:
        """Return what a function takes, or a method of a class; None if it is no function.

        A dataclass without ``__init__`` takes its fields.
        """
        if not method:
            return _parameters(found.node, bound=False)
        members = self.members(found)
        node = members.get(method)
        if node is not None:
            static = isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list
            )
            return _parameters(node, bound=not static)
        if method != "__init__":
            return None
        fields = {name: field for name, field in members.items() if isinstance(field, ast.AnnAssign)}
        required = frozenset(name for name, field in fields.items() if field.value is None)
        return Parameters(tuple(fields), required)

    def _bases(self, found: Found) -> Iterator[Found]:
        assert isinstance(found.node, ast.ClassDef)
        for base in found.node.bases:
            # AttentionImplBase[T] is a class too.
            name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            if name != found.node.name and (at := self.find(found.module, name)) is not None:
                yield at

    def _body(self, module: str) -> list[ast.stmt] | None:
        if module not in self._trees:
            path = self._path(module)
            self._trees[module] = None if path is None else ast.parse(path.read_text(encoding="utf-8")).body
        return self._trees[module]

    def _path(self, module: str) -> Path | None:
        base = self.folder.joinpath(*module.split("."))
        return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)

    def _imported_module(self, module: str, node: ast.ImportFrom) -> str:
        """Return the module that a statement of a module imports from, ``from .x`` included."""
        if not node.level:
            return node.module or ""
        path = self._path(module)
        parts = module.split(".")
        up = node.level - (1 if path is not None and path.name == "__init__.py" else 0)
        parts = parts[: len(parts) - up]
        return ".".join([*parts, *([node.module] if node.module else [])])


def _flat(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, and those in the branches of ``if`` and ``try``."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _flat(getattr(node, part, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _flat(handler.body)


def _targets(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return [part for target in node.targets for part in getattr(target, "elts", [target])]
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    return [target.id for target in _targets(node) if isinstance(target, ast.Name)]


def _parameters(node: ast.stmt, *, bound: bool) -> Parameters | None:
    if not isinstance(node, ast.FunctionDef):
        return None
    found = node.args
    places = [*found.posonlyargs, *found.args]
    required = [arg.arg for arg in places[: len(places) - len(found.defaults)]]
    required += [arg.arg for arg, default in zip(found.kwonlyargs, found.kw_defaults, strict=True) if default is None]
    names = [arg.arg for arg in places][1 if bound else 0 :]
    if found.vararg:
        names.append(f"*{found.vararg.arg}")
    names += [arg.arg for arg in found.kwonlyargs]
    if found.kwarg:
        names.append(f"**{found.kwarg.arg}")
    return Parameters(tuple(names), frozenset(required) & frozenset(names))
