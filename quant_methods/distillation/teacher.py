"""What a student learns from: a teacher says, for each token of a sequence, what may come next and how likely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quant_methods.training.losses import FLOOR, buckets


@dataclass(frozen=True)
class Targets:
    """What a teacher says of some tokens, one row each: of every sequence all but its last.

    Attributes:
        rows: tensors of one length, which is cut into chunks of rows.
        pair: takes the student's logits [rows, vocabulary], float32, a temperature, and a chunk of ``rows``; returns
            log-probabilities at that temperature, of the teacher and of the student over the same outcomes.
        hidden: the teacher's hidden states, from the embedding's to the last block's, [sequences, length, width]; empty
            where nobody asked, or the teacher does not know them.

    """

    rows: tuple[Tensor, ...]
    pair: Callable[..., tuple[Tensor, Tensor]]
    hidden: tuple[Tensor, ...] = ()


class Teacher(Protocol):
    """A teacher: a model in memory, what is kept on disk of one, or one that a server runs."""

    @property
    def description(self) -> dict[str, object]:
        """What a model card says of it: JSON values."""

    def check(self, temperatures: tuple[float, ...], *, hidden: bool) -> None:
        """Refuse what it cannot say.

        Args:
            temperatures: at which probabilities are wanted.
            hidden: whether hidden states are wanted.

        Raises:
            ParetoError: it does not know that.

        """

    def targets(self, sequences: Tensor, tokens: Tensor) -> Targets:
        """Return what it says.

        Args:
            sequences: int64 [n], the numbers of the sequences in the data; -1 for one that the student wrote.
            tokens: int64 [n, length], on the device where targets are wanted.

        """


@dataclass(frozen=True)
class TopK:
    """A teacher's most likely tokens at each position.

    Attributes:
        ids: int64 [rows, k].
        log_probabilities: float [rows, k], at temperature 1.
        rest: by temperature, float32 [rows]: the log of what all other tokens have together at it.

    """

    ids: Tensor
    log_probabilities: Tensor
    rest: dict[float, Tensor]

    def targets(self) -> Targets:
        """Return them as targets: over k + 1 outcomes, the last of which is every other token."""
        temperatures = list(self.rest)

        def pair(
            logits: Tensor, temperature: float, ids: Tensor, known: Tensor, *rest: Tensor
        ) -> tuple[Tensor, Tensor]:
            teacher = with_rest(known.float() / temperature, rest[temperatures.index(temperature)])
            return teacher, buckets((logits / temperature).log_softmax(-1), ids)

        return Targets((self.ids, self.log_probabilities, *self.rest.values()), pair)


def with_rest(log_probabilities: Tensor, rest: Tensor) -> Tensor:
    """Append the rest's log-probability [...] to those of some outcomes [..., k], scaled so that all sum to 1.

    What is stored in 16 bits does not sum to 1, and a temperature leaves the sum unknown.
    """
    rest = rest.clamp(FLOOR, -1e-6)[..., None]
    return torch.cat([log_probabilities.log_softmax(-1) + torch.log1p(-rest.exp()), rest], -1)
