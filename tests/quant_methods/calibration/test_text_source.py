"""Token sequences: windows of a text in order, samples by seed, and clear refusals."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.calibration import text_source
from quant_methods.calibration.text_source import load_sequences, load_tokenizer, sample_sequences
from quant_methods.progress import Lines


def test_windows_are_the_documents_in_file_order(tiny_model: Path, tmp_path: Path) -> None:
    documents = ["One two three four.", "A second document, a little longer than the first.", "Third."]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps({"text": d, "source": "x"}) for d in documents) + "\n\n")
    tokenizer = load_tokenizer(tiny_model)
    ids = [token for document in documents for token in tokenizer(document)["input_ids"]]
    length = len(ids) // 3
    assert load_sequences(tiny_model, path, 3, length).flatten().tolist() == ids[: 3 * length]
    assert ids.count(tokenizer.bos_token_id) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "is empty"),
        ("blank.jsonl", "\n\n", "is empty"),
        ("short.txt", "Too short.", r"has \d+ tokens; 4 x 64 = 256 are needed for calibration"),
        (
            "bad.jsonl",
            '{"text": "fine"}\n{"txt": "no"}\n',
            "line 2: not a JSON object with a 'text' or a 'messages' field",
        ),
        ("bad.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("bad.jsonl", '{"messages": ["hi"]}\n', "line 1: 'messages' is not a list of objects with 'role'"),
        ("bad.jsonl", '{"text": 5}\n', "'text' is not a string"),
        ("data.csv", "a,b", r"expected a \.txt file, or a \.jsonl file"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
    ],
)
def test_bad_texts_are_one_clear_line(
    tiny_model: Path, tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ParetoError, match=message):
        load_sequences(tiny_model, path, 4, 64)
    with pytest.raises(ParetoError, match=r"missing\.txt: No such file"):
        load_sequences(tiny_model, tmp_path / "missing.txt", 4, 64)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_byte_order_mark_is_no_text(tiny_model: Path, tmp_path: Path, suffix: str) -> None:
    text = "Some text to read, of more than a few words. " * 20
    content = (text if suffix == ".txt" else json.dumps({"text": text})).encode()
    plain, marked = tmp_path / f"plain{suffix}", tmp_path / f"marked{suffix}"
    plain.write_bytes(content)
    marked.write_bytes(b"\xef\xbb\xbf" + content)
    found, wanted = (load_sequences(tiny_model, path, 2, 32) for path in (marked, plain))
    assert torch.equal(found, wanted)


def test_chats_are_written_by_the_template(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}")
    chats, path = (
        [{"role": "user", "content": "What is 3 times 7?"}, {"role": "assistant", "content": "21."}],
        tmp_path / "c.jsonl",
    )
    path.write_text("\n".join([json.dumps({"messages": chats})] * 9))
    wanted = load_tokenizer(model)("<user>What is 3 times 7?|<assistant>21.|", add_special_tokens=False)["input_ids"]
    assert load_sequences(model, path, 3, len(wanted)).tolist() == [wanted] * 3
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ParetoError, match=r"chat template refuses the chat .*roles must alternate"):
        load_sequences(model, path, 3, 8)
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ParetoError, match="no chat template to write them with; give lines with a 'text' field"):
        load_sequences(model, path, 3, 8)


def test_calibration_is_no_longer_than_the_context(tiny_model: Path, text_file: Path) -> None:
    with pytest.raises(
        ParetoError, match="257 tokens exceed the model's context of 256; give --calibration-length 256"
    ):
        load_sequences(tiny_model, text_file, 1, 257)


def test_samples_follow_seed_and_split(tiny_model: Path) -> None:
    first = load_sequences(tiny_model, None, 3, 24, seed=5)
    assert first.shape == (3, 24)
    assert first.dtype == torch.int64
    assert (first[:, 0] == 0).all(), "samples start with the beginning-of-sequence token"
    assert (first != 1).all(), "the end-of-sequence token is never drawn"
    assert len({tuple(row) for row in first.tolist()}) == 3
    assert torch.equal(sample_sequences(tiny_model, 3, 24, 5, split="calibration"), first)
    assert not torch.equal(load_sequences(tiny_model, None, 3, 24, seed=6), first)
    assert not torch.equal(load_sequences(tiny_model, None, 3, 24, seed=5, split="evaluation"), first)


def test_sampling_uses_the_models_distribution(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = sample_sequences(tiny_model, 256, 2, 0, split="calibration")[:, 1]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.zeros((1, 1), dtype=torch.int64)).logits[0, -1]
    logits[1] = -torch.inf
    log_probabilities = logits.log_softmax(-1)
    entropy = -(log_probabilities.exp() * log_probabilities.nan_to_num(neginf=0.0)).sum()
    # The mean log-likelihood of samples is minus the entropy, within a few standard errors.
    spread = log_probabilities[tokens].std() / 16
    assert abs(log_probabilities[tokens].mean() + entropy) < 5 * spread


def test_samples_are_cached(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path))
    first = load_sequences(tiny_model, None, 2, 8)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("sampled again")

    with monkeypatch.context() as patch:
        patch.setattr(text_source, "sample_sequences", never)
        assert torch.equal(load_sequences(tiny_model, None, 2, 8), first)
        with pytest.raises(AssertionError, match="sampled again"):
            load_sequences(tiny_model, None, 2, 9)
    (entry,) = [p for p in tmp_path.rglob("*.safetensors") if p.stat().st_size]
    entry.write_bytes(b"damaged")
    assert torch.equal(load_sequences(tiny_model, None, 2, 8), first)


def test_sequences_longer_than_the_context_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ParetoError, match="257 tokens exceed the model's context of 256"):
        load_sequences(tiny_model, None, 1, 257)
    with pytest.raises(ParetoError, match="unknown split 'test'"):
        load_sequences(tiny_model, None, 1, 8, split="test")  # type: ignore[arg-type]


def test_sampling_says_how_far_it_is_without_a_terminal(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path))
    monkeypatch.setattr(text_source, "Lines", functools.partial(Lines, every=0.01))
    load_sequences(tiny_model, None, 2, 30, 0, "evaluation")
    assert re.search(r"sampling 2 x 30 evaluation tokens: \d+ of 30 steps, 0 s", capfd.readouterr().err)


def test_a_calibration_seed_draws_other_documents_and_0_the_first(tiny_model: Path, tmp_path: Path) -> None:
    lines = tmp_path / "t.jsonl"
    lines.write_text("".join(json.dumps({"text": f"{word} " * 40}) + "\n" for word in ("a", "b", "c", "d", "e", "f")))
    one = tmp_path / "t.txt"
    one.write_text(" ".join(str(i) for i in range(400)))
    for text in (lines, one):
        first, second = (load_sequences(tiny_model, text, 2, 16, seed=seed) for seed in (0, 3))
        assert not torch.equal(first, second)
        assert torch.equal(load_sequences(tiny_model, text, 2, 16, seed=3), second)
        assert torch.equal(load_sequences(tiny_model, text, 2, 16), first)
        # What is evaluated stays what it is.
        evaluated = [load_sequences(tiny_model, text, 2, 16, seed=seed, split="evaluation") for seed in (0, 3)]
        assert torch.equal(evaluated[0], evaluated[1])
