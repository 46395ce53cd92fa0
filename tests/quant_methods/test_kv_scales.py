"""The process that makes KV scales alone, and its lines of progress."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kv_cache.scales import SCALES_FILE, KVScales
from quant_methods.kv_scales import main, on_cpu
from quant_methods.progress import Lines


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quant_methods.kv_scales", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)


def test_scales_are_made_of_the_shipped_text(tiny_model: Path, tmp_path: Path) -> None:
    done = run(tiny_model, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^KV scales: done in \d+ s$", done.stdout, re.MULTILINE)
    scales = KVScales.load(tmp_path)
    assert [scales.shape(index) for index in range(scales.num_layers)] == [(1, 64)] * 3
    assert scales.layer(0).rotary.max_position == 256
    # 16 windows, as long as the model's context, and the first tokens.
    assert scales.metadata["calibration_tokens"] == 16 * 256 + 256
    spread = scales.layer(0).key_transform
    assert torch.isfinite(spread).all()


def test_large_models_are_shown_less_on_a_cpu() -> None:
    assert [on_cpu(count, 1024) for count in (10**6, 106_000_000, 400_000_000, 7 * 10**9)] == [16, 16, 9, 4]


def test_failures_end_with_one_clear_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # The command sets it too.
    shutil.copytree(tiny_model, tmp_path / "broken")
    config = json.loads((tmp_path / "broken" / "config.json").read_text())
    (tmp_path / "broken" / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    assert main([str(tmp_path / "broken"), str(tmp_path / "out")]) == 1
    assert "transformers cannot build this model" in capsys.readouterr().out.splitlines()[-1]
    assert not (tmp_path / "out" / SCALES_FILE).exists()
    assert main([str(tiny_model), str(tmp_path / "out"), "--device", "nowhere"]) == 1
    assert "--device nowhere is not available here" in capsys.readouterr().out.splitlines()[-1]


def test_lines_come_while_a_step_takes_long() -> None:
    said: list[str] = []

    def more(count: int) -> None:
        wanted = len(said) + count
        while len(said) < wanted:  # the suite's time limit ends a thread that says nothing
            time.sleep(0.01)

    with Lines("recipe", said.append, every=0.02) as lines:
        lines.show(1, 3, "block 2/3")
        more(3)
        assert re.fullmatch(r"recipe: block 2/3, \d+ s", said[-1])
        lines.show(3, 3, "writing")
        more(2)
        assert re.fullmatch(r"recipe: writing \(3 of 3 blocks done\), \d+ s", said[-1])
    count = len(said)
    time.sleep(0.1)
    assert len(said) == count
    with pytest.raises(ZeroDivisionError), Lines("recipe", said.append, every=100):
        raise ZeroDivisionError
    assert len(said) == count


def test_a_short_run_leaves_lines_in_a_log_too() -> None:
    said: list[str] = []
    with Lines("recipe", said.append, every=100, milestones=True) as lines:
        for done in range(31):
            lines.show(done, 30, f"block {min(done + 1, 30)}/30")
            lines.show(done, 30, "another step of the same block")
    counts = [int(re.fullmatch(r"recipe: (\d+) of 30 blocks done, \d+ s", line)[1]) for line in said]
    assert counts == [1, *range(3, 31, 3)]
