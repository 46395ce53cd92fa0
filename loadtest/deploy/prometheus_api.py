"""Asks a Prometheus server, over its HTTP API."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtest.errors import LoadTestError

_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Line:
    """A series: its labels, times in seconds since the Unix epoch [n], and values [n], of which some may be NaN."""

    labels: Mapping[str, str]
    times: np.ndarray
    values: np.ndarray


class Prometheus:
    """A Prometheus server.

    Args:
        url: its address, such as ``http://127.0.0.1:9090``.

    Raises:
        LoadTestError: that is no such address.

    """

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise LoadTestError(f"{url}: expected an address such as http://127.0.0.1:9090")
        self._url = url.rstrip("/")

    def range(self, expr: str, start: float, end: float, step: float) -> list[Line]:
        """Return what PromQL is from ``start`` to ``end``, seconds since the Unix epoch, every ``step`` seconds.

        Raises:
            LoadTestError: the server does not answer, or refuses the expression.

        """
        return [
            Line(found["metric"], *np.array(found["values"], dtype=np.float64).T)
            for found in self._get("query_range", query=expr, start=start, end=end, step=step)["result"]
        ]

    def instant(self, expr: str, at: float | None = None) -> dict[str, float]:
        """Return the values of PromQL at one moment, by their labels as JSON; now where no moment is given.

        Raises:
            LoadTestError: as :meth:`range`.

        """
        words = {"query": expr} if at is None else {"query": expr, "time": at}
        return {
            json.dumps(found["metric"], sort_keys=True): float(found["value"][1])
            for found in self._get("query", **words)["result"]
        }

    def _get(self, path: str, **words: Any) -> Any:
        url = f"{self._url}/api/v1/{path}"
        try:
            # A form, since an address has a limit of length.
            data = urllib.parse.urlencode(words).encode()
            with urllib.request.urlopen(url, data, timeout=_TIMEOUT_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise LoadTestError(f"{url}: status {error.code}: {_reason(error)}") from error
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise LoadTestError(f"{self._url}: no answer of Prometheus: {getattr(error, 'reason', error)}") from error


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read(2000).decode("utf-8", "replace")
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:200] or error.reason
