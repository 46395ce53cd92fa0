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
"""Seconds between two lines of a running training; every look at held-out examples has one of its own."""


class Log(TrainerCallback):
    """Writes ``log.jsonl`` and says lines.

    Args:
        path: of the file; a run that goes on keeps the lines up to the step that it goes on from.
        say: takes a line to read.

    """

    def __init__(self, path: Path, say: Callable[[str], object]) -> None:
        self.path, self.say = path, say
        self.began = (0, 0.0)
        self.looking = 0.0  # Seconds spent on held-out examples, which are no training.
        self.last = (0, 0.0)
        self.told = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the lines of steps that will be done again."""
        self.began = state.global_step, time.monotonic()
        if state.is_world_process_zero:
            lines = self.path.read_text().splitlines() if self.path.is_file() else []
            kept = [line for line in lines if state.global_step and json.loads(line)["step"] <= state.global_step]
            write_bytes(self.path, "".join(f"{line}\n" for line in kept).encode())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Write figures."""
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        looked = "eval_loss" in logs
        self.looking += logs.get("eval_runtime", 0.0)
        first, since = self.began
        done, seconds = state.global_step - first, time.monotonic() - since - self.looking
        entry = {"step": state.global_step, **logs}
        rate = None
        # What trl counts are the tokens of this run's examples, padding left out.
        if not looked and "num_tokens" in logs and seconds > 0:
            tokens, then = self.last
            rate = (logs["num_tokens"] - tokens) / max(seconds - then, 1e-9) if tokens else None
            self.last = int(logs["num_tokens"]), seconds
            if rate is not None:
                entry["tokens_per_second"] = round(rate, 1)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if not looked and time.monotonic() - self.told < EVERY:
            return
        self.told = time.monotonic()
        parts = [f"step {state.global_step}/{state.max_steps}"]
        parts.append(
            f"held-out loss {logs['eval_loss']:.4f}" if looked else f"loss {logs.get('loss', float('nan')):.4f}"
        )
        if rate is not None:
            parts.append(f"{rate:,.0f} tokens/s")
        if done:
            parts.append(f"{(state.max_steps - state.global_step) * seconds / done:.0f} s left")
        self.say(", ".join(parts))
