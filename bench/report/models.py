"""Which model a result is of: its fingerprint where a result has one, and its whole name where only that is known."""

from __future__ import annotations

from pathlib import Path


def short_model(name: str) -> str:
    """Return the last part of a path or hub name."""
    return Path(name.rstrip("/")).name or name


class Models:
    """The models that results name.

    Evaluations and speed measurements know a model's fingerprint. Load tests know a name, which belongs to the model
    that another result called so; the last part of a name is enough only where one model alone has it.
    """

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}
        self.notes: list[str] = []

    def add(self, fingerprint: str, name: str) -> str:
        """Return the identity of a model with a fingerprint."""
        names = self._names.setdefault(fingerprint, [])
        if name not in names:
            names.append(name)
        return fingerprint

    def named(self, name: str, source: object) -> str:
        """Return the identity of a model of which only a name is known; ``source`` is the file that names it."""
        for matches in (
            [identity for identity, names in self._names.items() if name in names],
            [identity for identity, names in self._names.items() if short_model(name) in map(short_model, names)],
        ):
            if len(matches) == 1:
                return self.add(matches[0], name)
            if matches:
                self.notes.append(
                    f"{source}: {len(matches)} models are called {name!r}; its figures have a row of their own, since "
                    "it does not say which one it is of (pareto loadtest --label NAME says it)"
                )
                return self.add(f"name {name}", name)
        return self.add(f"name {name}", name)

    def labels(self) -> dict[str, str]:
        """Return what to call each model: the last part of its name, or as much more as tells it from the others."""
        firsts = {identity: names[0] for identity, names in self._names.items()}
        made = {}
        for identity, name in firsts.items():
            others = [other for key, other in firsts.items() if key != identity]
            parts = Path(name.rstrip("/")).parts or (name,)
            for count in range(1, len(parts) + 1):
                label = "/".join(parts[-count:]).replace("//", "/")
                if all(Path(other.rstrip("/")).parts[-count:] != parts[-count:] for other in others):
                    break
            else:
                known = "" if identity.startswith("name ") else f" [{identity[:8]}]"
                label = f"{short_model(name)}{known}"
            made[identity] = label
        return made
