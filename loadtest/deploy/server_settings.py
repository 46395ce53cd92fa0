"""Settings of the server that the board needs: finer buckets, and metrics of the cache's blocks."""

from __future__ import annotations

import yaml

from loadtest.deploy.rules import TPOT_LIMIT_S, TTFT_LIMIT_S
from loadtest.watching.buckets import bounds

# A hundredth of the blocks, vLLM's default, says nothing where a cache has a few thousand.
SAMPLE = 0.1


def server_yaml() -> str:
    """Return a file for ``pareto serve --config``."""
    buckets = {
        "time_to_first_token": _with(bounds(0.005, 60), TTFT_LIMIT_S),
        "inter_token_latency": _with(bounds(0.002, 5), TPOT_LIMIT_S),
        "request_latency": list(bounds(0.02, 600)),
        "kv_cache_residency": list(bounds(0.001, 3600, 1.2)),
    }
    settings = {
        "kv-cache-metrics": True,
        "kv-cache-metrics-sample": SAMPLE,
        "custom-histogram-buckets": buckets,
    }
    head = (
        "# Made by python -m loadtest.deploy from loadtest/deploy/server_settings.py.\n"
        "# A quantile of the server's is off by 5% at most in these buckets, and by more than half in vLLM's own.\n"
    )
    return head + yaml.safe_dump(settings, sort_keys=False, width=118, default_flow_style=None)


def _with(found: tuple[float, ...], limit: float) -> list[float]:
    """Return the bounds with ``limit`` among them, which the rules' objectives are counted by."""
    return sorted({*found, limit})
