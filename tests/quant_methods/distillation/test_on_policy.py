"""What a student writes itself: drawn from its own distribution, judged by its teacher, the same after a stop."""

import contextlib
import json

import pytest
import torch

from kv_cache.atomic import write_bytes
from quant_methods.distillation import command, on_policy
from quant_methods.distillation.data import load
from quant_methods.distillation.distiller import Distiller
from quant_methods.distillation.in_memory import load_model
from quant_methods.distillation.on_policy import Writer, stop_tokens
from quant_methods.distillation.settings import Settings
from quant_methods.training import losses
from tests.quant_methods.distillation.conftest import REF
from tests.quant_methods.distillation.test_distill import arguments, distilled, looks

pytest.importorskip("accelerate")
OWN = "--keep-layers 2 --on-policy 1 --new-tokens 8"


@pytest.fixture(scope="module")
def certain(teacher):
    """A model that is nearly certain of every next token, so that what it draws is what it likes best."""
    model = load_model(teacher, "cpu").eval()
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(1e4 * head.weight.detach())
    return model


def written_on(model, prompt, new):
    """The best token after a prompt, and so on, without padding and without a cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens


def test_it_writes_on_from_prompts_of_any_length_until_a_token_that_ends(certain, teacher, chats):
    data = load(teacher, chats, 8, 2, 48)
    settings = Settings(samples=8, held_out=2, length=48, batch=4, micro_batch=4, on_policy=1, new_tokens=6)
    lengths = {len(data.prompts[number]) for number in (0, 3, 5)}
    expected = [written_on(certain, data.prompts[number], 6) for number in (0, 3, 5)]
    # The third token of the second answer is made one that ends answers.
    stop = expected[1][len(data.prompts[3]) + 2]
    rng = torch.get_rng_state()
    found = Writer(data, settings, [stop]).write(certain, [0, 3, 5], 1)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not certain.training
    assert found["sequence"].tolist() == [-1, -1, -1]
    for row, (number, whole) in enumerate(zip((0, 3, 5), expected, strict=True)):
        start = len(data.prompts[number])
        ends = [place for place in range(start, len(whole)) if whole[place] == stop]
        wanted = whole[: ends[0] + 1] if ends else whole
        assert found["input_ids"][row, : len(wanted)].tolist() == wanted
        # A place counts if what follows it was written.
        places = found["counted"][row].nonzero().flatten().tolist()
        assert places == list(range(start - 1, len(wanted) - 1))
    assert found["counted"].shape == (3, found["input_ids"].shape[1] - 1)
    assert max(lengths) + 6 >= found["input_ids"].shape[1]


def test_of_text_it_writes_the_end_of_windows(certain, teacher, text):
    data = load(teacher, text, 4, 1, 16)
    settings = Settings(samples=4, held_out=1, length=16, batch=4, micro_batch=2, on_policy=1, new_tokens=5)
    found = Writer(data, settings, []).write(certain, [1, 2], 0)
    assert torch.equal(found["input_ids"][:, :11], data.tokens[1:3, :11])
    assert found["input_ids"][0].tolist() == written_on(certain, data.tokens[1, :11].tolist(), 5)
    assert found["counted"].sum(1).tolist() == [5, 5]


def test_it_draws_from_its_own_distribution(teacher, text):
    """Whatever a checkpoint says of sampling, and another seed draws other words."""
    model = load_model(teacher, "cpu").eval()
    model.generation_config.top_k, model.generation_config.temperature = 1, 0.01
    data = load(teacher, text, 1, 1, 16)
    settings = Settings(samples=1, held_out=1, length=16, batch=1, micro_batch=1, on_policy=1, new_tokens=1)
    prompt = data.tokens[:1, :15]
    with torch.no_grad():
        probabilities = model(prompt).logits[0, -1].softmax(-1)
    writer = Writer(data, settings, [])
    drawn = torch.cat([writer.write(model, [0] * 50, seed)["input_ids"][:, -1] for seed in range(40)])
    again = writer.write(model, [0] * 50, 3)["input_ids"][:, -1]
    assert torch.equal(drawn[150:200], again)
    assert not torch.equal(drawn[:50], drawn[50:100])
    likely = probabilities.topk(3).indices
    counts = torch.stack([(drawn == token).float().mean() for token in likely])
    # Five standard deviations of 2000 draws.
    bound = 5 * (probabilities[likely] * (1 - probabilities[likely]) / len(drawn)).sqrt()
    assert ((counts - probabilities[likely]).abs() < bound).all()
    assert model.generation_config.top_k == 1


@pytest.mark.parametrize(
    ("share", "batch", "micro"), [(0.25, 8, 2), (0.5, 4, 4), (0.3, 10, 1), (1, 2, 2), (0.01, 2, 2)]
)
def test_its_share_is_what_was_asked_for_in_every_part_of_the_training(share, batch, micro):
    data = Settings(batch=batch, micro_batch=micro, on_policy=share)
    writer = Writer(None, data, [])
    due = [writer.due(step, part) for step in range(100) for part in range(batch // micro)]
    for start in range(0, len(due), 100):
        assert sum(due[start : start + 100]) == pytest.approx(100 * share, abs=1)


def test_answers_end_where_a_checkpoint_says():
    ends = json.loads((REF / "generation_config.json").read_text()).get("eos_token_id")
    assert stop_tokens(REF) == (ends if isinstance(ends, list) else [ends])


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_the_divergence_is_trls(alpha):
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher = (3 * torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(n)) for n in range(2))
    wanted = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=alpha, reduction="none").sum(-1)
    found = losses.divergence("jsd", alpha)(teacher.log_softmax(-1), student.log_softmax(-1))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_loss_of_what_it_wrote_is_trls_and_no_text_counts(teacher, text, tmp_path, monkeypatch):
    gkd = pytest.importorskip("trl.experimental.gkd")
    judge, real, seen = load_model(teacher, "cpu").eval(), Distiller.compute_loss, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = real(self, model, inputs, *args, **kwargs)
        tokens, counted = inputs["input_ids"], inputs["counted"]
        with torch.no_grad():
            student, wanted = (one(tokens).logits[:, :-1] for one in (model, judge))
        labels = tokens[:, 1:].masked_fill(~counted, -100)
        seen.append((loss.item(), gkd.GKDTrainer.generalized_jsd_loss(student, wanted, labels, beta=0.4).item()))
        return loss

    monkeypatch.setattr(Distiller, "compute_loss", compute_loss)
    distilled(teacher, text, tmp_path / "out", f"{OWN} --loss jsd --skew 0.4 --kl-share 0.3 --steps 2 --float32")
    assert len(seen) == 2
    for found, wanted in seen:
        assert found == pytest.approx(wanted, rel=1e-4)


def test_a_stopped_run_writes_the_same_and_comes_to_the_same_losses(teacher, text, tmp_path, monkeypatch):
    more = "--keep-layers 2 --on-policy 0.5 --new-tokens 8 --micro-batch 2"
    whole = distilled(teacher, text, tmp_path / "whole", more)

    def stop(path, data):
        if "checkpoint-4" in str(path):
            raise KeyboardInterrupt
        write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr("quant_methods.training.checkpoints.write_bytes", stop)
        with pytest.raises(KeyboardInterrupt):
            command.run(arguments(teacher, text, tmp_path / "stopped", more))
    found = distilled(teacher, text, tmp_path / "stopped", more)

    def of(log, name):
        return {entry["step"]: entry[name] for entry in log if name in entry}

    for name in ("loss", "eval_kl", "eval_loss"):
        assert of(found, name) == of(whole, name)
    weights = [tmp_path / name / "model.safetensors" for name in ("whole", "stopped")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_reference_model_learns_from_its_own_words(chats, tmp_path):
    out = tmp_path / "student"
    log = distilled(REF, chats, out, f"{OWN} --keep-layers 4 --length 32 --learning-rate 3e-4 --steps 8 --looks 2")
    assert looks(log)[8]["eval_kl"] < 0.95 * looks(log)[0]["eval_kl"]
    assert "| on_policy | 1.0 |" in (out / "README.md").read_text()


def test_weights_are_rounded_once_for_all_that_it_writes(teacher, text, monkeypatch):
    from quant_methods.distillation import codes

    model, data = load_model(teacher, "cpu"), load(teacher, text, 2, 1, 16)
    settings = Settings(samples=2, held_out=1, length=16, batch=2, micro_batch=2, on_policy=1, new_tokens=8)
    layers = codes.round_weights(model, 3, 32)
    writer, rounded, real = Writer(data, settings, []), [], codes.nearest

    def nearest(weight, grid):
        rounded.append(weight.shape)
        return real(weight, grid)

    monkeypatch.setattr(codes, "nearest", nearest)
    found = writer.write(model, [0, 1], 5)["input_ids"]
    assert len(rounded) == layers
    # What it wrote is what each token's own rounding would have given, and what learns is rounded anew afterwards.
    monkeypatch.setattr(on_policy, "rounded_once", lambda model: contextlib.nullcontext())
    assert torch.equal(writer.write(model, [0, 1], 5)["input_ids"], found)
    assert len(rounded) == layers * (1 + 8)
    model(found).logits.sum().backward()
    assert all(one.grad is not None for one in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_writes_and_learns_too(teacher, text, tmp_path):
    more = f"{OWN} --on-policy 0.5 --kv-bits 4 --weight-bits 4 --group-size 32 --checkpointing --kl-share 1"
    log = distilled(teacher, text, tmp_path / "out", f"{more} --device cuda --learning-rate 1e-3")
    assert looks(log)[6]["eval_kl"] < looks(log)[0]["eval_kl"]


def test_it_writes_with_the_codes_that_it_lives_with(teacher, text, tmp_path, monkeypatch):
    """Its words are those of the cache and the weights in codes; blocks that run again keep no cache otherwise."""
    from quant_methods.distillation import codes

    calls, real = [], codes.CodedCache.attend

    def attend(self, call):
        calls.append((call.query.shape[2], call.key.shape[2]))
        return real(self, call)

    monkeypatch.setattr(codes.CodedCache, "attend", attend)
    few = f"{OWN} --on-policy 0.5 --kv-bits 4,3 --weight-bits 4 --group-size 32 --micro-batch 2"
    log = distilled(teacher, text, tmp_path / "out", f"{few} --checkpointing --kl-share 1 --learning-rate 1e-3")
    assert looks(log)[6]["eval_kl"] < looks(log)[0]["eval_kl"]
    assert (1, 12) in calls
