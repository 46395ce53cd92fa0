from __future__ import annotations

import pytest

from loadtest.errors import LoadTestError
from loadtest.shapes import parse_steps, users_at


def test_steps_follow_each_other_and_end() -> None:
    steps = parse_steps(["1:10", "4:20.5"])
    assert [users_at(steps, t) for t in (0, 9.9, 10, 30.4, 30.5)] == [1, 1, 4, 4, None]


@pytest.mark.parametrize("word", ["4", "0:5", "4:0", "4:-1", "x:5", "4:nan"])
def test_bad_steps_are_refused(word: str) -> None:
    with pytest.raises(LoadTestError, match=f"--steps {word}"):
        parse_steps([word])
