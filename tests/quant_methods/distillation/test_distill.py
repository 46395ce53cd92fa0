"""``pareto distill`` from end to end, on a teacher of ten thousand weights a layer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kv_cache.errors import ParetoError
from kv_cache.scales import KVScales
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.distillation import command, job, student
from quant_methods.distillation.in_memory import load_model
from quant_methods.overrides import override
from quant_methods.recipe_file import load_recipe
from quant_methods.training import arguments as arguments_of_training
from tests.quant_methods.launched import DEVICES, in_two_processes
from vllm_ext.cli import build_parser

pytest.importorskip("accelerate")
SMALL = "--samples 24 --held-out 2 --length 16 --batch 4 --looks 3 --learning-rate 3e-3 --device cpu"


def arguments(teacher, data, out, more=""):
    words = [str(teacher), "--data", str(data), "--out", str(out), *SMALL.split(), *more.split()]
    return build_parser("distill", command).parse_args(words)


def distilled(teacher, data, out, more=""):
    """Run the command, and return what it wrote of every step."""
    assert command.run(arguments(teacher, data, out, more)) == 0
    return [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]


def looks(log):
    return {entry["step"]: entry for entry in log if "eval_loss" in entry}


@pytest.fixture
def shape(tmp_path):
    path = tmp_path / "shape.yaml"
    path.write_text("hidden_size: 32\nnum_hidden_layers: 2\nintermediate_size: 48\n")
    return f"--student-config {path}"


def test_a_fresh_student_comes_nearer_to_its_teacher_and_can_be_compressed(teacher, text, tmp_path, shape, capsys):
    out = tmp_path / "student"
    log = distilled(teacher, text, out, f"{shape} --temperature 2 --kl-share 0.7 --loss skew --hidden 0.1 --epochs 2")
    found = looks(log)
    assert list(found) == [0, 4, 8, 12]
    assert found[12]["eval_kl"] < 0.97 * found[0]["eval_kl"]
    about = json.loads((out / job.RESULT).read_text())
    assert about["after"]["kl"] == min(entry["eval_kl"] for step, entry in found.items() if step)
    assert about["before"]["kl"] == found[0]["eval_kl"]
    assert about["teacher"]["kind"] == "in memory"
    card = (out / "README.md").read_text()
    assert about["data"]["tokens_sha256"] in card
    assert "The student was fresh" in card
    assert not list(tmp_path.glob(".student*"))
    assert "pareto compress" in capsys.readouterr().out
    model = load_model(out, "cpu")
    assert model.config.hidden_size == 32
    assert not any("distill" in name for name, _ in model.named_parameters())
    assert "pareto_observed" not in (out / "config.json").read_text()
    recipe = override(load_recipe("rtn-w4"), {"num_calibration_samples": 1, "calibration_length": 16, "group_size": 32})
    compress(out, recipe, tmp_path / "packed", text=text)
    assert load_reference(tmp_path / "packed")(torch.tensor([[4, 5]])).logits.isfinite().all()


@pytest.mark.parametrize(("more", "wanted"), [("", "bfloat16"), ("--float32", "float32")])
def test_products_are_in_bfloat16_where_the_device_is_quick_at_it(
    teacher, text, tmp_path, shape, monkeypatch, more, wanted
):
    multiplied, real = set(), torch.nn.functional.linear

    def linear(x, weight, bias=None):
        # Autocast casts inside; the result tells in which dtype it was multiplied.
        out = real(x, weight, bias)
        multiplied.add(str(out.dtype).removeprefix("torch."))
        return out

    monkeypatch.setattr(arguments_of_training, "quick_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    out = tmp_path / "student"
    distilled(teacher, text, out, f"{shape} --steps 1 {more}")
    about = json.loads((out / job.RESULT).read_text())
    assert (about["products"], about["teacher"]["dtype"]) == (wanted, wanted)
    assert wanted in multiplied
    assert ("bfloat16" in multiplied) is (wanted == "bfloat16")
    assert {p.dtype for p in load_model(out, "cpu").parameters()} == {torch.float32}


KILLED = """
import os, signal, sys
from quant_methods.distillation import command
from quant_methods.training import checkpoints
from vllm_ext.cli import build_parser
real = checkpoints.write_bytes
def write(path, data):
    if "-4/" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, data)
