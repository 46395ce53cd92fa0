"""The server's life and death, with stand-ins that misbehave as servers do."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request

import pytest

from bench.server import free_port, serving
from kv_cache.errors import ParetoError

# Writes its worker's pid; the worker ignores polite requests, as one stuck in a kernel would.
SERVER = """
import http.server, os, subprocess, sys, time
place, mode = sys.argv[1], sys.argv[2]
port = int(sys.argv[sys.argv.index("--port") + 1])
worker = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
open(place, "w").write(str(worker.pid))
print("loading the model", flush=True)
if mode == "dies":
    sys.exit("RuntimeError: the model is too large")
if mode == "hangs":
    time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def program(tmp_path):
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    return [sys.executable, str(script), str(tmp_path / "worker.pid")]


def lives(tmp_path):
    """Whether the worker that the server started is still running (a zombie is not)."""
    pid = int((tmp_path / "worker.pid").read_text())
    for _ in range(50):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return False
        except OSError:
            return False
        time.sleep(0.05)
    return True


def test_it_answers_inside_and_is_gone_with_its_workers_after(program, tmp_path):
    with serving(["well"], tmp_path / "log", timeout_s=30, grace_s=0.5, program=program) as server:
        assert urllib.request.urlopen(server.base_url + "/health", timeout=5).status == 200
        assert lives(tmp_path)
    assert not lives(tmp_path)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(server.base_url + "/health", timeout=5)


def test_an_error_inside_stops_it_too(program, tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        serving(["well"], tmp_path / "log", timeout_s=30, grace_s=0.5, program=program),
    ):
        raise ZeroDivisionError
    assert not lives(tmp_path)


def test_a_server_that_dies_shows_the_end_of_its_log(program, tmp_path):
    with (
        pytest.raises(ParetoError, match=r"(?s)status 1 before it answered.*loading the model.*the model is too large"),
        serving(["dies"], tmp_path / "log", timeout_s=30, grace_s=0.5, program=program),
    ):
        pytest.fail("it never answered")
    assert not lives(tmp_path)


def test_a_server_that_hangs_is_stopped_after_the_timeout(program, tmp_path):
    with (
        pytest.raises(ParetoError, match=r"(?s)did not answer within 2 s.*loading the model"),
        serving(["hangs"], tmp_path / "log", timeout_s=2, grace_s=0.5, program=program),
    ):
        pytest.fail("it never answered")
    assert not lives(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_the_owner_leave_nothing_behind(program, tmp_path, number):
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(f"""
                import signal, time
                from pathlib import Path
                from bench.server import serving
                signal.signal(signal.SIGINT, signal.default_int_handler)  # Ignored in the background.
                with serving(["well"], Path({str(tmp_path / "log")!r}), grace_s=0.5, program={program!r}):
                    print("up", flush=True)
                    time.sleep(600)
            """),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert owner.stdout.readline() == b"up\n"
    assert lives(tmp_path)
    os.kill(owner.pid, number)
    owner.wait(timeout=30)
    owner.stdout.close()
    assert not lives(tmp_path)


def test_free_ports_can_be_listened_on():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
