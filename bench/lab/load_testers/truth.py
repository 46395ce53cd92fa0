"""What really happened: figures of the mock server's own log, defined as those of the tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kv_cache.errors import ParetoError


@dataclass(frozen=True)
class Truth:
    """One run as the server saw it. Latencies are of complete answers.

    Attributes:
        requests: that came.
        complete: got all their tokens.
        empty: got an answer without text.
        cut: got some of their tokens.
        refused: got an HTTP error.
        chunks: with text, of all requests.
        output_tokens: of complete answers.
        ttft_p50_ms: median from the arrival of a request to its first token.
        ttft_p95_ms: the 95th percentile of that.
        tpot_ms: median of (last token - first token) / (tokens - 1).
        e2e_p50_ms: median from the arrival of a request to its last token.
        rate: requests per second, by the first and the last arrival; None for fewer than two.
        uneven_p95_ms: 95th percentile of how far arrivals lie from even distances at that rate.
        first_unix_s: when the first request came.
        last_unix_s: when the last answer ended.

    """

    requests: int
    complete: int
    empty: int
    cut: int
    refused: int
    chunks: int
    output_tokens: int
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    tpot_ms: float | None
    e2e_p50_ms: float | None
    rate: float | None
    uneven_p95_ms: float | None
    first_unix_s: float
    last_unix_s: float


def read_truth(log: Path, output_tokens: int) -> Truth:
    """Read the log of one run, whose answers were to have ``output_tokens``.

    Raises:
        ParetoError: no request came.

    """
    served = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    if not served:
        raise ParetoError("no request reached the server")
    complete = [one for one in served if sum(one["tokens"]) >= output_tokens]
    answered = [one for one in served if one["started_unix_s"] is not None]
    arrivals = sorted(one["received_unix_s"] for one in served)
    rate, uneven = _evenness(arrivals)
    ttft = [one["token_unix_s"][0] - one["received_unix_s"] for one in complete]
    tpot = [
        (one["token_unix_s"][-1] - one["token_unix_s"][0]) / (sum(one["tokens"]) - 1)
        for one in complete
        if sum(one["tokens"]) > 1
    ]
    return Truth(
        requests=len(served),
        complete=len(complete),
        empty=sum(not one["tokens"] for one in answered),
        cut=sum(0 < sum(one["tokens"]) < output_tokens for one in answered),
        refused=len(served) - len(answered),
        chunks=sum(len(one["tokens"]) for one in served),
        output_tokens=sum(sum(one["tokens"]) for one in complete),
        ttft_p50_ms=_quantile(ttft, 50),
        ttft_p95_ms=_quantile(ttft, 95),
        tpot_ms=_quantile(tpot, 50),
        e2e_p50_ms=_quantile([one["token_unix_s"][-1] - one["received_unix_s"] for one in complete], 50),
        rate=rate,
        uneven_p95_ms=uneven,
        first_unix_s=arrivals[0],
        last_unix_s=max(one["ended_unix_s"] for one in served),
    )


def _quantile(seconds: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(seconds, percent)) * 1000 if seconds else None


def _evenness(arrivals: Sequence[float]) -> tuple[float | None, float | None]:
    if len(arrivals) < 2 or arrivals[-1] <= arrivals[0]:
        return None, None
    even: Any = np.linspace(arrivals[0], arrivals[-1], len(arrivals))
    return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0]), float(
        np.percentile(np.abs(np.asarray(arrivals) - even), 95) * 1000
    )
