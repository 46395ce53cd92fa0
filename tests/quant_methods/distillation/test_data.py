import json
from pathlib import Path

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import load_sequences, load_tokenizer
from quant_methods.distillation.data import encode_chat, load
from tests.quant_methods.distillation.conftest import REF


def test_text_is_cut_as_calibration_cuts_it(text):
    data = load(REF, text, 5, 2, 16)
    assert torch.equal(data.tokens, load_sequences(REF, text, 7, 16))
    assert data.counted.all()
    assert len(data) == 5
    assert torch.equal(data[6]["input_ids"], data.tokens[6])


def test_of_a_chat_the_assistants_words_count(chats):
    data = load(REF, chats, 3, 1, 40)
    tokenizer = load_tokenizer(REF)
    learnt = data.tokens[1, 1:][data.counted[1]]
    said = tokenizer.decode(learnt)
    assert "It is 1, gladly." in said
    assert "Say" not in said
    assert "It is" not in tokenizer.decode(data.prompts[1])
    assert tokenizer.decode(data.prompts[1]).count("Say 1.") == 1


def test_every_answer_of_a_longer_chat_counts():
    tokenizer = load_tokenizer(REF)
    chat = [{"role": ("user", "assistant")[n % 2], "content": f"part {n}"} for n in range(4)]
    ids, mine = encode_chat(tokenizer, chat, Path("x"))
    said = tokenizer.decode([token for token, own in zip(ids, mine, strict=True) if own])
    assert "part 1" in said
    assert "part 3" in said
    assert "part 0" not in said
    assert "part 2" not in said


def test_a_chat_whose_answer_lies_behind_the_cut_is_left_out(tmp_path):
    path = tmp_path / "chats.jsonl"
    short, long = "Hi.", "word " * 50
    lines = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]
        for question in (long, short, long, short)
    ]
    path.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))
    assert load(REF, path, 1, 1, 32).counted.any(1).all()
    with pytest.raises(
        ParetoError, match="has 2 chats with an answer within 32 tokens; --samples 2 and --held-out 1 need"
    ):
        load(REF, path, 2, 1, 32)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"messages": [{"role": "user", "content": "a"}]}\n{"text": "b"}', "mixes lines"),
        ("nonsense", "line 1: not a JSON object"),
        ("", "is empty"),
    ],
)
def test_a_file_that_is_of_no_use_is_told_in_one_line(tmp_path, lines, said):
    path = tmp_path / "data.jsonl"
    path.write_text(lines)
    with pytest.raises(ParetoError, match=said) as caught:
        load(REF, path, 1, 1, 16)
    assert "\n" not in str(caught.value)


def test_numbers_that_make_no_data_are_refused(text):
    with pytest.raises(ParetoError, match="--length 9000 exceeds the teacher's context of 8192"):
        load(REF, text, 1, 1, 9000)
    with pytest.raises(ParetoError, match="--held-out 0"):
        load(REF, text, 1, 0, 16)
