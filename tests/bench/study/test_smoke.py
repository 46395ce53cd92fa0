"""The plan that CI runs, with engines: every kind of step once, then again with nothing to do, then its pack."""

import json
import os
import subprocess
import sys

import pytest

from bench.study.pack import verify

RUN = "import argparse, sys; from bench.study import command as c; p = argparse.ArgumentParser(); c.add_arguments(p); "


@pytest.mark.engine
def test_the_smoke_plan_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "out"
    # Not through the entry point, which an older installation of this package does not have.
    command = [sys.executable, "-c", RUN + "sys.exit(c.run(p.parse_args()))", "smoke", "--out", str(out), "--pack"]
    # Engines in the process of whoever asks them start in half the time.
    quick = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment = os.environ | quick | {"PARETO_CACHE": str(tmp_path / "cache")}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "5 of 5 steps done" in first.stdout
    study = json.loads((out / "plans/smoke/study.json").read_text())
    verdicts = {one["name"]: one["verdict"] for one in study["hypotheses"]}
    assert verdicts == {"memory": "held", "divergence": "not decidable"}
    both = next(point for point in study["points"] if point["weights"] == "w4")
    for key in ("kl", "needle", "perplexity", "memory_bytes", "ttft_p50_ms", "output_tokens_per_s"):
        assert both["figures"][key]["value"] >= 0
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "started" not in again.stderr
    assert verify(out / "plans/smoke/smoke.tar") == 0
    assert "and the same page" in capsys.readouterr().out
