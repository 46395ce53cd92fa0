"""What a run says while it trains: a line of JSON for each figure, and a line to read every few seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from kv_cache.atomic import write_bytes

EVERY = 10.0
"""Seconds between two lines of a running training; every look at held-out data has one of its own."""


class Log(TrainerCallback):
    """Writes ``log.jsonl`` and says lines.

    Args:
        path: of the file; a run that goes on keeps the lines up to the step that it goes on from.
        say: takes a line to read.
        tokens: in a step, over all devices; None: the trainer counts them itself, as trl's does.

    """

    def __init__(self, path: Path, say: Callable[[str], object], tokens: int | None = None) -> None:
        self.path, self.say, self.tokens = path, say, tokens
        self.began = (0, 0.0)
        self.looking = 0.0  # Seconds spent on held-out data, which are no training.
        self.last = (0, 0.0)
        self.told = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the lines of steps that will be done again."""
        self.began = state.global_step, time.monotonic()
        if state.is_world_process_zero:
            entries = read_log(self.path) if state.global_step and self.path.is_file() else []
            kept = [entry for entry in entries if entry["step"] <= state.global_step]
            write_bytes(self.path, "".join(f"{json.dumps(entry)}\n" for entry in kept).encode())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Write figures."""
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        looked = "eval_loss" in logs
        if looked and 0 < state.global_step == self.began[0]:
            return  # A run that goes on looks again where the one before it had looked.
        self.looking += logs.get("eval_runtime", 0.0)
        first, since = self.began
        done, seconds = state.global_step - first, time.monotonic() - since - self.looking
        entry = {"step": state.global_step, **logs}
        rate = None
        # What trl counts are the tokens of this run's examples, padding left out.
        learnt = logs.get("num_tokens") if self.tokens is None else done * self.tokens
        if not looked and learnt is not None and seconds > 0:
            tokens, then = self.last
            rate = (learnt - tokens) / max(seconds - then, 1e-9) if tokens else None
            self.last = int(learnt), seconds
            if rate is not None:
                entry["tokens_per_second"] = round(rate, 1)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if not looked and time.monotonic() - self.told < EVERY:
            return
        self.told = time.monotonic()
        parts = [f"step {state.global_step}/{state.max_steps}"]
        if "eval_kl" in logs:
            parts.append(f"held-out KL {logs['eval_kl']:.4f}")
        if looked:
            parts.append(f"held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            parts.append(f"loss {logs['loss']:.4f}")
        if "eval_perplexity" in logs:
            parts.append(f"perplexity {logs['eval_perplexity']:.2f}")
        if rate is not None:
            parts.append(f"{rate:,.0f} tokens/s")
        if done:
            parts.append(f"{(state.max_steps - state.global_step) * seconds / done:.0f} s left")
        self.say(", ".join(parts))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the figures that a run wrote; a line that a killed run left half-written is none of them."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_looks(path: Path) -> dict[int, dict[str, Any]]:
    """Return the figures of held-out data by step, in the order of the steps."""
    return {entry["step"]: entry for entry in read_log(path) if "eval_loss" in entry}
