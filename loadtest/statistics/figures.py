"""The figures of a stage by name: ``p95_ttft``, ``mean_e2e``, ``requests_per_s``, ``error_rate`` and the like.

A new kind of figure is one entry of ``RATES`` or ``FRACTIONS``, or a quantity of :mod:`loadtest.statistics.samples`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from loadtest.errors import LoadTestError
from loadtest.statistics.samples import QUANTITIES, Floats, Samples

RATES: dict[str, Callable[[Samples], Floats]] = {
    "requests_per_s": lambda samples: samples.ok.astype(np.float64),
    "output_tokens_per_s": lambda samples: samples.output_tokens,
    "goodput_per_s": lambda samples: samples.good.astype(np.float64),
}
"""What each request adds at its end; the figure is the sum a second."""
FRACTIONS: dict[str, Callable[[Samples], Floats]] = {
    "error_rate": lambda samples: (~samples.ok).astype(np.float64),
    "goodput": lambda samples: samples.good.astype(np.float64),
}
"""1 for the requests that count, 0 for the others."""
_NEED_SLO = ("goodput", "goodput_per_s")
_LATENCY = re.compile(rf"(?:(mean)|p(\d{{1,2}}(?:\.\d+)?))_({'|'.join(QUANTITIES)}|e2el)")
STANDARD = (
    *(f"{part}_{quantity}" for quantity in QUANTITIES for part in ("mean", "p50", "p90", "p95", "p99")),
    *RATES,
    *FRACTIONS,
)
"""The figures that every summary has."""


@dataclass(frozen=True)
class Figure:
    """One number that a stage is judged by.

    Attributes:
        name: as the user writes it.
        kind: ``mean`` or ``quantile`` of a quantity, ``rate``, or ``fraction``.
        of: the quantity; for rates and fractions the name again.
        p: of a quantile, above 0 and below 1.

    """

    name: str
    kind: str
    of: str
    p: float = 0.0

    @property
    def unit(self) -> str:
        """``ms``, ``/s`` or nothing."""
        return {"rate": "/s", "fraction": ""}.get(self.kind, "ms")

    @property
    def more_is_worse(self) -> bool:
        """Whether a rise is a regression."""
        return self.kind in ("mean", "quantile") or self.name == "error_rate"

    def applies(self, samples: Samples) -> bool:
        """Whether the stage has what the figure is made of."""
        if self.name == "output_tokens_per_s" and np.isnan(samples.output_tokens).any():
            return False
        if self.kind in ("rate", "fraction"):
            return len(samples) > 0 and (samples.has_slo or self.name not in _NEED_SLO)
        return len(samples.quantities[self.of].values) > 0


def parse_figure(name: str) -> Figure:
    """Return the figure of a name.

    Raises:
        LoadTestError: there is none of that name.

    """
    if name in RATES:
        return Figure(name, "rate", name)
    if name in FRACTIONS:
        return Figure(name, "fraction", name)
    found = _LATENCY.fullmatch(name)
    if not found or (found[2] and not 0 < float(found[2]) < 100):
        raise LoadTestError(
            f"no figure {name!r}: expected mean_X, p50_X, p99.9_X and the like with X one of {', '.join(QUANTITIES)}, "
            f"or one of {', '.join([*RATES, *FRACTIONS])}"
        )
    quantity = "e2e" if found[3] == "e2el" else found[3]
    if found[1]:
        return Figure(name, "mean", quantity)
    return Figure(name, "quantile", quantity, float(found[2]) / 100)
