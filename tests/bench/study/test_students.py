"""Points whose weights are a student's: a plan's ``students``, trained once and served as they are or compressed."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from bench.study.estimate import rough_seconds, show
from bench.study.folder import Folder
from bench.study.inputs import Inputs
from bench.study.outcome import conclude
from bench.study.pack import verify
from bench.study.perform import perform
from bench.study.plan import PLANS, load_plan
from bench.study.run import look, run
from bench.study.steps import build
from kv_cache.errors import ParetoError
from quant_methods.embedded import MODELS
from tests.bench.study.studies import Pretended, folder_of, graph_of
from vllm_ext.cli import build_parser

pytest.importorskip("accelerate")
TEXT = "".join(
    json.dumps({"text": f"The number {n} comes after {n - 1}, and twice it is {2 * n}."}) + "\n" for n in range(400)
)
W4 = {"student": "kd", "recipe": "rtn-w4", "num_calibration_samples": 2, "calibration_length": 64}
FEW = {"keep_layers": 2, "data": "learn.jsonl", "samples": 8, "held_out": 2, "length": 32, "batch": 4, "looks": 2}
STUDENTS = {
    "students": {"kd": FEW | {"kl_share": [0.3, 0.7]}, "ce": FEW | {"kl_share": 0}},
    "weights": {
        "w8": {"recipe": "rtn-w8"},
        "kd": {"student": "kd"},
        "kd-w4": {"student": "kd", "recipe": "rtn-w4"},
        "ce": {"student": "ce"},
    },
    "points": [{"weights": ["w8", "kd", "kd-w4", "ce"]}],
    "loads": None,
}


@pytest.fixture
def study(tmp_path):
    """Make graphs of a plan with students beside a file that these learn from."""
    (tmp_path / "learn.jsonl").write_text(TEXT)
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape/config.json").write_bytes((MODELS / "ref-7m/config.json").read_bytes())
    return lambda **changes: graph_of(tmp_path, **(STUDENTS | changes))


def test_a_student_is_trained_once_and_compressed_from_there(study):
    graph = study(runs=1)
    kinds = [step.kind for step in graph.steps.values()]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"distill": 3, "compress": 3, "quality": 7}
    assert kinds == sorted(kinds, key=["distill", "compress", "quality"].index)
    names = [point.weights.name for point in graph.points if point.weights]
    assert names == ["w8", "kd kl_share=0.3", "kd kl_share=0.7", "kd-w4 kl_share=0.3", "kd-w4 kl_share=0.7", "ce"]
    cells = {cell.point: cell for cell in graph.cells}
    plain, packed = cells["ref-7m, kd kl_share=0.7, bf16 KV"], cells["ref-7m, kd-w4 kl_share=0.7, bf16 KV"]
    assert plain.distill == packed.distill is not None
    assert plain.compress is None
    compress = graph.steps[packed.compress]
    assert compress.after == (plain.distill,)
    assert compress.words[1] == f"{{checkpoint:{plain.distill}}}"
    quality = graph.steps[plain.quality]
    assert quality.words[1:3] == (f"{{checkpoint:{plain.distill}}}", "--baseline=ref-7m")
    assert plain.distill in quality.after
    # The teacher, in 8 bits, is a point of its own, and learns nothing.
    assert cells["ref-7m, w8, bf16 KV"].distill is None
    chosen = next(point.weights for point in graph.points if point.name == "ref-7m, kd-w4 kl_share=0.7, bf16 KV")
    assert (chosen.setting("kl_share"), chosen.setting("bits"), chosen.setting("keep_layers")) == (0.7, 4, 2)


def test_the_words_of_a_step_are_a_job(study, tmp_path):
    from quant_methods.distillation import command

    step = next(step for step in study(runs=1).steps.values() if step.name == "distill ref-7m, kd kl_share=0.3")
    words = [word.replace("{out}", str(tmp_path / "out")) for word in step.words]
    job = command.job_of(build_parser("distill", command).parse_args(words[1:]))
    assert (job.sizes.layers, job.settings.kl_share, job.settings.samples, job.device) == (2, 0.3, 8, "cpu")
    assert job.text == tmp_path / "learn.jsonl"
    assert step.tokens == 8 * 32


def test_what_determines_a_student_is_its_key(study, tmp_path):
    def trained(**changes):
        return {key for key in study(runs=1, **changes).steps if key.startswith("distill")}

    first = trained()
    assert trained(title="another", weights=STUDENTS["weights"] | {"w8": {"recipe": "rtn-w4"}}) == first
    assert not trained(distill={"learning_rate": 3e-4}) & first
    assert len(trained(students=STUDENTS["students"] | {"ce": FEW | {"kl_share": 0, "steps": 3}}) & first) == 2
    (tmp_path / "learn.jsonl").write_text(TEXT + TEXT)
    changed = {key for key in graph_of(tmp_path, **STUDENTS, runs=1).steps if key.startswith("distill")}
    assert not changed & first


def test_each_run_trains_with_its_seed_unless_the_plan_says_otherwise(study):
    seeds = [step.determines["seed"] for step in study().steps.values() if step.kind == "distill"]
    assert sorted(seeds) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    graph = study(vary=["calibration"])
    assert sum(step.kind == "distill" for step in graph.steps.values()) == 3
    names = [step.name for step in study().steps.values() if step.kind == "quality"]
    assert "quality of ref-7m, ce, bf16 KV, training seed 1" in names


def test_a_student_that_failed_skips_its_points_alone_and_the_rest_is_judged_and_packed(study, tmp_path):
    hypothesis = {
        "name": "keeps", "claim": "c", "metric": "kl", "points": {"weights": "kd kl_share=0.7"},
        "against": {"weights": "w8"}, "measure": "ratio", "relation": "at_most", "bound": 100,
    }  # fmt: skip
    chart = {"title": "Share", "axis": "kl_share", "metric": "kl", "points": {"weights": "kd"}}
    (tmp_path / "small.yaml").write_text("hidden_size: 64\n")
    fresh = {name: value for name, value in FEW.items() if name != "keep_layers"} | {"student-config": "small.yaml"}
    students = STUDENTS["students"] | {"ce": fresh | {"kl_share": 0}}
    graph, folder = study(hypotheses=[hypothesis], charts=[chart], students=students), folder_of(tmp_path)
    broken = Pretended(folder, lambda step: "no memory" if step.name == "distill ref-7m, ce, seed 0" else "")
    run(progress := look(graph, folder, ["cpu"]), broken, Console(file=io.StringIO()))
    skipped = [graph.steps[key].name for key, state in progress.states.items() if state.status == "skipped"]
    assert skipped == ["quality of ref-7m, ce, bf16 KV, training seed 0"]
    page = conclude(graph, folder, tmp_path / "plan.yaml", progress)
    found = json.loads((page.parent / "study.json").read_text())
    assert found["hypotheses"][0]["verdict"] in ("held", "falsified", "not decidable")
    assert found["hypotheses"][0]["points"][0]["against"] == "ref-7m, w8, bf16 KV"
    point = next(one for one in found["points"] if one["weights"] == "kd-w4 kl_share=0.3")
    assert point["settings"] | {"kl_share": 0.3, "recipe": "rtn-w4", "keep_layers": 2} == point["settings"]
    from bench.study.pack import pack

    packed = pack(graph, folder, page, tmp_path / "plan.yaml")
    assert verify(packed) == 0
    with tarfile.open(packed) as tar:
        assert "try/small.yaml" in tar.getnames()


def test_time_grows_with_what_is_learnt_and_on_a_dry_run_it_is_shown(study, tmp_path, capsys):
    students = {"few": FEW, "many": FEW | {"samples": 80_000, "length": 1024}}
    weights = {name: {"student": name} for name in students}
    graph = study(runs=1, students=students, weights=weights, points=[{"weights": ["few", "many"]}])
    few, many = (step for step in graph.steps.values() if step.kind == "distill")
    assert rough_seconds(many) > 100 * rough_seconds(few)
    show(graph, Folder(tmp_path / "out"), [], ["cpu"])
    printed = capsys.readouterr().out
    assert "distill ref-7m, many" in printed
    assert many.key[:30] in printed


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"weights": {"a": {"student": "kt"}}}, "weights.a.student: 'kt' is none of students; the plan has ce, kd"),
        ({"weights": {"a": {"student": 3}}}, "weights.a.student: 3 is none of students; the plan has ce, kd"),
        ({"students": {"kd": {"keep_layer": 3}}}, "students.kd: unknown key 'keep_layer'; valid keys: batch"),
        ({"students": {"kd": {"samples": 8, "data": "learn.jsonl"}}}, "students.kd: give one student: --student"),
        ({"students": {"kd": FEW | {"kl_share": 2}}}, "students.kd: --kl-share 2 is not between 0"),
        ({"students": {"kd": FEW | {"seed": 2}}}, "students.kd: 'seed' is set by the study itself"),
        ({"students": {"kd": FEW | {"data": "no.jsonl"}}}, "students.kd.data: "),
        ({"students": {"kd": {"keep_layers": 2}}}, "students.kd: the following arguments are required: --data"),
        ({"students": {"kd": FEW | {"samples": "x"}}}, "students.kd: argument --samples: invalid int value: 'x'"),
        ({"distill": {"kl_shar": 2}}, "unknown key 'kl_shar'"),
        ({"models": {"ref-7m": {"path": "shape", "shape": True}}}, "students.kd: ref-7m is a shape without weights"),
    ],
)  # fmt: skip
def test_a_bad_student_gets_one_line(study, changes, line):
    points = [{"weights": list(changes["weights"])}] if "weights" in changes else STUDENTS["points"]
    if "students" in changes:
        changes, points = changes | {"weights": {"kd": {"student": "kd"}}}, [{"weights": "kd"}]
    with pytest.raises(ParetoError) as error:
        study(points=points, **changes)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["smollm2-half", "7b-to-3b"])
def test_the_plans_with_students_say_what_they_cost(name, tmp_path, capsys):
    plan = load_plan(PLANS / f"{name}.yaml")
    inputs = Inputs(PLANS, None, None, tmp_path / "digests.json", tolerant=True)
    graph = build(plan, PLANS, inputs)
    show(graph, Folder(tmp_path), inputs.missing, list(plan.hardware))
    printed = capsys.readouterr().out
    trained = [step for step in graph.steps.values() if step.kind == "distill"]
    assert all(step.name.split(",")[0] in printed for step in trained)
    labels = {label for point in graph.points for label in point.labels}
    assert "w8" in labels
    if name == "7b-to-3b":  # The other model's size is not in its name.
        assert all(rough_seconds(step) > 3600 for step in trained)
        learnt = {(s.determines["flags"]["kl_share"], s.determines["flags"]["temperature"]) for s in trained}
        assert {share for share, _ in learnt} == {0, 0.3, 0.5, 0.7}
        assert {temperature for _, temperature in learnt} == {1, 1.5, 2}
        assert {step.determines["flags"]["samples"] for step in trained} == {50_000, 200_000}
        bound = next(one for one in plan.hypotheses if one.name == "student-keeps-95")
        assert (bound.metric, bound.measure, bound.relation, bound.bound) == ("accuracy", "ratio", "at_least", 0.95)
        assert bound.against == {"weights": "w8"}


COMMAND = (
    "import sys; from bench.study import command as c; from vllm_ext.cli import build_parser; "
    "sys.exit(c.run(build_parser('study', c).parse_args(sys.argv[1:])))"
)


@pytest.mark.long
def test_a_student_is_trained_and_compressed_by_the_study_also_after_a_kill(study, tmp_path):
    """The steps that make checkpoints, for real: killed while the student learns, the same command goes on."""
    few = FEW | {"samples": 64, "looks": 16}
    graph = study(runs=1, students={"kd": few}, weights={"kd-w4": W4}, points=[{"weights": "kd-w4"}])
    folder, kept = folder_of(tmp_path), {step.kind: step for step in graph.steps.values()}
    for step in graph.steps.values():
        folder.prepare(step)
    words = [sys.executable, "-m", "bench.study.perform", str(folder.out), kept["distill"].key]
    process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    work = folder.of(kept["distill"].key) / ".out.distill"
    while not list(work.glob("checkpoint-*/whole")):
        assert process.poll() is None, folder.last_line(kept["distill"].key)
        time.sleep(0.01)
    for training in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(training), signal.SIGKILL)
    assert process.wait() == 1
    assert "ended by signal 9" in folder.outcome(kept["distill"]).error
    assert not folder.result(kept["distill"].key).exists()
    assert perform(folder, kept["distill"].key).status == "done"
    assert "goes on from step" in (folder.of(kept["distill"].key) / "log.txt").read_text()
    assert perform(folder, kept["compress"].key).status == "done"
    config = json.loads((folder.result(kept["compress"].key) / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert config["quantization_config"]


@pytest.mark.long
@pytest.mark.engine
def test_the_whole_chain_on_the_reference_model(tmp_path):
    """Teacher, student, W4, evaluation against the teacher, and a page: with engines."""
    (tmp_path / "learn.jsonl").write_text(TEXT)
    plan = {
        "study": "tiny", "hardware": {"cpu": {}}, "models": {"ref-7m": "ref-7m"}, "runs": 1,
        "students": {"kd": FEW | {"keep_layers": 5}},
        "weights": {"kd-w4": W4},
        "points": [{"weights": "kd-w4"}],
        "quality": {"num_windows": 2, "window_tokens": 128, "needle": False},
        "charts": [{"title": "KL", "axis": "weight_bits", "metric": "kl"}],
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(plan))
    words = [sys.executable, "-c", COMMAND, str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "--pack"]
    environment = os.environ | {"PARETO_CACHE": str(tmp_path / "cache")}
    first = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "4 of 4 steps done" in first.stdout
    found = json.loads((tmp_path / "out/plans/tiny/study.json").read_text())
    point = next(one for one in found["points"] if one["weights"] == "kd-w4")
    base = next(one for one in found["points"] if one["is_baseline"])
    assert point["figures"]["kl"]["value"] > 0
    assert point["figures"]["weight_bytes"]["value"] < base["figures"]["weight_bytes"]["value"]
    assert verify(tmp_path / "out/plans/tiny/tiny.tar") == 0