checkpoints.write_bytes = write
command.run(build_parser("distill", command).parse_args(sys.argv[1:]))
"""


@pytest.mark.long
def test_what_was_killed_goes_on_to_the_same_losses_and_the_same_bytes(teacher, text, tmp_path, shape):
    """It is killed inside the second checkpoint, before that is whole: the first is what it goes on from."""
    whole = distilled(teacher, text, tmp_path / "whole", shape)
    out = tmp_path / "killed"
    words = [str(teacher), "--data", str(text), "--out", str(out), *SMALL.split(), *shape.split()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    died = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment, check=False, capture_output=True)
    assert died.returncode == -9, died.stderr.decode()[-2000:]
    work = tmp_path / ".killed.distill"
    assert (work / "checkpoint-4").is_dir()
    assert not out.exists()
    with pytest.raises(ParetoError, match=r"another kl share \(0\.5, not 0\.9\); give the same as then"):
        command.run(arguments(teacher, text, out, f"{shape} --kl-share 0.9"))
    found = distilled(teacher, text, out, shape)

    def of(log, name):
        return {entry["step"]: entry[name] for entry in log if name in entry}

    for name in ("loss", "eval_kl", "eval_loss"):
        assert of(found, name) == of(whole, name)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not work.exists()


def test_parts_of_a_batch_and_blocks_that_run_again_give_the_same_losses(teacher, text, tmp_path, shape):
    one = distilled(teacher, text, tmp_path / "one", f"{shape} --micro-batch 4")
    two = distilled(teacher, text, tmp_path / "two", f"{shape} --micro-batch 2 --checkpointing")
    for a, b in zip(looks(one).values(), looks(two).values(), strict=True):
        assert a["eval_kl"] == pytest.approx(b["eval_kl"], rel=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_two_processes_learn_what_one_does(teacher, text, tmp_path, shape, device):
    """They share each step's batch, so that neither the steps nor the tokens of each depend on how many there are."""
    more = f"{shape} --float32 --micro-batch 2 --device {device}"
    one = distilled(teacher, text, tmp_path / "one", more)
    words = [*SMALL.split(), *more.split()]
    in_two_processes(device, "distill", teacher, "--data", text, "--out", tmp_path / "two", *words)
    two = [json.loads(line) for line in (tmp_path / "two" / "training_log.jsonl").read_text().splitlines()]
    assert list(looks(two)) == list(looks(one))
    for a, b in zip(looks(two).values(), looks(one).values(), strict=True):
        assert a["eval_kl"] == pytest.approx(b["eval_kl"], rel=1e-4)


def test_held_out_sequences_are_looked_at_in_parts_of_the_same_size(teacher, text, tmp_path, shape, monkeypatch):
    from quant_methods.distillation.in_memory import InMemory

    asked, real = [], InMemory.targets

    def targets(self, sequences, tokens):
        asked.append(sequences.tolist())
        return real(self, sequences, tokens)

    monkeypatch.setattr(InMemory, "targets", targets)
    few = f"{shape} --samples 4 --looks 1 --held-out 5"
    two = looks(distilled(teacher, text, tmp_path / "two", f"{few} --micro-batch 2"))
    assert asked[:3] == [[4, 5], [6, 7], [8]]
    asked.clear()
    one = looks(distilled(teacher, text, tmp_path / "one", f"{few} --micro-batch 1"))
    assert asked[:5] == [[4], [5], [6], [7], [8]]
    assert two[0]["eval_kl"] == pytest.approx(one[0]["eval_kl"], rel=1e-4)


def test_a_number_of_steps_takes_the_place_of_epochs(teacher, text, tmp_path, shape):
    log = distilled(teacher, text, tmp_path / "out", f"{shape} --steps 3 --epochs 9")
    assert max(entry["step"] for entry in log) == 3


def test_top_tokens_on_disk_teach_nearly_the_same(teacher, text, tmp_path, shape):
    more = f"{shape} --kl-share 1 --temperature 1.5"
    whole = looks(distilled(teacher, text, tmp_path / "whole", more))
    top = looks(distilled(teacher, text, tmp_path / "top", f"{more} --top-k 4096 --teacher-cache {tmp_path / 'cache'}"))
    # Half of the vocabulary leaves out what hardly matters, and a bound from below is what it gives.
    assert top[0]["eval_kl"] == pytest.approx(whole[0]["eval_kl"], rel=0.05)
    assert top[6]["eval_kl"] == pytest.approx(whole[6]["eval_kl"], rel=0.05)


def test_chats_teach_what_the_assistant_says(teacher, chats, tmp_path, shape):
    log = distilled(teacher, chats, tmp_path / "chats", f"{shape} --length 32 --epochs 2")
    assert looks(log)[12]["eval_loss"] < looks(log)[0]["eval_loss"]


def test_a_student_that_learns_with_codes_brings_scales_and_is_cut(teacher, text, tmp_path):
    out = tmp_path / "student"
    log = distilled(teacher, text, out, "--keep-layers 2 --kv-bits 3,2 --weight-bits 4 --group-size 32 --kl-share 1")
    assert looks(log)[6]["eval_kl"] < looks(log)[0]["eval_kl"]
    assert KVScales.load(out).num_layers == 2
    assert json.loads((out / job.RESULT).read_text())["kv_bits"] == [3, 2]
    assert "codes of 3 and 2 bits" in (out / "README.md").read_text()


