from __future__ import annotations

import numpy as np
import pytest

from loadtest.errors import LoadTestError
from loadtest.workloads.distributions import parse_distribution


def draw(text: str, count: int = 20_000, seed: int = 3) -> np.ndarray:
    distribution, rng = parse_distribution(text, "--x"), np.random.default_rng(seed)
    return np.array([distribution.sample(rng) for _ in range(count)])


def test_constant_with_and_without_its_name() -> None:
    assert set(draw("128", 50)) == set(draw("constant:128", 50)) == {128}


def test_uniform_covers_both_ends_evenly() -> None:
    drawn = draw("uniform:3:7")
    counts = np.bincount(drawn)[3:]
    assert drawn.min() == 3
    assert drawn.max() == 7
    assert counts.min() > 0.9 * len(drawn) / 5


def test_normal_has_its_mean_and_spread() -> None:
    drawn = draw("normal:500:50")
    assert abs(drawn.mean() - 500) < 2
    assert abs(drawn.std() - 50) < 2


def test_lognormal_has_its_median_and_log_spread() -> None:
    drawn = draw("lognormal:400:0.5")
    assert abs(np.median(drawn) - 400) < 12
    assert abs(np.log(drawn).std() - 0.5) < 0.02


def test_exponential_has_its_mean() -> None:
    assert abs(draw("exponential:300").mean() - 300) < 10


def test_choice_draws_only_its_values() -> None:
    assert set(draw("choice:64,512,2048", 500)) == {64, 512, 2048}


def test_bounds_clip_and_nothing_is_below_one() -> None:
    drawn = draw("normal:100:500:50:200", 2000)
    assert (drawn.min(), drawn.max()) == (50, 200)
    assert draw("normal:2:50", 2000).min() == 1


def test_a_seed_repeats_the_draws() -> None:
    assert (draw("lognormal:100:1", 100, seed=5) == draw("lognormal:100:1", 100, seed=5)).all()
    assert (draw("lognormal:100:1", 100, seed=5) != draw("lognormal:100:1", 100, seed=6)).any()


@pytest.mark.parametrize(
    "text",
    [
        *("", "many", "uniform", "uniform:5", "uniform:9:3", "uniform:1:2:3", "gauss:1:2", "normal:5:-1", "0", "-4"),
        *("1.5", "nan", "constant:inf", "choice:", "choice:0,2", "normal:5:1:9:3", "lognormal:0:1", "exponential:0"),
    ],
)
def test_nonsense_is_refused_with_the_flag_and_the_text(text: str) -> None:
    with pytest.raises(LoadTestError, match=f"--prompt-tokens {text}"):
        parse_distribution(text, "--prompt-tokens")
