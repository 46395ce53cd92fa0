"""What the runners share: reading their job, telling how far they are, and writing what came of it.

The runners are standalone scripts: the Python of a foreign tool's environment runs them, with this folder on its path
and nothing else of this package. They use nothing newer than Python 3.9. The job is a JSON file; see
``foreign_run.write_job``. Progress goes as JSON lines into a pipe of its own, because the tools print as they please.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
from typing import Any


class Job:
    """The job of this process.

    Attributes:
        settings: the job file's content.

    """

    def __init__(self) -> None:
        """Read the job file named on the command line, and let the tool's own progress bars report to the parent."""
        with open(sys.argv[1], encoding="utf-8") as file:
            self.settings: dict[str, Any] = json.load(file)
        self._pipe = os.fdopen(self.settings["progress_fd"], "w", encoding="utf-8")
        self._started = time.monotonic()
        self._watch_bars()

    def __getitem__(self, name: str) -> Any:
        """Return a setting."""
        return self.settings[name]

    def tell(self, what: str, done: int = 0, total: int = 0) -> None:
        """Tell the parent what happens now; a total of 0 says that its length is unknown."""
        self._pipe.write(json.dumps({"what": what, "done": done, "total": total}) + "\n")
        self._pipe.flush()

    def tokens(self) -> Any:
        """Return the calibration tokens, int64 [sequences, length], on the CPU; None for a method without data."""
        from safetensors.torch import load_file

        return load_file(self["tokens"])["tokens"] if self["tokens"] else None

    def dtype(self) -> Any:
        """Return the torch dtype to load the model in."""
        import torch

        return getattr(torch, self["dtype"])

    def start_clock(self) -> None:
        """Start the time and the device's peak memory: imports are over, the model is loaded next."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._started = time.monotonic()

    def finish(self, packages: list[str], shims: list[str]) -> None:
        """Write the result file: the checkpoint is complete.

        Args:
            packages: distributions whose versions determine the result.
            shims: what of the tool had to be changed to run here, one line each.

        """
        import torch

        result = {
            "seconds": time.monotonic() - self._started,
            "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_device_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "versions": {"python": sys.version.split()[0]}
            | {name: importlib.metadata.version(name) for name in packages},
            "shims": shims,
        }
        with open(self["result"], "w", encoding="utf-8") as file:
            json.dump(result, file)

    def _watch_bars(self) -> None:
        from tqdm import std

        job, latest = self, [0.0]

        def display(self: Any, *_: Any, **__: Any) -> bool:
            now = time.monotonic()
            if now - latest[0] > 0.3 or self.n == self.total:
                latest[0] = now
                job.tell(self.desc.rstrip(": ") or self.unit, int(self.n), int(self.total or 0))
            return True

        std.tqdm.display = display
