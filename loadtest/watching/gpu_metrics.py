"""The GPUs' own metrics, as NVIDIA's dcgm-exporter serves them beside a server."""

from __future__ import annotations

from loadtest.endpoint.client import Client, HTTPStatusError
from loadtest.errors import LoadTestError
from loadtest.results.energy import COUNTER, GPU_METRICS
from loadtest.watching.server_metrics import parse_metrics

_TIMEOUT_S = 5.0


class GPUMetrics:
    """Reads energy, power and utilization of every GPU on an exporter's page.

    Args:
        url: of the page, such as ``http://node:9400/metrics``.

    Raises:
        LoadTestError: nothing answers there, or the page has no energy of GPUs.

    """

    def __init__(self, url: str) -> None:
        self._client = Client(url, _TIMEOUT_S)
        try:
            found = self()
        except (OSError, HTTPStatusError, ValueError) as error:
            self.close()
            raise LoadTestError(f"--gpu-metrics {url}: cannot be read ({error})") from error
        if not any(name.partition("{")[0] == COUNTER for name in found):
            self.close()
            raise LoadTestError(f"--gpu-metrics {url}: has no {COUNTER}; expected the page of NVIDIA's dcgm-exporter")

    def __call__(self) -> dict[str, float]:
        """Return metric name with labels -> value.

        Raises:
            OSError, HTTPStatusError, ValueError: the page cannot be read.

        """
        return parse_metrics(self._client.get("", _TIMEOUT_S).decode("utf-8", "replace"), GPU_METRICS)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
