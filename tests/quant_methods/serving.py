"""Serves checkpoints by engine_logits.py in processes that are kept: importing vLLM takes longer than an engine."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path


class Server:
    """A process of engine_logits.py that waits for checkpoints."""

    def __init__(self, *, plugin: bool) -> None:
        settings = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            # By default vLLM's CPU kernel rounds the activations of 4-bit layers to 8 bits too, where the CPU has AMX.
            "VLLM_CPU_INT4_W4A8": "0",
            "VLLM_PLUGINS": "pareto" if plugin else "",
            "VLLM_PARETO_LOW_BIT_KERNEL": "1" if plugin else "0",
        }
        self.folder = tempfile.TemporaryDirectory()
        self.log = Path(self.folder.name, "log")
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        answers, answer = os.pipe()
        self.answers = os.fdopen(answers)
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("engine_logits.py"), str(answer)],
            env={**os.environ, **settings}, cwd=self.folder.name, stdin=subprocess.PIPE, stdout=log,
            stderr=subprocess.STDOUT, pass_fds=[answer], text=True,
        )  # fmt: skip
        os.close(answer)
        os.close(log)
        atexit.register(self.stop)

    def serve(self, tokens: Path, out: Path, checkpoints: list[Path]) -> tuple[str, bool]:
        """Return what was printed, and whether more can be served: a refusal may leave half an engine behind."""
        stdin = self.process.stdin
        assert stdin is not None
        begun = self.log.stat().st_size
        stdin.write(json.dumps([str(tokens), str(out), *map(str, checkpoints)]) + "\n")
        stdin.flush()
        answer = self.answers.readline()
        printed = self.log.read_bytes()[begun:].decode(errors="replace")
        assert answer, printed[-3000:]
        return printed, json.loads(answer)

    def stop(self) -> None:
        """Let the process end."""
        self.process.communicate()
        self.answers.close()
        self.folder.cleanup()
        atexit.unregister(self.stop)


_IDLE: dict[bool, list[Server]] = {False: [], True: []}


def serve(tokens: Path, out: Path, checkpoints: Iterable[Path], *, plugin: bool) -> str:
    """Run engines, and return what they printed.

    Args:
        tokens: a file with the prompts, a JSON list of lists of token ids.
        out: where ``NAME.pt`` of each checkpoint is written, see ``engine_logits.py``.
        checkpoints: folders; what is refused comes last.
        plugin: whether the plugin is there.

    """
    try:
        server = _IDLE[plugin].pop()
    except IndexError:
        server = Server(plugin=plugin)
    printed, usable = server.serve(tokens, out, list(checkpoints))
    if usable:
        _IDLE[plugin].append(server)
    else:
        server.stop()
    return printed
