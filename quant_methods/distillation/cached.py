"""A teacher on disk: its k most likely tokens at each position, written once and read in every epoch and every run.

For each of n positions the folder holds k token numbers (2 bytes each in a vocabulary of at most 65,536, else 4), k
log-probabilities (float16), and for 1 and each other temperature that was asked for the log of what all other tokens
have together at it (float32). The student is held against k + 1 outcomes: these tokens, and any other. That is a lower
bound of the divergence over the vocabulary.

A sequence counts as there when its byte in ``done.bin`` is 1, which is written after its numbers. So whatever
interrupts the writing costs the sequences that were being written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import write_json
from quant_methods.distillation.in_memory import InMemory
from quant_methods.distillation.teacher import Targets, TopK
from quant_methods.training.losses import buckets

INDEX = "cache.json"
SMALL = 1 << 16
"""Vocabularies up to this have numbers of 2 bytes."""


class Producer(Protocol):
    """Who says what the cache keeps."""

    identity: str
    """Of the teacher, such as its fingerprint: a cache of another one is not used."""

    def top(self, tokens: Tensor, k: int, temperatures: tuple[float, ...]) -> TopK:
        """Return the most likely tokens of sequences [n, length], rows of each sequence one after another."""


@dataclass(frozen=True)
class CacheShape:
    """What a cache holds.

    Attributes:
        identity: of the teacher.
        tokens_sha256: of the sequences.
        sequences: how many.
        positions: of each that are predicted: its length less 1.
        k: tokens kept at each.
        temperatures: at which the rest's probability is kept; 1 is among them.
        vocabulary: of the teacher.

    """

    identity: str
    tokens_sha256: str
    sequences: int
    positions: int
    k: int
    temperatures: tuple[float, ...]
    vocabulary: int

    @property
    def id_bytes(self) -> int:
        """Of a token's number."""
        return 2 if self.vocabulary <= SMALL else 4

    @property
    def size(self) -> int:
        """Bytes of the whole cache, its index aside."""
        rows = self.sequences * self.positions
        return rows * (self.k * (self.id_bytes + 2) + 4 * len(self.temperatures)) + self.sequences


class FromModel:
    """Makes a cache of a model in memory."""

    def __init__(self, teacher: InMemory, identity: str) -> None:
        self.teacher, self.identity = teacher, identity

    @torch.no_grad()
    def top(self, tokens: Tensor, k: int, temperatures: tuple[float, ...]) -> TopK:
        """See :class:`Producer`; one sequence's logits exist at a time."""
        device = next(self.teacher.model.parameters()).device
        ids, known = [], []
        rest: dict[float, list[Tensor]] = {t: [] for t in temperatures}
        for row in tokens:
            (states,) = self.teacher.targets(torch.tensor([0]), row[None].to(device)).rows
            whole = self.teacher.head.logits(states).log_softmax(-1)
            best = whole.topk(k)
            ids.append(best.indices.cpu())
            known.append(best.values.cpu())
            for t in temperatures:
                rest[t].append(buckets((whole / t).log_softmax(-1), best.indices)[:, -1].cpu())
        return TopK(torch.cat(ids), torch.cat(known), {t: torch.cat(found) for t, found in rest.items()})


