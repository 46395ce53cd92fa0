"""The driver's shapes as Locust's: what its runners, headless or from the web UI, are to do as time goes by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from locust import LoadTestShape
from locust.runners import MasterRunner

from loadtest import clock
from loadtest.shapes.shape import Shape

# Workers tell their master every 3 seconds how many users they have.
_USERS_KNOWN_AFTER_S = 5.0


class DriverShape(LoadTestShape):
    """Sets the number of users of a closed loop; of an open loop it gives each process one, which sends its part.

    Users that are too many finish their request first, as Locust's ``--stop-timeout`` has it.

    Args:
        runner: Locust's.
        read: returns the shape of a closed loop, None of an open one, and the seconds after which it ends.

    """

    abstract = True

    def __init__(self, runner: Any, read: Callable[[], tuple[Shape | None, float]]) -> None:
        super().__init__()
        self.runner = runner
        self._read = read
        self._workers: list[str] = []
        self._zero: float | None = None
        self._seen = False

    def begin(self) -> None:
        """Count from now; Locust's own time begins before the test is prepared."""
        self._zero, self._seen = clock.now(), False

    def end(self) -> None:
        """Forget the test."""
        self._zero = None

    def workers(self) -> list[str]:
        """Return the names of the workers that share the present test; none where this process sends by itself."""
        return self._workers

    def tick(self) -> tuple[int, float] | None:
        """Return (users, users to start or stop per second), or None at the end."""
        if self._zero is None:
            self._workers = _workers(self.runner)
        elapsed = 0.0 if self._zero is None else clock.now() - self._zero
        closed, limit_s = self._read()
        if closed is not None:
            users = closed.users(elapsed)
            return None if elapsed >= limit_s else (users, float(max(1, users)))
        # A stream of arrivals ends by itself, and its user with it.
        present = self.runner.user_count
        self._seen = self._seen or (self._zero is not None and present > 0)
        if self._zero is not None and present == 0 and (self._seen or elapsed > _USERS_KNOWN_AFTER_S):
            return None
        count = max(1, len(self._workers))
        return count, float(count)


def _workers(runner: Any) -> list[str]:
    if not isinstance(runner, MasterRunner):
        return []
    return sorted(client.id for client in runner.clients.all if client.state != "missing")
