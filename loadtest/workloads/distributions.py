"""Random token counts from a short text such as ``uniform:100:500``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loadtest.errors import LoadTestError

GRAMMAR = (
    "N, constant:N, uniform:LOW:HIGH, normal:MEAN:STD[:MIN:MAX], lognormal:MEDIAN:SIGMA[:MIN:MAX], "
    "exponential:MEAN[:MIN:MAX] or choice:N,N,..."
)
_MAX_TOKENS = 10_000_000
_PARAMETERS = {"constant": 1, "uniform": 2, "normal": 2, "lognormal": 2, "exponential": 1}


@dataclass(frozen=True)
class TokenDistribution:
    """A distribution of positive whole numbers of tokens.

    Attributes:
        text: what the user wrote.
        kind: ``constant``, ``uniform``, ``normal``, ``lognormal``, ``exponential`` or ``choice``.
        values: the parameters in the order of the grammar; for ``choice`` the values to choose from.
        low: least number that is ever drawn; smaller draws become this one.
        high: greatest number that is ever drawn.

    """

    text: str
    kind: str
    values: tuple[float, ...]
    low: int = 1
    high: int = _MAX_TOKENS

    def sample(self, rng: np.random.Generator) -> int:
        """Draw one number of tokens, between ``low`` and ``high``."""
        first = self.values[0]
        if self.kind == "constant":
            drawn = first
        elif self.kind == "uniform":
            drawn = float(rng.integers(int(first), int(self.values[1]), endpoint=True))
        elif self.kind == "normal":
            drawn = float(rng.normal(first, self.values[1]))
        elif self.kind == "lognormal":
            drawn = float(rng.lognormal(math.log(first), self.values[1]))
        elif self.kind == "exponential":
            drawn = float(rng.exponential(first))
        else:
            drawn = float(rng.choice(self.values))
        return min(max(round(drawn), self.low), self.high)


def parse_distribution(text: str, flag: str) -> TokenDistribution:
    """Read a distribution of token counts.

    Args:
        text: see ``GRAMMAR``; a bare number is a constant.
        flag: the flag it was given to, for the error.

    Raises:
        LoadTestError: the text is no valid distribution.

    """
    text = str(text).strip()
    kind, _, rest = text.partition(":")
    if not rest:
        kind, rest = "constant", text
    try:
        numbers = tuple(float(word) for word in rest.replace(",", ":").split(":"))
    except ValueError:
        raise LoadTestError(f"{flag} {text}: expected {GRAMMAR}") from None
    if not all(math.isfinite(number) for number in numbers):
        raise LoadTestError(f"{flag} {text}: expected finite numbers")
    if kind == "choice":
        _check(all(1 <= n <= _MAX_TOKENS and n == int(n) for n in numbers), flag, text, "choices are whole, at least 1")
        return TokenDistribution(text, kind, numbers)
    if kind not in _PARAMETERS:
        raise LoadTestError(f"{flag} {text}: unknown distribution {kind!r}; expected {GRAMMAR}")
    count = _PARAMETERS[kind]
    bounded = kind in ("normal", "lognormal", "exponential")
    if len(numbers) != count and not (bounded and len(numbers) == count + 2):
        raise LoadTestError(f"{flag} {text}: wrong number of parameters; expected {GRAMMAR}")
    values, bounds = numbers[:count], numbers[count:] or (1, _MAX_TOKENS)
    _check(1 <= values[0] <= _MAX_TOKENS, flag, text, f"the first parameter is from 1 to {_MAX_TOKENS}")
    if kind in ("constant", "uniform"):
        _check(all(n == int(n) for n in values), flag, text, "token counts are whole numbers")
    if kind == "uniform":
        _check(values[0] <= values[1] <= _MAX_TOKENS, flag, text, "LOW must not be above HIGH")
    if kind in ("normal", "lognormal"):
        _check(values[1] >= 0, flag, text, "the spread must not be negative")
    _check(1 <= bounds[0] <= bounds[1] <= _MAX_TOKENS, flag, text, "MIN is at least 1 and not above MAX")
    return TokenDistribution(text, kind, values, math.ceil(bounds[0]), int(bounds[1]))


def _check(holds: bool, flag: str, text: str, rule: str) -> None:
    if not holds:
        raise LoadTestError(f"{flag} {text}: {rule}")
