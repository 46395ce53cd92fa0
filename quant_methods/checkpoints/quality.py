"""How far a compressed model is from its original: KL divergence, top-1 agreement, loss, in float32 PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_methods.checkpoints.checkpoint import Source
from quant_methods.checkpoints.reference import load_reference

# Of a GPU's free memory, what the original's log-probabilities may take; more is kept in the CPU's.
HELD_SHARE = 0.25


@dataclass(frozen=True)
class Quality:
    """A model against its original, one value a window of text.

    Attributes:
        kl: KL(original || model), nats a token.
        top1: fraction of tokens whose most likely successor is the original's.
        loss: cross-entropy on the text, nats a token.

    """

    kl: list[float]
    top1: list[float]
    loss: list[float]

    @property
    def mean_kl(self) -> float:
        """KL divergence over all windows."""
        return math.fsum(self.kl) / len(self.kl)

    @property
    def mean_top1(self) -> float:
        """Top-1 agreement over all windows."""
        return math.fsum(self.top1) / len(self.top1)

    @property
    def perplexity(self) -> float:
        """Perplexity over all windows."""
        return math.exp(math.fsum(self.loss) / len(self.loss))


@torch.no_grad()
def log_probabilities(model: Any, window: Tensor) -> Tensor:
    """Return float32 [tokens - 1, vocabulary] of a window [tokens], on the model's device."""
    device = next(model.parameters()).device
    return model(window[None].to(device)).logits[0, :-1].float().log_softmax(-1)


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Return KL(expected || found) in nats, [...], of log-probabilities [..., vocabulary]."""
    return (expected.exp() * (expected - found)).sum(-1)


def compare(tested: Iterable[Tensor], windows: Tensor, base: list[Tensor]) -> Quality:
    """Compare log-probabilities with the original's.

    Args:
        tested: float32 [tokens - 1, vocabulary] of each window.
        windows: int64 [windows, tokens].
        base: the original's log-probabilities, anywhere.

    """
    quality = Quality([], [], [])
    for given, window, expected in zip(tested, windows.to(base[0].device), base, strict=True):
        found = given.to(expected.device)
        quality.kl.append(divergence(expected, found).mean().item())
        quality.top1.append((expected.argmax(-1) == found.argmax(-1)).float().mean().item())
        quality.loss.append(-found.gather(-1, window[1:, None]).mean().item())
    return quality


class Yardstick:
    """An original model's log-probabilities on evaluation text, which checkpoints are held against.

    Args:
        folder: the original's directory.
        windows: int64 [windows, tokens].
        device: torch device.
        progress: called with (windows done, windows in all).

    """

    def __init__(
        self,
        folder: Path,
        windows: Tensor,
        device: str = "cpu",
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.windows, self.device = windows, device
        original = load_reference(folder, device)
        self.base: list[Tensor] = []
        for window in self.windows:
            found = log_probabilities(original, window)
            self.base.append(found if self._room(found) else found.cpu())
            progress(len(self.base), len(self.windows))

    def _room(self, found: Tensor) -> bool:
        """Return whether all windows' log-probabilities may lie where the first ones are, beside models to measure."""
        if self.base:
            return self.base[0].device == found.device
        needed = found.numel() * found.element_size() * len(self.windows)
        return found.is_cuda and needed <= HELD_SHARE * torch.cuda.mem_get_info(found.device)[0]

    def original(self) -> Quality:
        """Return the original against itself."""
        return compare(self.base, self.windows, self.base)

    def measure(
        self, checkpoint: Path, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[Quality, float]:
        """Return a checkpoint's quality and the bits that it stores for each weight.

        Raises:
            ParetoError: it is quantized in a way that cannot be read back.

        """
        model = load_reference(checkpoint, self.device)

        def tested() -> Iterable[Tensor]:
            for done, window in enumerate(self.windows):
                progress(done, len(self.windows))
                yield log_probabilities(model, window)

        return compare(tested(), self.windows, self.base), stored_bits(checkpoint, model)


def stored_bits(checkpoint: Path, model: Any) -> float:
    """Return the bits that a checkpoint stores for each weight of the linear layers inside its blocks."""
    linears = {
        name: module.weight.numel()
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    prefix = next(name for name, module in model.named_modules() if module is model.get_decoder())
    stored = 0
    for name, (_, entry) in Source(checkpoint).entries.items():
        module, _, part = name.removeprefix(prefix + ".").rpartition(".")
        if module in linears and part not in ("bias", "weight_shape"):
            stored += entry["data_offsets"][1] - entry["data_offsets"][0]
    return 8 * stored / sum(linears.values())
