"""Starts ``pareto serve`` and other commands for a while, and leaves no process behind."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from kv_cache.errors import ParetoError

HOST = "127.0.0.1"
TAIL_LINES = 12
SERVE = (sys.executable, "-m", "vllm_ext.cli", "serve")


@dataclass(frozen=True)
class Server:
    """A server that answers: its address and its log."""

    base_url: str
    log: Path
    pid: int


@dataclass(frozen=True)
class Starting:
    """A server that was started and need not answer yet."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def wait(self, timeout_s: float = 600) -> Server:
        """Return the server as soon as it answers.

        Raises:
            ParetoError: it ended or did not answer in time; the message has the end of its log.

        """
        _wait(self.process, self.port, self.log, timeout_s)
        return Server(f"http://{HOST}:{self.port}", self.log, self.process.pid)


@contextlib.contextmanager
def starting(
    words: Sequence[str],
    log: Path,
    *,
    grace_s: float = 20,
    program: Sequence[str] = SERVE,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Starting]:
    """Run ``pareto serve`` with ``words`` on a free loopback port until the block ends; several start at once so.

    The server and all its workers form a process group of their own, which is stopped whatever happens: the block ends
    or raises, Ctrl-C, or a termination signal to this process.

    Args:
        words: arguments of ``pareto serve`` without host and port.
        log: file for everything it prints.
        grace_s: how long it may take to stop before it is killed.
        program: what is started in place of ``pareto serve``; takes the same host and port.
        variables: of the environment, beside those of this process.

    """
    port = free_port()
    command = [*program, *words, "--host", HOST, "--port", str(port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file, terminated_like_interrupted():
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(variables or {})},
        )
        try:
            yield Starting(process, port, log)
        finally:
            stop_group(process, grace_s)


@contextlib.contextmanager
def serving(
    words: Sequence[str],
    log: Path,
    *,
    timeout_s: float = 600,
    grace_s: float = 20,
    program: Sequence[str] = SERVE,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Start a server as :func:`starting` does and give it when it answers, within ``timeout_s``.

    Raises:
        ParetoError: it ended or did not answer in time; the message has the end of its log.

    """
    with starting(words, log, grace_s=grace_s, program=program, variables=variables) as server:
        yield server.wait(timeout_s)


def run_pareto(words: Sequence[str], log: Path) -> None:
    """Run a ``pareto`` command to its end, interrupted when this process is.

    Args:
        words: the command and its arguments.
        log: file for everything it prints.

    Raises:
        ParetoError: its status is not 0; the message has its last line.

    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file, child([sys.executable, "-m", "vllm_ext.cli", *words], file.fileno()) as process:
        status = process.wait()
    if status != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise ParetoError(
            f"pareto {words[0]} failed with status {status}: {lines[-1][:300] if lines else 'no output'} (log: {log}); "
            "run the same command to go on"
        )


def free_port() -> int:
    """Return a TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        status = process.poll()
        if status is not None:
            raise ParetoError(f"the server ended with status {status} before it answered; {_tail(log)}")
        if _healthy(port):
            return
        time.sleep(0.3)
    raise ParetoError(f"the server did not answer within {timeout_s:.0f} s; {_tail(log)}")


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if not lines:
        return f"its log {log} is empty"
    return "\n".join([f"the end of its log {log}:", *(f"  {line[:300]}" for line in lines[-TAIL_LINES:])])


@contextlib.contextmanager
def child(
    command: list[str], output: int, grace_s: float = 20, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own, interrupted and then stopped when the block is left early.

    Args:
        command: the program and its arguments.
        output: descriptor of the file for everything it prints.
        grace_s: how long it may take to end once it is interrupted.
        variables: of its environment, beside this process's own.

    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, **(variables or {})},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            # As Ctrl-C does: the command keeps what it has finished.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=grace_s)
        stop_group(process, grace_s=5)


def stop_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Stop a process group: ask, wait, then kill whatever is left of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and _group_lives(process):
        time.sleep(0.1)
    # Also after a clean end of its leader: a worker may have outlived it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # Reaps the leader, which would keep the group alive as a zombie.
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # macOS says so of a group that has only zombies.
        return False
    return True


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that cleanups run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, unwind) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
