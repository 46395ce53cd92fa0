"""The alerts: promtool takes them, and each fires on its trouble and on nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from loadtest.deploy.rules import OBJECTIVES, rules
from tests.watching import DEPLOY, binary

FILE = DEPLOY / "prometheus/rules.yml"
SERVER = 'instance="server:8000",job="vllm",model_name="small"'
TTFT, TPOT = "vllm:time_to_first_token_seconds", "vllm:request_time_per_output_token_seconds"
HTTP = f'http_requests_total{{handler="/v1/completions",{SERVER},status='
LAG = 'pareto_loadtest_loop_lag_seconds_bucket{run="r",label="int4",'


def counts(growth: dict[str, float]) -> list[dict[str, str]]:
    """Series that grow by so much a minute."""
    return [{"series": name, "values": f"0+{rate:g}x400"} for name, rate in growth.items()]


def still(values: dict[str, float]) -> list[dict[str, str]]:
    return [{"series": name, "values": f"{value:g}x400"} for name, value in values.items()]


def share(metric: str, limit: str, slow: float) -> dict[str, float]:
    names = f'{metric}_bucket{{le="{limit}",{SERVER}}}', f"{metric}_count{{{SERVER}}}"
    return {names[0]: 1000 * (1 - slow), names[1]: 1000}


def answers(failed: float) -> dict[str, float]:
    return {f'{HTTP}"2xx"}}': 1000 * (1 - failed)} | ({f'{HTTP}"5xx"}}': 1000 * failed} if failed else {})


HEALTHY = (
    counts(share(TTFT, "0.5", 0.005) | share(TPOT, "0.05", 0.005) | answers(0))
    + counts({f"vllm:num_preemptions_total{{{SERVER}}}": 0, f"vllm:request_success_total{{{SERVER}}}": 1000})
    + still({f"vllm:kv_cache_usage_perc{{{SERVER}}}": 0.5, f"vllm:num_requests_waiting{{{SERVER}}}": 0})
    + still({'up{job="vllm",instance="server:8000"}': 1})
    + counts({f'{LAG}le="0.001"}}': 1000, f'{LAG}le="+Inf"}}': 1000})
)
# What is wrong in place of the healthy series of the same name, and which alerts fire after 6 hours of it.
TROUBLES: dict[str, tuple[list[dict[str, str]], dict[str, set[str]]]] = {
    "nothing": ([], {}),
    "first tokens are late": (
        counts(share(TTFT, "0.5", 0.3)),
        {"ParetoFirstTokenBudgetBurn": {"1h", "6h", "3d"}},
    ),
    "some first tokens are late": (counts(share(TTFT, "0.5", 0.02)), {"ParetoFirstTokenBudgetBurn": {"3d"}}),
    "output tokens are slow": (
        counts(share(TPOT, "0.05", 0.08)),
        {"ParetoOutputTokenBudgetBurn": {"6h", "3d"}},
    ),
    "answers fail": (counts(answers(0.1)), {"ParetoErrorBudgetBurn": {"1h", "6h", "3d"}}),
    "few answers fail": (counts(answers(0.0005)), {}),
    "the cache is full": (
        still({f"vllm:kv_cache_usage_perc{{{SERVER}}}": 0.99, f"vllm:num_requests_waiting{{{SERVER}}}": 5}),
        {"ParetoCacheFull": {""}},
    ),
    "the cache is full, but nobody waits": (still({f"vllm:kv_cache_usage_perc{{{SERVER}}}": 0.99}), {}),
    "preemptions": (counts({f"vllm:num_preemptions_total{{{SERVER}}}": 200}), {"ParetoPreemptions": {""}}),
    "the server is down": (still({'up{job="vllm",instance="server:8000"}': 0}), {"ParetoServerDown": {""}}),
    "the generator is late": (
        counts({f'{LAG}le="0.001"}}': 10, f'{LAG}le="1"}}': 1000, f'{LAG}le="+Inf"}}': 1000}),
        {"ParetoLoadGeneratorLate": {""}},
    ),
}


def alerts() -> list[dict[str, Any]]:
    return [rule for group in rules()["groups"] for rule in group["rules"] if "alert" in rule]


def labels(rule: dict[str, Any]) -> dict[str, str]:
    """What an alert is labelled with when it fires on the series of this file."""
    name = rule["alert"]
    if name == "ParetoErrorBudgetBurn":
        own = {"job": "vllm"}
    elif name == "ParetoServerDown":
        own = {"job": "vllm", "instance": "server:8000"}
    elif name == "ParetoLoadGeneratorLate":
        own = {"run": "r", "label": "int4"}
    elif name.endswith("BudgetBurn"):
        own = {"model_name": "small"}
    else:
        own = {"instance": "server:8000", "model_name": "small"}
    return own | rule["labels"]


def test_promtool_finds_no_fault() -> None:
    done = subprocess.run(
        [binary("promtool"), "check", "rules", "--lint-fatal", FILE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_settings_of_prometheus() -> None:
    done = subprocess.run(
        [binary("promtool"), "check", "config", DEPLOY / "prometheus/prometheus.yml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_its_trouble() -> None:
    assert {name for _, fired in TROUBLES.values() for name in fired} == {rule["alert"] for rule in alerts()}
    assert {objective.alert for objective in OBJECTIVES} <= {rule["alert"] for rule in alerts()}


def case(trouble: str) -> dict[str, Any]:
    """A test in promtool's words: series, and the alerts that fire in the end."""
    series, fired = TROUBLES[trouble]
    wrong = {each["series"] for each in series}
    expected = []
    for name in sorted({rule["alert"] for rule in alerts()}):
        own = [rule for rule in alerts() if rule["alert"] == name]
        hits = [rule for rule in own if rule["labels"].get("window", "") in fired.get(name, set())]
        expected.append(
            {"eval_time": "365m", "alertname": name, "exp_alerts": [{"exp_labels": labels(rule)} for rule in hits]}
        )
    return {
        "name": trouble,
        "interval": "1m",
        "input_series": series + [each for each in HEALTHY if each["series"] not in wrong],
        "alert_rule_test": expected,
    }


def test_alerts_fire_on_their_trouble_and_on_nothing_else(tmp_path: Path) -> None:
    """promtool takes six hours of series at once; what it computes is Prometheus' own."""
    plain = yaml.safe_load(FILE.read_text())
    for group in plain["groups"]:
        # Every half minute would take ten times as long, and find the same.
        group["interval"] = "5m"
        # promtool compares annotations, too, whose values are those of the series.
        for rule in group["rules"]:
            rule.pop("annotations", None)
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(plain))
    cases = {"rule_files": ["rules.yml"], "evaluation_interval": "5m", "tests": [case(name) for name in TROUBLES]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(cases))
    done = subprocess.run(
        [binary("promtool"), "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
