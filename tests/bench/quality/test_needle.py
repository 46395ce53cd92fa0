import pytest

from bench.quality.needle import KEYS, Trial, is_correct, make_trials, read_haystack, summarize
from kv_cache.errors import ParetoError


class Words:
    """A tokenizer whose tokens are words and line ends, with a beginning-of-sequence token that it adds itself."""

    def __init__(self):
        self.ids = {"<s>": 0}

    def __call__(self, text, add_special_tokens=True, verbose=True):
        words = text.replace("\n", " \n ").split(" ")
        ids = [self.ids.setdefault(word, len(self.ids)) for word in words if word]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}

    def decode(self, ids):
        names = {v: k for k, v in self.ids.items()}
        return " ".join(names[i] for i in ids)


@pytest.fixture
def tokenizer():
    return Words()


@pytest.fixture
def filler(tokenizer):
    text = " ".join(f"w{i}." if i % 7 == 0 else f"w{i}" for i in range(500))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def grid(tokenizer, filler, **changes):
    arguments = {"lengths": [100, 300], "depths": [0.0, 0.5, 1.0], "per_cell": 3, "seed": 1} | changes
    return make_trials(tokenizer, filler, arguments.pop("lengths"), arguments.pop("depths"), **arguments)


def test_prompts_fill_the_length_and_hold_the_needle(tokenizer, filler):
    trials = grid(tokenizer, filler)
    assert len(trials) == 2 * 3 * 3
    for trial in trials:
        text = tokenizer.decode(trial.prompt)
        assert len(trial.prompt) + trial.answer_tokens == trial.length
        assert trial.prompt[0] == 0
        assert text.count(f"is: {trial.number}.") == 1
        assert text.endswith("is:")
        key = next(key for key in KEYS if f"for {key} is: {trial.number}." in text)
        assert f"special magic number for {key}?" in text


@pytest.mark.parametrize(("depth", "low", "high"), [(0.0, 0, 2), (0.5, 120, 160), (1.0, 260, 300)])
def test_depth_is_where_the_needle_lies(tokenizer, filler, depth, low, high):
    for trial in grid(tokenizer, filler, lengths=[300], depths=[depth]):
        words = [tokenizer.decode([i]) for i in trial.prompt]
        assert low <= words.index(f"{trial.number}.") - 7 <= high


def test_needles_follow_the_end_of_a_sentence(tokenizer, filler):
    for trial in grid(tokenizer, filler, depths=[0.5]):
        words = [tokenizer.decode([i]) for i in trial.prompt]
        start = words.index(f"{trial.number}.") - 7
        assert words[start - 1].endswith(".")


def test_a_cell_does_not_depend_on_the_others(tokenizer, filler):
    few = grid(tokenizer, filler, lengths=[300], depths=[0.5])
    assert few == [t for t in grid(tokenizer, filler) if (t.length, t.depth) == (300, 0.5)]
    assert few != grid(tokenizer, filler, lengths=[300], depths=[0.5], seed=2)


def test_a_short_haystack_repeats(tokenizer, filler):
    assert all(len(t.prompt) + t.answer_tokens == 300 for t in grid(tokenizer, filler[:20], lengths=[300]))


def test_refusals(tokenizer, filler, tmp_path):
    with pytest.raises(ParetoError, match="too short"):
        grid(tokenizer, filler, lengths=[20])
    with pytest.raises(ParetoError, match="empty"):
        grid(tokenizer, [])
    with pytest.raises(ParetoError, match=r"no \.txt files"):
        read_haystack(tmp_path, tokenizer)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe broken")
    with pytest.raises(ParetoError, match="UTF-8"):
        read_haystack(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" 12345.\nQuestion", True), (" 12345", True), (" 12,345", True), (" 123456", False), (" 1234", False),
     (" 54321. 12345", False), (" no idea", False), ("", False)],
)  # fmt: skip
def test_only_the_first_number_counts(answer, right):
    assert is_correct(Trial(100, 0.5, [0], "12345", 4), answer) is right


def test_summary_by_cell():
    trials = [Trial(100, d, [0], "1", 4) for d in (0.0, 0.0, 1.0, 1.0)]
    needle = summarize(trials, [True, False, True, True])
    assert needle.accuracy.value == 0.75
    assert [(c.length, c.depth, c.accuracy.value, c.accuracy.n) for c in needle.cells] == [
        (100, 0.0, 0.5, 2), (100, 1.0, 1.0, 2),
    ]  # fmt: skip
