"""What a compression did, as it is told: by layer and in all."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant_methods.handlers import Tuned
from quant_methods.stock_vllm import Serving


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer.

    Attributes:
        name: the module's name.
        shape: [out, in].
        bits_per_weight: storage, scales and zero-points included; zeros of a pruned layer are stored like all
            others unless its step leaves them out (``store``).
        relative_error: ``||W X - Q X|| / ||W X||`` over the calibration set; ``||W - Q|| / ||W||`` without data. A step
            that makes up for earlier layers' errors moves Q away from W on purpose, and that counts here too. Before
            training and tuning, which have the whole model's error in view; where training chose the zeros,
            ``||W - Q|| / ||W||`` after it.
        zeros: of a pruned layer, the weights that read back as zero, counted in the weights or codes that are written.

    """

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    relative_error: float
    zeros: int | None = None

    @property
    def sparsity(self) -> float | None:
        """The fraction of its weights that is zero; None if it was not pruned."""
        return None if self.zeros is None else self.zeros / (self.shape[0] * self.shape[1])


@dataclass
class Report:
    """What a compression did.

    Attributes:
        out: the checkpoint.
        layers: the quantized and pruned layers, in model order.
        bits_per_weight: mean over these layers' weights.
        bytes_before: bytes of the original's tensors.
        bytes_after: bytes of the checkpoint's tensors.
        seconds: wall time of this run (not of runs that it resumed).
        peak_memory: the process's peak resident memory in bytes.
        resumed_blocks: blocks that an earlier run had finished.
        serving: what serves it.
        trained: what the training of weights did, before they were rounded, or None.
        tuned: what tuning did, or None.
        kv_scales: the checkpoint has scales of a quantized KV cache.
        unseen: experts that no calibration token was sent to, which were rounded as if all inputs counted alike.

    """

    out: Path
    layers: list[LayerReport] = field(default_factory=list)
    bits_per_weight: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    resumed_blocks: int = 0
    serving: Serving = field(default_factory=lambda: Serving.of(()))
    trained: Tuned | None = None
    tuned: Tuned | None = None
    kv_scales: bool = False
    unseen: list[str] = field(default_factory=list)

    @property
    def sparsity(self) -> float | None:
        """The fraction of the pruned layers' weights that is zero; None if none was pruned."""
        pruned = [(layer.zeros, layer.shape) for layer in self.layers if layer.zeros is not None]
        weights = sum(rows * columns for _, (rows, columns) in pruned)
        return sum(zeros for zeros, _ in pruned) / weights if weights else None

    def found(self) -> dict[str, Any]:
        """Return what travels with the checkpoint beside what determined it."""
        found: dict[str, Any] = {}
        if self.trained is not None:
            found["trained"] = {
                "held_out": self.trained.kl, "kept_step": self.trained.kept, "on_text": self.trained.on_text,
            }  # fmt: skip
        if self.tuned is not None:
            found["tuned"] = {"held_out_kl": self.tuned.kl, "kept_step": self.tuned.kept}
        if self.sparsity is not None:
            own = {layer.name: layer.sparsity for layer in self.layers if layer.sparsity is not None}
            found["sparsity"] = {"all": self.sparsity, **own}
        return found
