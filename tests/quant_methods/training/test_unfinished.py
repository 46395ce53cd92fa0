"""What a training leaves behind when it is stopped: its log, its checkpoints, and a folder that says whose they are."""

import json
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from kv_cache.errors import ParetoError
from quant_methods.training.checkpoints import MarkWhole, last_whole, step_of
from quant_methods.training.log import Log, read_log, read_looks
from quant_methods.training.memory import memory_explained
from quant_methods.training.unfinished import JOB, alone, finish, same_job

JOB_OF_4 = {"teacher": "a", "data": {"sha256": "b"}, "settings": {"batch": 4}, "top_k": 0}


def test_a_run_that_goes_on_logs_a_look_once(tmp_path):
    log, state = Log(tmp_path / "log.jsonl", lambda line: None), TrainerState(global_step=0, max_steps=4)
    for first in (0, 2):
        state.global_step = first
        log.on_train_begin(None, state, None)
        for step in range(first, 4, 2):
            state.global_step = step
            log.on_log(None, state, None, {"eval_loss": 2.0 - step})
    steps = [json.loads(line)["step"] for line in log.path.read_text().splitlines()]
    assert steps == [0, 2], "the look at step 2 belongs to the run before"


def test_a_line_that_a_killed_run_left_half_written_is_dropped(tmp_path):
    log = Log(tmp_path / "log.jsonl", lambda line: None)
    log.path.write_text('{"step": 0, "eval_loss": 2.0}\n{"step": 2, "eval_loss": 1.0}\n{"step": 3, "lo')
    assert list(read_looks(log.path)) == [0, 2]
    log.on_train_begin(None, TrainerState(global_step=2), None)
    assert [entry["step"] for entry in read_log(log.path)] == [0, 2]


def test_figures_of_both_kinds_are_one_line(tmp_path):
    said = []
    log, state = Log(tmp_path / "log.jsonl", said.append, 64), TrainerState(global_step=0, max_steps=4)
    log.on_train_begin(None, state, None)
    log.on_log(None, state, None, {"eval_loss": 2.0, "eval_perplexity": 7.389, "eval_kl": 0.5})
    assert said == ["step 0/4, held-out KL 0.5000, held-out loss 2.0000, perplexity 7.39"]
    for state.global_step in (1, 2):
        log.on_log(None, state, None, {"loss": 1.0})
    assert ["tokens_per_second" in entry for entry in read_log(log.path)] == [False, False, True]


def test_a_checkpoint_counts_when_it_is_whole(tmp_path):
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    arguments = SimpleNamespace(should_save=True, output_dir=tmp_path)
    for step in (9, 10):
        MarkWhole().on_save(arguments, SimpleNamespace(global_step=step), None)
    assert step_of(last_whole(tmp_path, delete=False)) == 10
    assert (tmp_path / "checkpoint-11").is_dir()
    last_whole(tmp_path)
    assert not (tmp_path / "checkpoint-11").exists()
    assert step_of(None) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {"batch": 8}}, r"another batch \(4, not 8\)"),
        ({"data": {"sha256": "c"}}, "other data"),
        ({"teacher": "b"}, "another teacher"),
        ({"top_k": 64}, "another --top-k"),
    ],
)
def test_another_job_takes_over_only_where_no_step_is_lost(tmp_path, change, said):
    (tmp_path / "start").mkdir(parents=True)
    (tmp_path / JOB).write_text(json.dumps(JOB_OF_4))
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ParetoError, match=f"is an unfinished run with {said}; give the same"):
        same_job(tmp_path, JOB_OF_4 | change, drop=("start",))
    same_job(tmp_path, JOB_OF_4, drop=("start",))
    assert (tmp_path / "start").is_dir()
    (tmp_path / "checkpoint-1").rmdir()
    same_job(tmp_path, JOB_OF_4 | change, drop=("start",))
    assert not (tmp_path / "start").exists()
    assert json.loads((tmp_path / JOB).read_text()) == JOB_OF_4 | change


def test_a_folder_goes_with_a_run_that_began_nothing(tmp_path):
    work = tmp_path / "work"

    def stopped(kept=None):
        with alone(work):
            same_job(work, JOB_OF_4)
            if kept:
                (work / kept).mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not work.exists()
    with pytest.raises(KeyboardInterrupt):
        stopped("checkpoint-1")
    assert (work / "checkpoint-1").is_dir()


def test_a_result_appears_with_its_log_and_its_folder_goes(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    (work / "made").mkdir(parents=True)
    out.mkdir()
    (work / "log.jsonl").write_text("{}\n")
    finish(work / "made", out, work, "about.json", {"steps": 3})
    assert json.loads((out / "about.json").read_text()) == {"steps": 3}
    assert (out / "training_log.jsonl").read_text() == "{}\n"
    assert not work.exists()


def test_what_takes_less_memory_is_listed_and_other_errors_pass():
    least = SimpleNamespace(micro_batch=1, checkpointing=True, length=64)
    with pytest.raises(ParetoError, match=r"^out of memory on cpu; give --length 32$"), memory_explained("cpu", least):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(RuntimeError, match="shapes"), memory_explained("cpu", least):
        raise RuntimeError("shapes differ")
