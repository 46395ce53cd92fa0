"""Environments of other compression tools: what each needs, where it lies, and how it is made.

Each tool runs in a virtual environment of its own, because its packages contradict this package's (AutoAWQ and AutoGPTQ
want transformers of their time). It is made once, when the user says so, from the pinned list in ``runners/``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kv_cache.errors import ParetoError
from kv_cache.user_cache import cache_dir

RUNNERS = Path(__file__).with_name("runners")
READY = "ready"

Progress = Callable[[int, int, str], None]
"""Called with (done, in all or 0 where that is unknown, what happens now)."""


@dataclass(frozen=True)
class Backend:
    """A compression tool that runs in an environment of its own.

    Attributes:
        name: what ``--backend`` calls it.
        package: its distribution.
        runner: the script that runs it, in ``runners/``.
        recipe: the built-in recipe that it follows unless told otherwise.
        combinations: pairs of a step before the rounding (None: none) and the step that rounds, that it has.
        prunes: steps that prune, alone or before one of these that needs no other before it.
        bits: of a code, that it writes.
        symmetric: whether it writes codes without zero-points, with them, or both.
        activations: whether it writes checkpoints with rounded activations.
        ignores: whether it can leave single layers inside blocks alone.
        old_config: it reads config.json as transformers wrote it before version 5.

    """

    name: str
    package: str
    runner: str
    recipe: str
    combinations: tuple[tuple[str | None, str], ...]
    bits: tuple[int, ...]
    symmetric: tuple[bool, ...]
    prunes: tuple[str, ...] = ()
    activations: bool = False
    ignores: bool = False
    old_config: bool = True

    @property
    def lock(self) -> Path:
        """The file that pins its environment's packages."""
        return Path(__file__).with_name(f"{self.name}.lock")

    def pins(self) -> dict[str, str]:
        """Return its environment's packages and their versions."""
        lines = (line.strip() for line in self.lock.read_text().splitlines())
        return dict(line.split("==", 1) for line in lines if line and not line.startswith("#"))

    @property
    def version(self) -> str:
        """The version that the lock pins."""
        return self.pins()[self.package]


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "llm-compressor",
            "llmcompressor",
            "llm_compressor_runner.py",
            "gptq-w4",
            ((None, "rtn"), (None, "gptq"), ("awq", "rtn"), ("awq", "gptq"), ("smoothquant", "rtn"),
             ("smoothquant", "gptq")),
            bits=(2, 3, 4, 5, 6, 7, 8),
            symmetric=(True, False),
            prunes=("sparsegpt", "wanda"),
            activations=True,
            ignores=True,
            old_config=False,
        ),
        Backend("autoawq", "autoawq", "autoawq_runner.py", "awq-w4", (("awq", "rtn"),), bits=(4,), symmetric=(False,)),
        Backend(
            "autogptq", "auto-gptq", "autogptq_runner.py", "gptq-w4", ((None, "gptq"),),
            bits=(2, 3, 4, 8), symmetric=(True, False),
        ),
    )
}  # fmt: skip


def environment_python(backend: Backend, device: str, given: Path | None, *, create: bool, progress: Progress) -> Path:
    """Return the Python of a tool's environment.

    Args:
        backend: the tool.
        device: kind of torch device that it will compute on.
        given: the Python of an environment that the user made, or None.
        create: make the environment where there is none.
        progress: told how far the making is.

    Raises:
        ParetoError: there is none and ``create`` is false, or making it failed, or ``given`` lacks the tool.

    """
    if given is not None:
        _check_given(backend, given)
        return given
    # A CUDA build of torch is needed for a GPU and is gigabytes too many for a CPU.
    folder = cache_dir() / "backends" / f"{backend.name}-{backend.version}{'-cuda' if device == 'cuda' else ''}"
    python = folder / "bin" / "python"
    stamp = hashlib.sha256(backend.lock.read_bytes()).hexdigest()
    if _ready(folder, stamp):
        return python
    if not create:
        raise ParetoError(
            f"{backend.name} has no environment yet: --create-environment makes one in {folder} and installs "
            f"{backend.package} {backend.version} and {len(backend.pins()) - 1} other packages there (about "
            f"{6 if device == 'cuda' else 1.5} GB); or name a Python that has it with --backend-python"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        progress(0, 0, f"{backend.name}: waiting for another process that sets it up")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _ready(folder, stamp):
            _create(backend, folder, device, progress)
            # A virtual environment cannot be renamed into place; this file says that it is whole.
            (folder / READY).write_text(stamp)
    return python


def _ready(folder: Path, stamp: str) -> bool:
    ready = folder / READY
    return ready.is_file() and ready.read_text() == stamp


def _check_given(backend: Backend, python: Path) -> None:
    probe = f"import importlib.metadata as m; print(m.version({backend.package!r}))"
    try:
        done = subprocess.run(
            [python, "-c", probe], capture_output=True, text=True, timeout=60, check=False, env=clean_environment()
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ParetoError(f"--backend-python {python}: not a Python that runs ({error})") from error
    if done.returncode:
        raise ParetoError(f"--backend-python {python}: {backend.package} is not installed there")


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what would lead another Python to this one's packages."""
    foreign = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    return kept | {"PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def _create(backend: Backend, folder: Path, device: str, progress: Progress) -> None:
    pins = backend.pins()
    total = len(pins) + 1
    progress(0, total, f"{backend.name}: creating {folder}")
    if folder.exists():
        shutil.rmtree(folder)
    _run([sys.executable, "-m", "venv", str(folder)], backend, lambda line: None)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    torch = pins.pop("torch")
    progress(0, total, f"{backend.name}: installing torch {torch}")
    plain = [*pip, f"torch=={torch}"]
    try:
        # The CPU build has a version of its own, which the index may or may not have.
        _run(plain if device == "cuda" else [*pip, "--no-deps", f"torch=={torch}+cpu"], backend, lambda line: None)
    except ParetoError:
        if device == "cuda":
            raise
        _run(plain, backend, lambda line: None)
    done = 1

    def show(line: str) -> None:
        nonlocal done
        if line.startswith(("Collecting ", "Processing ")):
            done = min(done + 1, total - 1)
            progress(done, total, f"{backend.name}: {line.split()[1].split('==', maxsplit=1)[0]}")

    # What builds the packages that come as source must be there before them.
    build = [f"{name}=={pins[name]}" for name in ("setuptools", "wheel") if name in pins]
    _run([*pip, "--no-deps", *build], backend, lambda line: None)
    rest = [f"{name}=={version}" for name, version in pins.items()]
    _run([*pip, "--no-deps", "--no-build-isolation", *rest], backend, show)


def _run(command: list[str], backend: Backend, show: Callable[[str], None]) -> None:
    """Run a command, its lines shown as they come.

    Raises:
        ParetoError: it failed; with its last line that speaks of an error.

    """
    last: deque[str] = deque(maxlen=40)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean_environment()
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                last.append(line.strip())
                show(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        errors = [line for line in last if "error" in line.lower()] or [line for line in last if line] or ["no output"]
        raise ParetoError(f"{backend.name}: setting up its environment failed: {errors[-1][:300]}")
