"""Rounds that alternate between configurations, each measurement kept as soon as it is there."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import engine
from bench.environment import gpu_names, versions
from bench.files import read_json, write_json
from kv_cache.errors import ParetoError
from quant_methods.model_source import fingerprint

Sample = dict[str, Any]
"""What one configuration's turn in one round measured, as JSON has it."""


def say_on_stderr(line: str) -> None:
    """Write a line of progress."""
    print(line, file=sys.stderr, flush=True)


def identity(folder: Path, load_format: str) -> str:
    """Return the SHA-256 of a model, of its config.json alone where its weights are not read."""
    if load_format == "dummy":
        return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return fingerprint(folder)


class Alternation:
    """Measures every configuration in every round, and goes on where an earlier run with the same settings ended.

    Args:
        names: of the configurations, the first the baseline.
        rounds: how often each is measured.
        determining: all that the measurements depend on but for the number of rounds, as JSON has it.
        place: path of the kept measurements, to which a hash of ``determining`` is added.
        say: called with a line of progress.

    Attributes:
        samples: by ``round name``.
        errors: by name, why one could not be measured; it is left out of the later rounds.

    """

    def __init__(
        self, names: list[str], rounds: int, determining: dict[str, Any], place: Path, say: Callable[[str], None]
    ) -> None:
        self.names, self.rounds, self.say = names, rounds, say
        described = determining | {"versions": versions(), "gpus": gpu_names()}
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]
        self.file = place.with_name(f"{place.name}-{key}.json")
        self.samples: dict[str, Sample] = read_json(self.file) or {}
        self.errors: dict[str, str] = {}

    def missing(self, name: str) -> bool:
        """Return whether a configuration has rounds that are not measured yet."""
        return any(f"{index} {name}" not in self.samples for index in range(self.rounds))

    def of(self, name: str) -> dict[int, Sample]:
        """Return a configuration's measurements by round."""
        found = {index: self.samples.get(f"{index} {name}") for index in range(self.rounds)}
        return {index: sample for index, sample in found.items() if sample is not None}

    def run(self, measure: Callable[[str, int], Sample], kept: Callable[[], None]) -> None:
        """Measure what is missing.

        Args:
            measure: takes a configuration's name and the number of the round.
            kept: called after each measurement.

        Raises:
            ParetoError: the baseline cannot be measured.

        """
        for index in range(self.rounds):
            for name in self.names:
                if f"{index} {name}" in self.samples or name in self.errors:
                    continue
                self.say(f"round {index + 1} of {self.rounds}: {name}")
                try:
                    self.samples[f"{index} {name}"] = measure(name, index)
                # vLLM raises bare exceptions for what happens in a worker.
                except Exception as error:
                    if name == self.names[0]:
                        raise ParetoError(engine.reason(error)) from error
                    self.errors[name] = engine.reason(error)
                    self.say(f"{name} left out: {self.errors[name]}")
                    continue
                write_json(self.file, self.samples)
                kept()
