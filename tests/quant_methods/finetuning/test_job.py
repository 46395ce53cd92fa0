"""A fine-tuning from data to a result: learning, going on after a kill, merging, and what is refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kv_cache.atomic import write_bytes
from kv_cache.errors import ParetoError
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.finetuning.coded_linear import CodedLinear
from quant_methods.finetuning.examples import read_examples
from quant_methods.finetuning.job import RESULT, Job, finetune
from quant_methods.finetuning.load import load_coded
from quant_methods.finetuning.merge import Adapter, merge
from quant_methods.finetuning.settings import Settings
from quant_methods.methods.rtn import RTN
from quant_methods.model_source import read_config
from quant_methods.recipe import Recipe
from quant_methods.training import arguments
from quant_methods.training.log import read_log
from tests.quant_methods.launched import DEVICES, in_two_processes

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.arange(3, 63).reshape(2, 30)
SETTINGS = Settings(rank=4, alpha=8, steps=4, batch=4, micro_batch=2, length=64, held_out=4, save_steps=1,
                    learning_rate=5e-3)  # fmt: skip


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose answers are alike."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"Add {i} and {i}."}, {"role": "assistant", "content": f"That is {2 * i}, friend."},
    ]}) + "\n" for i in range(24)))  # fmt: skip
    return path


@pytest.fixture(scope="module")
def tuned(coded_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter over a checkpoint with every kind of part."""
    out = tmp_path_factory.mktemp("tuned") / "adapter"
    outcome = finetune(Job(coded_model, chats, out, SETTINGS))
    assert outcome.after < outcome.before - 0.1
    return out


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits.float()


