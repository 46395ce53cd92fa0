"""What a stage of a run is asked to do: what its flags, its users and its results share."""

from __future__ import annotations

from dataclasses import dataclass

ARRIVALS = ("constant", "poisson")
DEFAULT_MAX_ERROR_RATE = 0.05
"""The fraction of a stage's requests that may fail where ``--max-error-rate`` says nothing."""


@dataclass(frozen=True)
class StageSpec:
    """What a stage is asked to do.

    Attributes:
        index: position in the run.
        concurrency: users of a closed loop; None in an open loop.
        rate: requests per second of an open loop; None in a closed loop.
        arrival: ``constant`` or ``poisson``.
        burstiness: see :func:`loadtest.load.arrivals.intended_starts`.
        max_concurrency: most requests in flight in an open loop; later ones wait, and their wait counts as latency.
        warmup: requests to send and await first, left out of the results.
        requests: measured requests; None for no limit.
        duration_s: seconds in which measured requests may start; None for no limit.

    """

    index: int = 0
    concurrency: int | None = None
    rate: float | None = None
    arrival: str = "poisson"
    burstiness: float = 1.0
    max_concurrency: int | None = None
    warmup: int = 0
    requests: int | None = None
    duration_s: float | None = None

    @property
    def mode(self) -> str:
        """``closed`` or ``open``."""
        return "closed" if self.rate is None else "open"
