"""A model as a run leaves it: what is measured once its weights, and the scales of its KV cache, are final."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from quant_methods.calibration import outside
from quant_methods.calibration.calibrator import Decoder


@dataclass(frozen=True)
class Served:
    """A decoder whose blocks get the weights that will be served.

    Attributes:
        decoder: the model, as its source has it.
        tokens: int64 [sequences, length], the calibration data.
        install: gives a loaded block what was made of its weights.
        changed: returns the tensors outside of the blocks that were changed, by full name.
        progress: told (blocks done, blocks in all, what happens now).

    """

    decoder: Decoder
    tokens: Tensor
    install: Callable[[int, nn.Module], None] = lambda index, block: None
    changed: Callable[[], dict[str, Tensor]] = dict
    progress: Callable[[int, int, str], None] = lambda done, total, what: None

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Give a block its weights for the duration of the context."""
        with self.decoder.loaded(index) as block:
            self.install(index, block)
            yield block

    @contextlib.contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Load what lies outside of the blocks, and yield the way from hidden states to logits."""
        with outside.head(self.decoder, self.changed()) as head:
            yield head