def with_adapter(checkpoint, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(load_coded(checkpoint), adapter).eval()


def test_the_result_says_how_it_came_about(tuned, coded_model):
    names = {path.name for path in tuned.iterdir()}
    wanted = {"adapter_config.json", "adapter_model.safetensors", RESULT, "README.md", "training_log.jsonl"}
    assert wanted <= names
    about = json.loads((tuned / RESULT).read_text())
    log = [json.loads(line) for line in (tuned / "training_log.jsonl").read_text().splitlines()]
    looks = [line for line in log if "eval_loss" in line]
    assert [line["step"] for line in looks] == [0, 1, 2, 3, 4]
    assert about["after"] == min(line["eval_loss"] for line in looks[1:])
    assert about["data"]["training"] == 20
    assert not list(tuned.parent.glob(".*"))
    assert json.loads((tuned / "adapter_config.json").read_text())["base_model_name_or_path"] == str(coded_model)


@pytest.mark.parametrize(("allowed", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_products_are_in_bfloat16_where_the_device_is_quick_at_it(
    coded_model, chats, tmp_path, monkeypatch, allowed, wanted
):
    seen, real = set(), CodedLinear.forward

    def forward(self, x):
        out = real(self, x)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(arguments, "quick_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(CodedLinear, "forward", forward)
    out = tmp_path / "adapter"
    outcome = finetune(Job(coded_model, chats, out, dataclasses.replace(SETTINGS, bfloat16=allowed)))
    assert outcome.after < outcome.before - 0.1
    assert seen == {wanted}
    assert json.loads((out / RESULT).read_text())["products"] == str(wanted).removeprefix("torch.")


@pytest.fixture(scope="module")
def sized(coded_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of DoRA."""
    out = tmp_path_factory.mktemp("sized") / "adapter"
    outcome = finetune(Job(coded_model, chats, out, dataclasses.replace(SETTINGS, dora=True)))
    assert outcome.after < outcome.before - 0.1
    return out


def test_dora_is_merged_into_every_format_by_what_multiplies_its_codes(sized, coded_model, tmp_path):
    """Each output channel of each layer is what peft's own arithmetic makes of it, as 16 bits hold it."""
    merge(coded_model, sized, tmp_path / "merged")
    peft_layers = {
        name: one for name, one in with_adapter(coded_model, sized).named_modules() if hasattr(one, "lora_A")
    }
    was, now = (dict(load_coded(folder).named_modules()) for folder in (coded_model, tmp_path / "merged"))
    assert len(peft_layers) == 21
    for full, one in peft_layers.items():
        name, generator = full.removeprefix("base_model.model."), torch.Generator().manual_seed(0)
        inputs = torch.randn(8, one.in_features, generator=generator)
        with torch.no_grad():
            one.get_base_layer().rounding = None  # Of inputs; the weight is what is looked at.
            bias = one.get_base_layer().bias
            wanted = one(inputs) - (0 if bias is None else bias)
            before = inputs @ was[name].weight.float().T
            found = inputs @ now[name].weight.float().T
        # A norm learnt apart changes more than a product of 16 bits loses.
        assert (found - wanted).norm() < 0.3 * (wanted - before).norm()
        assert (found - wanted).norm() < 2**-7 * wanted.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_two_processes_learn_what_one_does(coded_model, chats, tmp_path, device):
    settings = dataclasses.replace(SETTINGS, bfloat16=False)
    finetune(Job(coded_model, chats, tmp_path / "one", settings, device=device))
    words = "--lora-rank 4 --lora-alpha 8 --steps 4 --batch 4 --micro-batch 2 --length 64 --held-out 4 --save-steps 1"
    words += " --learning-rate 5e-3 --float32"
    in_two_processes(device, "finetune", coded_model, "--data", chats, "--out", tmp_path / "two", *words.split())
    found = [
        [line["eval_loss"] for line in read_log(tmp_path / name / "training_log.jsonl") if "eval_loss" in line]
        for name in ("one", "two")
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert len(found[0]) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dora_learns_and_is_merged_on_a_gpu_too(coded_model, chats, tmp_path):
    settings = dataclasses.replace(SETTINGS, dora=True)
    outcome = finetune(Job(coded_model, chats, tmp_path / "out", settings, merged=True, device="cuda"))
    assert outcome.after < outcome.before - 0.1
    merged = logits(load_reference(tmp_path / "out")).log_softmax(-1)
    beside = logits(with_adapter(coded_model, tmp_path / "out/adapter")).log_softmax(-1)
    before = logits(load_coded(coded_model)).log_softmax(-1)
    assert (merged - beside).abs().mean() < 0.25 * (before - beside).abs().mean()


def check_merged(model, adapter, merged):
    """Each layer is what it was and the adapter's product, as 16 bits hold it, and rounds its inputs as before.

    Layers are compared, not logits: an input that falls on the other side of a step of 8 bits moves these by more than
    16 bits of a product do.
    """
    before, after = (dict(load_coded(folder).named_modules()) for folder in (model, merged))
    products = Adapter(adapter).products
    assert len(products) == 21
    for name, (up, down) in products.items():
        change, was, now = up @ down, before[name], after[name]
        assert change.norm() > 0
        if not isinstance(was, CodedLinear):
            torch.testing.assert_close(now.weight, was.weight + change, rtol=2**-8, atol=1e-6)
            continue
        assert (now.linear().read() - was.linear().read() - change).norm() < 2**-7 * change.norm()
        assert torch.equal(now.linear().bulk.read(), was.linear().bulk.read())
        assert (now.rounding is None) == (was.rounding is None)
        assert now.rounding is None or now.rounding.keywords == was.rounding.keywords


def test_merging_loses_nothing_but_16_bits(tuned, coded_model, tmp_path):
    """Over all forms, those with a low-rank part and with rounded inputs among them."""
    merge(coded_model, tuned, tmp_path / "merged")
    check_merged(coded_model, tuned, tmp_path / "merged")
    assert (tmp_path / "merged/tokenizer.json").is_file()


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_what_others_wrote_is_merged_too(tiny_model, text_file, chats, tmp_path, bits):
    """16 bits, compressed-tensors of weights alone, and with rounded inputs."""
    model = tiny_model
    if bits is not None:
        step = RTN(bits=bits, group_size=32 if bits == 4 else -1, symmetric=bits == 8)
        step = dataclasses.replace(step, activations="int8") if bits == 8 else step
        model = tmp_path / "model"
        compress(tiny_model, Recipe("test", steps=(step,), kv_scales=False), model, text=text_file)
        assert read_config(model)["quantization_config"]["quant_method"] == "compressed-tensors"
    finetune(Job(model, chats, tmp_path / "out", dataclasses.replace(SETTINGS, steps=2), merged=True))
    check_merged(model, tmp_path / "out/adapter", tmp_path / "out")
    if bits == 4:
        found, wanted = logits(load_reference(tmp_path / "out")), logits(with_adapter(model, tmp_path / "out/adapter"))
        assert (found - wanted).abs().mean() < 0.05 * (wanted - logits(load_coded(model))).abs().mean()


def check_went_on(outcome, whole, out):
    """A run that went on has the loss of the one that was never stopped, and a line for each figure in order."""
    assert outcome.resumed in (2, 3)
    assert outcome.after == pytest.approx(json.loads((whole / RESULT).read_text())["after"], rel=1e-5)
    steps = [entry["step"] for entry in read_log(out / "training_log.jsonl")]
    assert steps == sorted(steps)
    assert {1, 2, 3, 4} <= set(steps)


@pytest.mark.parametrize("kind", ["tuned", "sized"])
def test_a_stopped_run_goes_on_to_the_same_loss(coded_model, chats, kind, request, tmp_path, monkeypatch):
    """It is stopped in the middle of the third checkpoint, which is written but not whole."""

    def stop(path, data):
        if "checkpoint-3" in str(path):
            raise KeyboardInterrupt
        write_bytes(path, data)

    job = Job(coded_model, chats, tmp_path / "out", dataclasses.replace(SETTINGS, dora=kind == "sized"))
    with monkeypatch.context() as patch:
        patch.setattr("quant_methods.training.checkpoints.write_bytes", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(job)
    assert (job.work / "checkpoint-3").is_dir()
    outcome = finetune(job)
    assert outcome.resumed == 2
    check_went_on(outcome, request.getfixturevalue(kind), job.out)
    assert not job.work.exists()


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_loss(coded_model, chats, tuned, tmp_path):
    out = tmp_path / "out"
    code = (
        "import sys, torch; torch.set_num_threads(1)\nfrom pathlib import Path\n"
        "from quant_methods.finetuning.job import Job, finetune\n"
        f"from tests.quant_methods.finetuning.test_job import SETTINGS\n"
        f"finetune(Job(Path({str(coded_model)!r}), Path({str(chats)!r}), Path({str(out)!r}), SETTINGS))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.getcwd()})
    mark = tmp_path / ".out.finetune/checkpoint-2/whole"
    while not mark.exists():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    outcome = finetune(Job(coded_model, chats, out, SETTINGS))
    check_went_on(outcome, tuned, out)


def test_an_unfinished_run_of_something_else_is_kept(coded_model, chats, tmp_path):
    job = Job(coded_model, chats, tmp_path / "out", SETTINGS)
    (job.work / "checkpoint-1").mkdir(parents=True)
    (job.work / "checkpoint-1/whole").touch()
    about = job.describe(read_examples(coded_model, chats, 4, 0))
    (job.work / "job.json").write_text(json.dumps(about | {"settings": about["settings"] | {"rank": 5}}))
    with pytest.raises(ParetoError, match=r"unfinished run with another rank \(5, not 4\); give the same"):
        finetune(job)
    (job.work / "job.json").write_text(json.dumps(about | {"data": {}}))
    with pytest.raises(ParetoError, match="unfinished run with other data"):
        finetune(job)
    assert (job.work / "checkpoint-1/whole").is_file()


def test_what_others_wrote_is_not_taken_for_a_run(coded_model, chats, tmp_path):
    job = Job(coded_model, chats, tmp_path / "out", SETTINGS)
    job.work.mkdir()
    (job.work / "mine").write_text("mine")
    with pytest.raises(ParetoError, match="holds mine, which pareto did not write"):
        finetune(job)
    assert (job.work / "mine").read_text() == "mine"


def test_memory_that_runs_out_is_answered_by_what_takes_less(coded_model, chats, tmp_path, monkeypatch):
    def load(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("quant_methods.finetuning.load.load_coded", load)
    with pytest.raises(ParetoError, match=r"on cpu; give --micro-batch 1 .* --checkpointing .* --length 32"):
        finetune(Job(coded_model, chats, tmp_path / "out", SETTINGS))


def test_each_answer_is_an_example_and_whole_chats_are_held_out(tiny_model, tmp_path):
    data = tmp_path / "data.jsonl"
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    data.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)))
    examples = read_examples(tiny_model, data, 3, seed=0)
    assert (len(examples.training), len(examples.held_out)) == (4, 4)
    assert examples.training[1] == {"prompt": turns[:3], "completion": turns[3:]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"messages": [{"role": "user", "content": "?"}]}], "no message of the role 'assistant'"),
        ([{"text": "a"}, {"messages": [{"role": "user", "content": "?"}]}], "mixes lines"),
        ([{"text": "a"}], "leaves none to train on"),
        ([{"words": "a"}], "line 1: not a JSON object with a 'text' or a 'messages' field"),
    ],
)
def test_data_of_no_use_is_one_line(tiny_model, tmp_path, lines, message):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ParetoError, match=message):
        read_examples(tiny_model, data, 4, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("q_prj",)}, r"--targets: no layer is called 'q_prj'; layers: .*q_proj"),
        ({"micro_batch": 3}, "--micro-batch 3 does not divide --batch 4"),
        ({"rank": 0}, "--lora-rank 0: expected 1 or more"),
        ({"length": 999}, "--length 999 exceeds the model's context of 256"),
        ({"length": 3}, "--length 3 tokens"),
        ({"dora": True, "pooled": True}, "--pooled moves zero-points, which hold no magnitudes; leave out --dora"),
    ],
)
def test_settings_that_make_no_training_are_one_line(coded_model, chats, tmp_path, changes, message):
    with pytest.raises(ParetoError, match=message):
        finetune(Job(coded_model, chats, tmp_path / "out", dataclasses.replace(SETTINGS, **changes)))
    # No unfinished run is left that would keep a corrected command from starting.
    assert not list(tmp_path.iterdir())


def test_the_adapter_of_another_model_is_one_line(tuned, coded_model, tmp_path):
    config = json.loads((tuned / "adapter_config.json").read_text())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes((tuned / "adapter_model.safetensors").read_bytes())
    for change, said in (
        ({"bias": "all"}, "bias 'all' cannot be merged"),
        ({"use_dora": True}, "it lacks .*magnitude"),
    ):
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ParetoError, match=said):
            merge(coded_model, tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ParetoError, match="is no adapter of peft's"):
        merge(coded_model, coded_model, tmp_path / "out")
