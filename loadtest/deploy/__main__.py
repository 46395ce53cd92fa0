"""``python -m loadtest.deploy``: makes the files of this folder that are made from code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loadtest.deploy.board import board_json
from loadtest.deploy.rules import rules_yaml
from loadtest.deploy.server_settings import server_yaml

FOLDER = Path(__file__).parent
MADE: dict[str, Callable[[], str]] = {
    "grafana/boards/pareto.json": board_json,
    "prometheus/rules.yml": rules_yaml,
    "server.yaml": server_yaml,
}

if __name__ == "__main__":
    for name, make in MADE.items():
        (FOLDER / name).write_text(make(), encoding="utf-8")
        print(FOLDER / name)
