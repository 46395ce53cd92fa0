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
"""Seconds between two lines of a running training; every look at held-out text has one of its own."""


class Log(TrainerCallback):
    """Writes ``log.jsonl`` and says lines.

    Args:
        path: of the file; a run that goes on keeps the lines up to the step that it goes on from.
        tokens: in a step, over all devices.
        say: takes a line to read.

    """

    def __init__(self, path: Path, tokens: int, say: Callable[[str], object]) -> None:
        self.path, self.tokens, self.say = path, tokens, say
        self.began: tuple[int, float] | None = None
        self.told = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the lines of steps that will be done again."""
        self.began = state.global_step, time.monotonic()
        if state.is_world_process_zero:
            lines = self.path.read_text().splitlines() if self.path.is_file() else []
            kept = (
                [line for line in lines if json.loads(line)["step"] <= state.global_step] if state.global_step else []
            )
            write_bytes(self.path, "".join(f"{line}\n" for line in kept).encode())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Write figures."""
        if not state.is_world_process_zero or self.began is None or "train_runtime" in logs:
            return
        first, since = self.began
        seconds = time.monotonic() - since
        rate = (state.global_step - first) * self.tokens / seconds if seconds else 0.0
        entry = {"step": state.global_step, **logs, "tokens_per_second": round(rate, 1)}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        looked = "eval_loss" in logs
        if not looked and time.monotonic() - self.told < EVERY:
            return
        self.told = time.monotonic()
        parts = [f"step {state.global_step}/{state.max_steps}"]
        if looked:
            if "eval_kl" in logs:
                parts.append(f"held-out KL {logs['eval_kl']:.4f}")
            parts.append(f"held-out loss {logs['eval_loss']:.4f}, perplexity {logs['eval_perplexity']:.2f}")
        elif "loss" in logs:
            parts.append(f"loss {logs['loss']:.4f}")
        if rate:
            left = (state.max_steps - state.global_step) * self.tokens / rate
            parts.append(f"{rate:,.0f} tokens/s, {left:.0f} s left")
        self.say(", ".join(parts))
