"""Recording and alerting rules of Prometheus: burn of the error budget, a full cache, preemptions, a late generator.

An objective leaves a budget of bad requests. An alert fires when the budget burns so fast, over a long window and, so
that it ends soon after the trouble does, over a short one too, that it would be gone long before its 30 days are over
(The Site Reliability Workbook, 2018, chapter 5, "Multiwindow, Multi-Burn-Rate Alerts").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

# Bounds of vLLM's own buckets, so that the rules hold also for servers without server.yaml.
TTFT_LIMIT_S, TPOT_LIMIT_S = 0.5, 0.05
LATENCY_OBJECTIVE, ERROR_OBJECTIVE = 0.99, 0.999


@dataclass(frozen=True)
class Burn:
    """Fires when the budget burns ``factor`` times too fast in both windows."""

    long: str
    short: str
    factor: float
    severity: str
    left: str


BURNS = (
    Burn("1h", "5m", 14.4, "page", "2 days"),
    Burn("6h", "30m", 6, "page", "5 days"),
    Burn("3d", "6h", 1, "ticket", "30 days"),
)
WINDOWS = ("5m", "30m", "1h", "6h", "3d")


@dataclass(frozen=True)
class Objective:
    """A promise: which part of requests may be bad, and PromQL for the part that is, with ``WINDOW`` in it."""

    name: str
    alert: str
    bad: str
    objective: float
    what: str

    def record(self, window: str) -> str:
        """Return the name of the recorded part of bad requests over a window."""
        return f"pareto:{self.name}:ratio_rate{window}"


def _slow(metric: str, limit: float) -> str:
    quick, every = (
        f"sum by (model_name) (rate({metric}_{part}[WINDOW]))" for part in (f'bucket{{le="{limit}"}}', "count")
    )
    return f"1 - {quick} / {every}"


_ANSWERS = 'sum by (job) (rate(http_requests_total{handler=~"/v1/.*"}[WINDOW]))'
_FAILURES = 'sum by (job) (rate(http_requests_total{handler=~"/v1/.*",status="5xx"}[WINDOW]))'
# A server that never failed has no series of failures, which is a part of 0 and not nothing.
_FAILED = f"({_FAILURES} or 0 * {_ANSWERS}) / {_ANSWERS}"

OBJECTIVES = (
    Objective(
        "ttft_slow",
        "ParetoFirstTokenBudgetBurn",
        _slow("vllm:time_to_first_token_seconds", TTFT_LIMIT_S),
        LATENCY_OBJECTIVE,
        f"requests whose first token takes more than {TTFT_LIMIT_S:g} s",
    ),
    Objective(
        "tpot_slow",
        "ParetoOutputTokenBudgetBurn",
        _slow("vllm:request_time_per_output_token_seconds", TPOT_LIMIT_S),
        LATENCY_OBJECTIVE,
        f"requests that take more than {TPOT_LIMIT_S:g} s for each output token",
    ),
    Objective("http_failed", "ParetoErrorBudgetBurn", _FAILED, ERROR_OBJECTIVE, "answers with a status of 5xx"),
)


def _alert(name: str, expr: str, wait: str, labels: dict[str, str], summary: str, text: str) -> dict[str, Any]:
    notes = {"summary": summary, "description": text}
    return {"alert": name, "expr": expr, "for": wait, "labels": labels, "annotations": notes}


def _burn_alert(objective: Objective, burn: Burn) -> dict[str, Any]:
    # The window is a label so that no two rules are alike in name and labels.
    labels = {"severity": burn.severity, "window": burn.long}
    limit = f"{burn.factor:g} * {1 - objective.objective:.3g}"
    return _alert(
        objective.alert,
        f"{objective.record(burn.long)} > {limit} and {objective.record(burn.short)} > {limit}",
        "2m",
        labels,
        f"{{{{ $value | humanizePercentage }}}} in {burn.long}: {objective.what}",
        f"The budget of {1 - objective.objective:.1%} for {objective.what} would be gone in {burn.left}.",
    )


_BY = "sum by (instance, model_name)"
OTHERS = (
    _alert(
        "ParetoServerDown",
        'up{job="vllm"} == 0',
        "1m",
        {"severity": "page"},
        "{{ $labels.instance }} does not answer",
        "Prometheus cannot fetch the server's metrics.",
    ),
    _alert(
        "ParetoCacheFull",
        "max by (instance, model_name) (avg_over_time(vllm:kv_cache_usage_perc[5m])) > 0.95 "
        f"and {_BY} (avg_over_time(vllm:num_requests_waiting[5m])) > 1",
        "5m",
        {"severity": "ticket"},
        "the KV cache of {{ $labels.instance }} is full and requests wait",
        "A KV-cache dtype of fewer bits (--kv-cache-dtype int4_per_head), more memory or another replica makes room.",
    ),
    _alert(
        "ParetoPreemptions",
        f"{_BY} (rate(vllm:num_preemptions_total[5m])) / {_BY} (rate(vllm:request_success_total[5m])) > 0.05",
        "5m",
        {"severity": "ticket"},
        "{{ $value | humanizePercentage }} of requests are thrown out of the cache of {{ $labels.instance }}",
        "Their tokens are computed again. See ParetoCacheFull, or let fewer sequences in (--max-num-seqs).",
    ),
    _alert(
        "ParetoLoadGeneratorLate",
        "histogram_quantile(0.95, sum by (le, run, label) (rate(pareto_loadtest_loop_lag_seconds_bucket[2m]))) > 0.05",
        "1m",
        {"severity": "info"},
        "the load generator of {{ $labels.label }} is late itself",
        "Its latencies are its own in part: fewer users, more processes, or a machine of its own.",
    ),
)


def rules() -> dict[str, Any]:
    """Return the content of the rules' file."""
    recorded = [
        {"record": objective.record(window), "expr": objective.bad.replace("WINDOW", window)}
        for objective in OBJECTIVES
        for window in WINDOWS
    ]
    burns = [_burn_alert(objective, burn) for objective in OBJECTIVES for burn in BURNS]
    return {
        "groups": [
            {"name": "pareto-objectives", "interval": "30s", "rules": [*recorded, *burns]},
            {"name": "pareto-servers", "interval": "30s", "rules": list(OTHERS)},
        ]
    }


def rules_yaml() -> str:
    """Return the rules' file."""
    return "# Made by python -m loadtest.deploy from loadtest/deploy/rules.py.\n" + yaml.safe_dump(
        rules(), sort_keys=False, width=118
    )
