"""Load shapes for plain Locust: ``locust -f loadtest/locustfile.py,loadtest/shapes.py --steps 4:30 16:30 64:30``."""

from __future__ import annotations

from typing import Any

from locust import LoadTestShape, events

from loadtest.errors import LoadTestError


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    """Add ``--steps``."""
    parser.add_argument(
        "--steps",
        nargs="+",
        default=["1:30", "4:30", "16:30"],
        metavar="USERS:SECONDS",
        help="numbers of users one after the other, each for so long (default: 1:30 4:30 16:30)",
    )


def parse_steps(words: list[str]) -> list[tuple[int, float]]:
    """Read ``USERS:SECONDS`` words.

    Raises:
        LoadTestError: a word does not fit, or a number is not above 0.

    """
    steps = []
    for word in words:
        users, _, seconds = word.partition(":")
        try:
            step = int(users), float(seconds)
        except ValueError:
            step = (0, 0.0)
        if step[0] < 1 or not step[1] > 0:
            raise LoadTestError(f"--steps {word}: expected USERS:SECONDS, both above 0")
        steps.append(step)
    return steps


def users_at(steps: list[tuple[int, float]], elapsed: float) -> int | None:
    """Return the number of users ``elapsed`` seconds into the test; None when the steps are over."""
    end = 0.0
    for users, seconds in steps:
        end += seconds
        if elapsed < end:
            return users
    return None


class StepShape(LoadTestShape):
    """Goes through ``--steps``; then the test stops."""

    abstract = False

    def tick(self) -> tuple[int, float] | None:
        """Return (users, users to start or stop per second), or None at the end."""
        steps = parse_steps(self.runner.environment.parsed_options.steps)
        users = users_at(steps, self.get_run_time())
        return None if users is None else (users, float(users))
