"""What is known of a load tester: its command line, and where its results have which figure."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bench.lab.load_testers.load import Load
from kv_cache.errors import ParetoError


@dataclass(frozen=True)
class Target:
    """What a tool is pointed at.

    Attributes:
        url: base URL of the server.
        model: served model.
        tokenizer: folder of a tokenizer whose tokens the mock's words are.
        out: folder for the tool's results; it is there and empty.

    """

    url: str
    model: str
    tokenizer: Path
    out: Path


@dataclass(frozen=True)
class Said:
    """What a tool reports; None is what it does not say.

    Attributes:
        ok: requests that it calls successful.
        failed: requests that it calls failed.
        ttft_p50_ms: median of the time to the first token.
        ttft_p95_ms: its 95th percentile.
        tpot_ms: median of (last token - first token) / (tokens - 1), whatever the tool calls it.
        e2e_p50_ms: median from the start of a request to its end.
        requests_per_s: successful requests over the run's length.
        output_tokens: tokens of all successful answers.
        warnings: what it says of its own trustworthiness, or of errors, in its words.

    """

    ok: int
    failed: int | None
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    tpot_ms: float | None
    e2e_p50_ms: float | None
    requests_per_s: float | None
    output_tokens: float | None
    warnings: tuple[str, ...] = ()


class Tool(ABC):
    """A load tester with a command line.

    A new one is a file beside this and a line in :mod:`bench.lab.load_testers.tools.registry`.

    Attributes:
        name: of the tool, of its program and of its folder.
        requirement: what pip installs, pinned; None where it comes with this project or its engine.
        package: the distribution whose version is the tool's.
        variables: of the environment that it needs.

    """

    name: str
    requirement: str | None
    package: str
    variables: ClassVar[dict[str, str]] = {}

    def python(self, folder: Path) -> Path:
        """Return the Python that the tool lies beside; ``folder`` holds an environment for each tool."""
        return folder / self.name / "bin" / "python" if self.requirement else Path(sys.executable)

    def program(self, folder: Path) -> Path:
        """Return the tool's own program."""
        return self.python(folder).with_name(self.name)

    def lacks(self, load: Load) -> str | None:
        """Return why the tool cannot make such a load; None where it can."""
        return None

    @abstractmethod
    def words(self, load: Load, target: Target) -> list[str]:
        """Return the arguments of its program."""

    @abstractmethod
    def read(self, load: Load, out: Path) -> Said:
        """Return what its results say.

        Raises:
            ParetoError: there are none, or not in the form that is known.

        """


def result_file(out: Path, pattern: str) -> Path:
    """Return the one file of a run's results.

    Raises:
        ParetoError: it is not there.

    """
    found = sorted(out.glob(pattern))
    if len(found) != 1:
        raise ParetoError(f"no results: {len(found)} files {pattern} where one was expected")
    return found[0]


def read_results(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ParetoError: it is none.

    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ParetoError(f"{path.name}: {error}") from error