class Cached:
    """A teacher whose most likely tokens lie in a folder; those that are not there yet are asked for and kept.

    Args:
        folder: of the cache.
        producer: who is asked.
        tokens: int64 [sequences, length], all the data.
        k: tokens kept at each position.
        temperatures: at which probabilities will be wanted.
        vocabulary: of the teacher.
        description: what a model card says of the teacher.

    Raises:
        ParetoError: the folder holds another cache, the disk has no room for this one, or k is no number of tokens.

    """

    def __init__(
        self,
        folder: Path,
        producer: Producer,
        tokens: Tensor,
        *,
        k: int,
        temperatures: tuple[float, ...],
        vocabulary: int,
        description: dict[str, object],
    ) -> None:
        if not 1 <= k <= vocabulary:
            raise ParetoError(f"--top-k {k} is not between 1 and the vocabulary's {vocabulary:,}; 64 is usual")
        kept = tuple(sorted({1.0, *temperatures}))
        digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        self.shape = CacheShape(producer.identity, digest, len(tokens), tokens.shape[1] - 1, k, kept, vocabulary)
        self.folder, self.producer, self.tokens, self._described = folder, producer, tokens, description
        self._open()

    def _open(self) -> None:
        shape, index = self.shape, self.folder / INDEX
        about = json.loads(json.dumps(asdict(shape)))
        if index.is_file():
            found = json.loads(index.read_text())
            wrong = [name for name, value in about.items() if found.get(name) != value]
            if wrong:
                raise ParetoError(
                    f"{self.folder} holds what another teacher, text or --top-k gave ({wrong[0]} differs); give "
                    "another folder, or delete this one"
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if shape.size > free:
                raise ParetoError(
                    f"{self.folder}: {shape.k} tokens at each of {shape.sequences * shape.positions:,} positions take "
                    f"{shape.size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; lower --top-k or --samples"
                )
        rows = (shape.sequences, shape.positions)
        small = shape.vocabulary <= SMALL
        self._done = self._array("done", np.uint8, (shape.sequences,))
        self._ids = self._array("ids", np.uint16 if small else np.uint32, (*rows, shape.k))
        self._known = self._array("log_probabilities", np.float16, (*rows, shape.k))
        self._rest = self._array("rest", np.float32, (*rows, len(shape.temperatures)))
        write_json(index, about)

    def _array(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.memmap:
        """Return an array in a file of its exact size, which is made of zeros if it is not there."""
        path, size = self.folder / f"{name}.bin", int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not path.is_file() or path.stat().st_size != size:
            with path.open("wb") as file:
                file.truncate(size)
        return np.memmap(path, dtype, "r+", shape=shape)

    @property
    def description(self) -> dict[str, object]:
        """What a model card says of it."""
        return {**self._described, "kind": "top tokens on disk", "top_k": self.shape.k}

    def check(self, temperatures: tuple[float, ...], *, hidden: bool) -> None:
        """Refuse hidden states, and temperatures that the cache was not made for; see :class:`Teacher`."""
        if hidden:
            raise ParetoError("hidden states are not kept with a teacher's top tokens; leave out --hidden or --top-k")
        if missing := set(temperatures) - set(self.shape.temperatures):
            raise ParetoError(f"{self.folder} was not made for a temperature of {min(missing):g}; make another cache")

    @property
    def missing(self) -> list[int]:
        """The sequences that are not there yet."""
        return [int(x) for x in np.flatnonzero(np.asarray(self._done) == 0)]

    def fill(self, sequences: list[int], say: Callable[[int, int], object] = lambda done, total: None) -> None:
        """Ask for sequences that are not there yet, and keep what is said.

        Args:
            sequences: their numbers.
            say: told how many are done, of how many.

        """
        for done, number in enumerate(sequences):
            say(done, len(sequences))
            found = self.producer.top(self.tokens[number : number + 1], self.shape.k, self.shape.temperatures)
            self._ids[number] = found.ids.numpy()
            self._known[number] = found.log_probabilities.numpy()
            for place, t in enumerate(self.shape.temperatures):
                self._rest[number, :, place] = found.rest[t].numpy()
            self._done[number] = 1
        # The kernel keeps what is written to a mapped file when the process is killed; this is for the machine's end.
        for array in (self._ids, self._known, self._rest, self._done):
            array.flush()

    def targets(self, sequences: Tensor, tokens: Tensor) -> Targets:
        """Return what is kept; see :class:`Teacher`.

        Raises:
            ParetoError: a sequence is none of the data's.

        """
        numbers = sequences.tolist()
        if min(numbers) < 0:
            raise ParetoError("a teacher on disk knows only the text that it was asked about; leave out --on-policy")
        self.fill([number for number in numbers if not self._done[number]])
        ids = torch.from_numpy(self._ids[numbers].astype(np.int64)).flatten(0, 1).to(tokens.device)
        known = torch.from_numpy(np.array(self._known[numbers])).flatten(0, 1).to(tokens.device)
        rest = {}
        for place, t in enumerate(self.shape.temperatures):
            rest[t] = torch.from_numpy(self._rest[numbers, :, place].copy()).flatten().to(tokens.device)
        return TopK(ids, known, rest).targets()
