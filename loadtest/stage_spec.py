"""What a stage of a run is asked to do: what its flags, its users and its results share."""

from __future__ import annotations

from dataclasses import dataclass

HOLD, TRACE = "hold", "trace"
"""The shape of ``--concurrency`` and ``--rate``, and that of a recorded trace; others are named after their flags."""
DEFAULT_MAX_ERROR_RATE = 0.05
"""The fraction of a stage's requests that may fail where ``--max-error-rate`` says nothing."""


@dataclass(frozen=True)
class StageSpec:
    """What a stage is asked to do.

    Attributes:
        index: position in the run.
        concurrency: users of a closed loop, the most of them where their number changes; None in an open loop.
        rate: requests per second of an open loop, the most of them where the rate changes; of a trace the mean, or
            None until that is read. None in a closed loop.
        arrival: name of one of :data:`loadtest.shapes.arrivals.ARRIVALS`.
        burstiness: see :func:`loadtest.shapes.arrivals.poisson`.
        max_concurrency: most requests in flight in an open loop; later ones wait, and their wait counts as latency.
        warmup: requests to send and await first, left out of the results.
        requests: measured requests; None for no limit.
        duration_s: seconds in which measured requests may start; None for no limit.
        shape: how the load goes over time: see :mod:`loadtest.shapes.registry`.
        profile: what the shape's flag says.
        speed: of a trace: 2 replays it in half the time.

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
    shape: str = HOLD
    profile: str = ""
    speed: float = 1.0

    @property
    def mode(self) -> str:
        """``closed`` or ``open``."""
        return "closed" if self.rate is None and self.shape != TRACE else "open"


SWEEP = "sweep"
GOALS = ("knee", "max-rate", SWEEP)
"""What ``--find`` can search for."""


@dataclass(frozen=True)
class SearchSettings:
    """What is searched for.

    Attributes:
        goal: ``knee``: the highest rate at which the server's queue does not grow. ``max-rate``: the highest at which
            besides enough requests meet the limits of ``--goodput``. ``sweep``: no one rate, but how the server does at
            several between one request at a time and all at once.
        max_stages: stages at most, the first one included.
        tolerance: stop when the lowest rate not sustained is at most this fraction above the highest one that was.
        attainment: fraction of the requests that must be good.
        users: of the closed loop that comes first, or in a sweep after that of one user.

    """

    goal: str
    max_stages: int = 8
    tolerance: float = 0.05
    attainment: float = 0.9
    users: int = 256
