import json

import pytest

from bench.lab import startup
from kv_cache.errors import ParetoError


@pytest.fixture
def jobs(monkeypatch):
    """Starts that take as long as their number, fp8's first one not at all; on a machine of two GPUs."""
    made = []

    def start(job):
        made.append(job)
        if job.dtype == "fp8" and "empty" in job.log.name:
            raise ParetoError("no memory")
        return {"ready_s": 1.0, "first_token_s": float(len(made))}

    monkeypatch.setattr(startup, "start", start)
    monkeypatch.setattr(startup, "visible_gpus", lambda: ["4", "7"])
    return made


def test_a_dtype_that_does_not_start_leaves_the_others_theirs(tmp_path, jobs, capsys):
    words = ["m", "--kv-cache-dtype", "auto", "fp8", "int4", "--rounds", "2", "--out", str(tmp_path)]
    assert startup.main([*words, "--", "--max-model-len", "64"]) == 1
    found = json.loads((tmp_path / "startup.json").read_text())["results"]
    by = {(one["dtype"], one["caches"]): one for one in found}
    assert [len(by[dtype, "empty caches"]["starts"]) for dtype in ("auto", "fp8", "int4")] == [2, 0, 2]
    assert by["fp8", "empty caches"]["error"] == "no memory"
    assert by["fp8", "filled caches"]["first_token_s"] == 8.0
    assert all(list(job.flags) == ["--max-model-len", "64"] and job.gpu is None for job in jobs)
    assert "fp8: failed: no memory" in capsys.readouterr().err


def test_starts_beside_each_other_have_a_gpu_each(tmp_path, jobs):
    assert startup.main(["m", "--kv-cache-dtype", "auto", "int8", "int4", "--beside", "--out", str(tmp_path)]) == 0
    assert {(job.dtype, job.gpu) for job in jobs} == {("auto", "4"), ("int8", "7"), ("int4", "4")}
