"""``pareto cache`` lists and clears what is this project's and not in use, and nothing else."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kv_cache import user_cache
from kv_cache.errors import ParetoError
from vllm_ext import cache_command, cli


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path))
    monkeypatch.delenv(user_cache.LIMIT_VARIABLE, raising=False)
    for place in (
        f"baselines/{'a' * 24}/logits-0000.bin", f"baselines/{'b' * 24}/logits-0000.bin",
        f"kv-scales/{'c' * 64}-3-6/kv_scales/x", f"samples/{'d' * 32}.safetensors", f"kernels/{'e' * 64}.cubin",
        "backends/autoawq-0.2.9/bin/python", "backends/autoawq-0.2.9.lock",
        "baselines/thesis/chapter1.txt", "notes.txt", "kernels/mine.txt",
    ):  # fmt: skip
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(bytes(1000))
    old = time.time() - 10 * 86_400
    os.utime(tmp_path / "baselines" / ("a" * 24), (old, old))
    return tmp_path


def run(*words):
    parser = cli.build_parser("cache", cache_command)
    return cache_command.run(parser.parse_args(words))


def test_it_lists(cache, capsys):
    assert run() == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{cache} (limit 46.57 GiB, PARETO_CACHE_LIMIT_GB=50)"
    assert [line.split()[:5] for line in out[1:3]] == [
        ["baselines", "2", "entries", "1.953", "KiB,"], ["kv-scales", "1", "entries", "1000", "B,"]
    ]  # fmt: skip
    run("list", "samples")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_it_clears_what_is_ours(cache, capsys):
    run("clear", "--unused-days", "5")
    assert "removed 1 entries, 1000 B" in capsys.readouterr().out
    assert not (cache / "baselines" / ("a" * 24)).exists()
    run("clear", "samples")
    assert [entry.kind for entry in user_cache.entries()].count("samples") == 0
    run("clear")
    left = sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())
    assert left == ["backends/autoawq-0.2.9.lock", "baselines/thesis/chapter1.txt", "kernels/mine.txt", "notes.txt"]


HOLD = """
import sys
from pathlib import Path
from kv_cache.user_cache import {how}
with {how}(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["using", "making"])
def test_what_another_process_uses_stays(cache, capsys, how):
    folder = cache / "baselines" / ("a" * 24)
    command = [sys.executable, "-c", HOLD.format(how=how), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert user_cache.is_being_made(folder) == (how == "making")
        run("clear", "baselines")
        assert f"in use or cannot be removed: {folder}" in capsys.readouterr().out
        assert (folder / "logits-0000.bin").is_file()
        other.stdin.close()
    run("clear", "baselines")
    assert not folder.exists()


def test_bad_words_get_one_line(cache, monkeypatch):
    with pytest.raises(ParetoError, match="unknown kind 'baseline'; valid: baselines, "):
        run("clear", "baseline")
    with pytest.raises(ParetoError, match="must not be negative"):
        run("clear", "--unused-days", "-1")
    monkeypatch.setenv(user_cache.LIMIT_VARIABLE, "much")
    with pytest.raises(ParetoError, match="PARETO_CACHE_LIMIT_GB=much is not a number"):
        run()
    assert len(user_cache.entries()) == 6


def test_whoever_waited_for_a_cleared_entry_makes_a_new_one(cache):
    folder = cache / "baselines" / ("a" * 24)
    with ThreadPoolExecutor(1) as pool, user_cache.making(folder):

        def wait():
            with user_cache.making(folder):
                return user_cache.is_being_made(folder)

        waiting = pool.submit(wait)
        time.sleep(0.2)
        folder.rename(cache / "gone")
    assert waiting.result()


def test_a_cache_that_cannot_be_written_gets_one_line(cache):
    with pytest.raises(ParetoError, match=r"notes\.txt/x: cannot be written \(Not a directory\)"), \
            user_cache.using(cache / "notes.txt" / "x"):  # fmt: skip
        pass