def test_only_the_layers_that_are_named_learn(teacher, text, tmp_path):
    out = tmp_path / "student"
    distilled(teacher, text, out, f"--student {teacher} --kv-bits 2 --targets k_proj,norm --kl-share 1 --epochs 2")
    before, after = (dict(load_model(folder, "cpu").named_parameters()) for folder in (teacher, out))
    changed = {name for name in before if not torch.equal(before[name].bfloat16(), after[name].bfloat16())}
    assert changed
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in changed} <= {"k_proj", "norm"}
    assert json.loads((out / job.RESULT).read_text())["settings"]["targets"] == ["k_proj", "norm"]
    with pytest.raises(ParetoError, match=r"--targets: no layer is called 'key_proj'; layers: .*k_proj, .*norm"):
        distilled(teacher, text, tmp_path / "other", f"--student {teacher} --targets key_proj")


def test_layers_that_share_a_weight_learn_together(teacher):
    model = load_model(teacher, "cpu")
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    student.let_learn(model, ["embed_tokens"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"model.embed_tokens.weight"}
    assert model.get_output_embeddings().weight.requires_grad is shared


def test_a_student_that_no_step_improved_stays_as_it_was(teacher, text, tmp_path, capsys):
    """A student that is its teacher can only get worse."""
    out = tmp_path / "student"
    found = looks(distilled(teacher, text, out, f"--student {teacher} --kl-share 0.5 --kv-bits 4"))
    assert min(found, key=lambda step: found[step]["eval_kl"]) == 0, "the test means to make it worse"
    about = json.loads((out / job.RESULT).read_text())
    assert about["kept_step"] == 0
    assert about["after"] == about["before"]
    weights, wanted = load_model(out, "cpu").state_dict(), load_model(teacher, "cpu").state_dict()
    assert all(torch.equal(weights[name], wanted[name].bfloat16().float()) for name in wanted)
    assert KVScales.load(out).num_layers == 3
    assert "no state was better than the start" in capsys.readouterr().out


def test_text_alone_needs_no_teachers_probabilities(teacher, text, tmp_path, shape):
    log = distilled(teacher, text, tmp_path / "ce", f"{shape} --kl-share 0")
    assert "eval_kl" not in looks(log)[0]
    assert looks(log)[6]["eval_loss"] < looks(log)[0]["eval_loss"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("", "give one student: --student MODEL, --student-config FILE, or --keep-layers"),
        ("--keep-layers 2 --student ref-7m", "give one student"),
        ("--keep-layers 2 --kl-share 1.5", "--kl-share 1.5 is not between 0"),
        ("--keep-layers 2 --loss js", "unknown divergence 'js'"),
        ("--keep-layers 2 --micro-batch 3", "--micro-batch 3 does not divide --batch 4"),
        ("--keep-layers 2 --on-policy 2", "--on-policy 2 is not between 0"),
        ("--keep-layers 2 --on-policy 1 --kl-share 0 --new-tokens 4", "only a teacher can judge; raise --kl-share"),
        ("--keep-layers 2 --on-policy 1 --new-tokens 16", "--new-tokens 16 is not between 1 and 15"),
        (
            "--keep-layers 2 --on-policy 1 --new-tokens 4 --top-k 8",
            "nobody can ask a teacher before; leave out --top-k",
        ),
        ("--keep-layers 2 --steps -1", "--steps -1 is negative"),
        ("--keep-layers 2 --temperature 0", "--temperature 0 is not positive"),
        ("--keep-layers 2 --kv-bits x", "--kv-bits x: expected 3, or 4,3"),
        ("--keep-layers 2 --url http://127.0.0.1:9", "cannot be cut out of a teacher that a server runs"),
        ("--student nowhere", "model 'nowhere' not found"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(teacher, text, tmp_path, more, said):
    with pytest.raises(ParetoError, match=said) as caught:
        command.run(arguments(teacher, text, tmp_path / "out", more))
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(("out", ".distill"))]


def test_an_output_that_is_there_is_left_alone(teacher, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ParetoError, match="out exists; give another --out"):
        command.run(arguments(teacher, text, tmp_path / "out", "--keep-layers 2"))
    with pytest.raises(ParetoError, match=r"is the teacher itself|exists; give another"):
        command.run(arguments(teacher, text, teacher, "--keep-layers 2"))
    assert Path(tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_memory_that_runs_out_is_answered_by_what_to_lower(teacher, text, tmp_path, shape, monkeypatch):
    from quant_methods.distillation.distiller import Distiller

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Distiller, "compute_loss", full)
    said = "out of memory on cpu; give --micro-batch 2 .*--checkpointing .*--length 8, or --top-k 64"
    with pytest.raises(ParetoError, match=said):
        command.run(arguments(teacher, text, tmp_path / "out", shape))


def test_a_loss_that_is_not_finite_stops_the_run(teacher, text, tmp_path, shape):
    with pytest.raises(
        ParetoError, match=r"the loss is not finite after step .*; give a lower --learning-rate than 1e"
    ):
        command.run(arguments(teacher, text, tmp_path / "out", f"{shape} --learning-rate 1e30"))
