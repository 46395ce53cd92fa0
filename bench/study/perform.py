"""Does one step of a study in a process of its own: ``python -m bench.study.perform OUT KEY``.

Every command of ``pareto`` runs as a child of this process: an engine frees its memory only when its process ends.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO

from bench.environment import environment, gpu_names
from bench.files import read_json
from bench.server import child, serving
from bench.study.folder import LOG, Folder, Outcome
from bench.study.step import CHECKPOINTS, OUT, Step
from kv_cache.errors import ParetoError
from kv_cache.user_cache import making

PARETO = (sys.executable, "-m", "vllm_ext.cli")
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PARENT_DEATH = 1
"""Linux's PR_SET_PDEATHSIG."""


def perform(folder: Folder, key: str) -> Outcome:
    """Do a step, or go on with it, and keep how it ended.

    Raises:
        KeyboardInterrupt: it was interrupted; then nothing is kept but what its command keeps itself.

    """
    step = folder.read(key)
    # A study that was killed leaves its step a moment to end itself.
    with making(folder.of(key)):
        # Somebody else may have done it while this process waited.
        if (known := folder.outcome(step)) is not None and known.status == "done":
            return known
        before = known.seconds if known is not None else 0.0
        started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
        error = partial = ""
        try:
            partial = _do(step, folder)
        except ParetoError as failure:
            error = " ".join(str(failure).split())
        except OSError as failure:
            error = f"{failure.filename or folder.of(key)}: {failure.strerror or failure}"
        seconds = round(before + time.monotonic() - clock, 1)
        outcome = Outcome("failed" if error else "done", error or partial, started, seconds, environment())
        folder.finish(key, outcome)
    return outcome


def _do(step: Step, folder: Folder) -> str:
    """Run a step's commands.

    Returns:
        Why some of what it measures side by side could not be measured; empty if all was.

    Raises:
        ParetoError: one failed; with its own reason.

    """
    _check_machine(step)
    result, log = folder.result(step.key), folder.of(step.key) / LOG
    # A checkpoint is renamed into place when it is whole: it is there if only the note of it is missing.
    if step.kind in CHECKPOINTS and (result / step.result).is_file():
        return ""
    words = [_word(word, folder, result) for word in step.words]
    partial = ""
    if not step.serve:
        try:
            with log.open("wb") as file:
                _run(words, file, log)
        except ParetoError as error:
            if not _some_measured(step, result):
                raise
            partial = str(error)
    else:
        serve = [_word(word, folder, result) for word in step.serve]
        with serving(serve, folder.of(step.key) / "server.txt") as server, log.open("wb") as file:
            _run([*words, f"--base-url={server.base_url}"], file, log)
    if not (result / step.result).is_file():
        raise ParetoError(f"the command ended well and left no {step.result}; its log is {log}")
    if step.kind == "load" and (read_json(result / step.result) or {}).get("status") != "complete":
        raise ParetoError("the load test was interrupted")
    return partial


def _some_measured(step: Step, result: Path) -> bool:
    """Return whether a step that measures several dtypes side by side has figures of some, though another failed."""
    if step.kind not in ("served", "speed"):
        return False
    found = read_json(result / step.result) or {}
    return found.get("status") == "complete" and any(one.get("points") for one in found.get("dtypes", []))


def _check_machine(step: Step) -> None:
    if step.gpu is not None:
        names = gpu_names()
        if not any(step.gpu.lower() in name.lower() for name in names):
            found = ", ".join(names) or "no GPU"
            raise ParetoError(f"this machine has {found}, and hardware {step.hardware} of the plan is a {step.gpu}")


def _word(word: str, folder: Folder, result: Path) -> str:
    """Return a word with real paths in place of what stands for them."""
    made = word.replace(OUT, str(result))
    return re.sub(r"\{checkpoint:([^}]+)\}", lambda match: str(folder.result(match[1]).resolve()), made)


def _run(words: list[str], file: IO[bytes], log: Path) -> None:
    with child([*PARETO, *words], file.fileno()) as process:
        status = process.wait()
    if status != 0:
        raise ParetoError(_reason(log.read_text(errors="replace"), words[0], status))


def _reason(text: str, command: str, status: int) -> str:
    """Return why a command failed, from what it printed: its own line for that, or the last one."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    own = [line for line in lines if re.match(rf"pareto {command}: (error|failed): ", line)]
    if own:
        return own[-1].partition(": ")[2].removeprefix("error: ").removeprefix("failed: ")[:500]
    ended = f"ended by signal {-status}" if status < 0 else f"status {status}"
    return f"pareto {command}: {ended}: {lines[-1][:300] if lines else 'no output'}"


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind once: a second signal would leave the command running that the first one is stopping."""
    for each in STOPPING:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Run as a program; the exit status is 0 for a step that is done and 1 for one that failed."""
    for number in STOPPING:
        signal.signal(number, _stop)
    # Ray's workers block Ctrl-C's signal, and their children would inherit that.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if sys.platform == "linux":
        # A study that is killed outright takes its step with it, as one that is interrupted does.
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(PARENT_DEATH, signal.SIGTERM)
        if os.getppid() != parent:
            return 130
    try:
        outcome = perform(Folder(Path(sys.argv[1])), sys.argv[2])
    except KeyboardInterrupt:
        return 130
    return 0 if outcome.status == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
