"""Turns blocks of logits into per-token quality figures, inside the process that computed them.

The full-vocabulary logits of one window of 2,048 tokens are 0.5 GB for a vocabulary of 128k: too much to send between
processes. So each block of a few dozen positions is reduced where it appears, against the baseline's logits, which lie
on disk in the dtype in which they were computed (no rounding is added) and are read block by block.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# bfloat16 has no NumPy dtype: its bits are stored as int16.
_STORAGE: dict[torch.dtype, type[np.generic]] = {
    torch.bfloat16: np.int16,
    torch.float16: np.float16,
    torch.float32: np.float32,
}
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGE}


class LogitFile:
    """Logits of one window on disk: a flat array [rows, vocabulary] without a header."""

    def __init__(self, path: Path, rows: int, vocabulary: int, dtype: torch.dtype, mode: str) -> None:
        """Open the file.

        Args:
            path: where it lies.
            rows: positions.
            vocabulary: logits of each.
            dtype: bfloat16, float16 or float32.
            mode: ``r`` to read, ``w`` to create.

        Raises:
            ValueError: an existing file has another size.

        """
        self.dtype = dtype
        self.shape = (rows, vocabulary)
        storage = np.dtype(_STORAGE[dtype])
        if mode == "r" and path.stat().st_size != rows * vocabulary * storage.itemsize:
            raise ValueError(
                f"{path}: {path.stat().st_size:,} bytes are not {rows} rows of {vocabulary} {dtype} logits; "
                "the tested model's vocabulary differs from the baseline's, or the file is damaged"
            )
        self._map: Any = np.memmap(path, dtype=storage, mode="w+" if mode == "w" else "r", shape=self.shape)

    def write(self, start: int, logits: Tensor) -> None:
        """Store logits [n, vocabulary] as rows start..start+n-1."""
        block = logits.detach().to("cpu", self.dtype).contiguous()
        self._map[start : start + len(block)] = (
            block.view(torch.int16).numpy() if self.dtype == torch.bfloat16 else block.numpy()
        )

    def read(self, start: int, count: int, device: torch.device) -> Tensor:
        """Return rows start..start+count-1 as float32 [count, vocabulary]."""
        block = torch.from_numpy(np.array(self._map[start : start + count]))
        return (block.view(torch.bfloat16) if self.dtype == torch.bfloat16 else block).to(device).float()

    def flush(self) -> None:
        """Write everything out."""
        self._map.flush()


def divergence(baseline: Tensor, tested: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL (baseline || tested) in nats and whether both put the same token first.

    Args:
        baseline: float32 logits [n, vocabulary].
        tested: float32 logits [n, vocabulary].

    Returns:
        float32 [n], bool [n]. A token that the baseline gives no probability contributes nothing, whatever the tested
        model gives it.

    """
    p = torch.log_softmax(baseline, -1)
    q = torch.log_softmax(tested, -1)
    terms = torch.where(p > -torch.inf, p.exp() * (p - q), torch.zeros_like(p))
    return terms.sum(-1), baseline.argmax(-1) == tested.argmax(-1)


class Recording:
    """The figures of one window while its chunks pass through the model; they stay on the device until the end.

    Args:
        tokens: the window. Row i predicts token i + 1, so a window of n tokens has n - 1 rows.
        store: write the logits here (a baseline run).
        compare: read the baseline's logits from here: path, and the name of their dtype.

    """

    def __init__(self, tokens: list[int], store: str | None = None, compare: tuple[str, str] | None = None) -> None:
        self.tokens = torch.tensor(tokens, dtype=torch.int64)
        self.rows = len(tokens) - 1
        self.store, self.compare = store, compare
        self.nll = torch.full((self.rows,), torch.nan)
        self.kl = torch.full((self.rows,), torch.nan)
        self.top1 = torch.zeros(self.rows, dtype=torch.bool)
        self.seen = torch.zeros(self.rows, dtype=torch.bool)
        self.longest = 0
        self.vocabulary = 0
        self.dtype: torch.dtype | None = None
        self._store_file: LogitFile | None = None
        self._compare_file: LogitFile | None = None

    def _open(self, logits: Tensor) -> None:
        self.vocabulary = logits.shape[-1]
        self.dtype = logits.dtype if logits.dtype in _STORAGE else torch.float32
        for name in ("tokens", "nll", "kl", "top1", "seen"):
            setattr(self, name, getattr(self, name).to(logits.device))
        if self.store:
            self._store_file = LogitFile(Path(self.store), self.rows, self.vocabulary, self.dtype, "w")
        if self.compare:
            path, dtype = self.compare
            self._compare_file = LogitFile(Path(path), self.rows, self.vocabulary, _BY_NAME[dtype], "r")

    def baseline(self, rows: slice, device: torch.device) -> Tensor:
        """Return the baseline's logits of some rows, float32 [rows, vocabulary]."""
        assert self._compare_file is not None
        return self._compare_file.read(rows.start, rows.stop - rows.start, device)

    def finish(self) -> dict[str, Any]:
        """Return the figures as plain lists.

        Raises:
            RuntimeError: some positions never came by, or came with figures of which no mean can be taken.

        """
        infinite = self.nll.isinf()
        if self.compare:
            infinite |= ~self.kl.isfinite()
        for wrong, what in (
            (~self.seen, "never came by"),
            (self.nll.isnan(), "have undefined logits (NaN)"),
            (infinite, "have an infinite loss or divergence"),
        ):
            if wrong.any():
                first = int(wrong.int().argmax())
                raise RuntimeError(f"{int(wrong.sum())} of {self.rows} positions {what}, the first is {first}")
        if self._store_file is not None:
            self._store_file.flush()
        return {
            "nll": self.nll.tolist(),
            "kl": self.kl.tolist() if self.compare else [],
            "top1": self.top1.tolist() if self.compare else [],
            "max_chunk": self.longest,
            "vocabulary": self.vocabulary,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class Block:
    """Rows of one window that one step of the engine computed.

    Attributes:
        recording: the window's.
        start: the first row's position in the window.
        count: rows; those past the window's last predicted token must not be among them.
        scheduled: tokens of the window that the engine computed in the step.

    """

    recording: Recording
    start: int
    count: int
    scheduled: int


def add(blocks: list[Block], logits: Tensor) -> None:
    """Take a step's logits, of one window or of several that advance together.

    Args:
        blocks: in the order of their rows.
        logits: [rows of all blocks, vocabulary].

    """
    at, places = 0, []
    for block in blocks:
        recording = block.recording
        recording.longest = max(recording.longest, block.scheduled)
        if not recording.vocabulary:
            recording._open(logits)
        places.append((recording, slice(block.start, block.start + block.count), slice(at, at + block.count)))
        at += block.count
    scores = logits.float()
    target = torch.cat([recording.tokens[1:][rows] for recording, rows, _ in places])
    nll = -torch.log_softmax(scores, -1).gather(-1, target[:, None]).squeeze(-1)
    for recording, rows, own in places:
        recording.nll[rows] = nll[own]
        recording.seen[rows] = True
        if recording._store_file is not None:
            recording._store_file.write(rows.start, logits[own])
    compared = [place for place in places if place[0]._compare_file is not None]
    if not compared:
        return
    baseline = torch.cat([r.baseline(w, logits.device) for r, w, _ in compared])
    kl, top1 = divergence(baseline, torch.cat([scores[own] for _, _, own in compared]))
    at = 0
    for recording, rows, own in compared:
        count = own.stop - own.start
        recording.kl[rows], recording.top1[rows] = kl[at : at + count], top1[at : at + count]
        at += count
