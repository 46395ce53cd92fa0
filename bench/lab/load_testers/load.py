"""What every tool is asked to do: loads to be exact under, and servers that misbehave."""

from __future__ import annotations

from dataclasses import dataclass

TTFT_MS, ITL_MS = 200, 20
"""The mock server's delays, in milliseconds."""
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 16


@dataclass(frozen=True)
class Load:
    """One run of a tool.

    Attributes:
        requests: how many requests the tool is told to send.
        users: of a closed loop; None in an open one.
        rate: requests per second of an open loop at even distances; None in a closed one.
        output_tokens: of every answer.
        mock: further flags of the mock server.
        users_instead: users of the closed loop that a tool without an open one may take for it; None leaves it out.

    """

    requests: int
    users: int | None = None
    rate: int | None = None
    output_tokens: int = OUTPUT_TOKENS
    mock: tuple[str, ...] = ()
    users_instead: int | None = None

    def planted(self, requests: int) -> int:
        """Return how many of so many requests the mock server fails on purpose."""
        every = next((word.partition(":")[2] for word in self.mock if ":" in word), None)
        return requests // int(every) if every else 0


LONG = "64 users, 128 tokens"
LOADS = {
    "1 user": Load(10, users=1),
    "16 users": Load(160, users=16),
    "64 users": Load(640, users=64),
    # 3,200 chunks a second, among which requests, and what a tool does while it waits, cost little.
    LONG: Load(128, users=64, output_tokens=128),
    "20/s": Load(120, rate=20),
    "100/s": Load(600, rate=100),
    "300/s": Load(1500, rate=300),
}
"""The loads, by name; each takes about five seconds."""


def _misbehaving(*flags: str) -> Load:
    return Load(100, rate=20, mock=flags, users_instead=10)


CASES = {
    "every 10th answer empty": _misbehaving("--fault", "empty:10"),
    "every 10th stream cut": _misbehaving("--fault", "cut:10"),
    "every 5th answer HTTP 500": _misbehaving("--fault", "http_500:5"),
    "4 tokens a chunk, no usage": _misbehaving("--tokens-per-chunk", "4", "--no-usage"),
    "an outage of 2 s": _misbehaving("--stall-at-s", "2", "--stall-s", "2"),
}
"""Servers that misbehave, by name."""
