"""A teacher in memory: it runs on every batch, beside the student, and knows every token's probability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_methods.calibration.text_source import quiet_transformers
from quant_methods.checkpoints.reference import load_reference
from quant_methods.distillation.heads import Head
from quant_methods.distillation.teacher import Targets
from quant_methods.model_source import fingerprint, name_of, read_config


def load_model(folder: Path, device: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return a causal language model of transformers; of a compressed checkpoint, with its codes read back.

    Args:
        folder: of the checkpoint.
        device: torch device.
        dtype: of its weights; compressed checkpoints are read in float32 first.
        options: others of ``from_pretrained``, which compressed checkpoints do not take.

    """
    if "quantization_config" in read_config(folder):
        return load_reference(folder, device).to(dtype)
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).to(device)


class InMemory:
    """A model that runs here.

    Args:
        folder: of its checkpoint, compressed or not.
        device: torch device.
        dtype: of its weights and products.
        hidden: return hidden states too.

    """

    def __init__(self, folder: Path, device: str, dtype: torch.dtype = torch.float32, *, hidden: bool = False) -> None:
        self.folder, self.hidden = folder, hidden
        self.model = load_model(folder, device, dtype).eval().requires_grad_(False)
        self.head = Head(self.model)
        self.dtype = dtype

    @property
    def description(self) -> dict[str, object]:
        """What a model card says of it."""
        return {
            "teacher": name_of(self.folder),
            "fingerprint": fingerprint(self.folder),
            "kind": "in memory",
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def check(self, temperatures: tuple[float, ...], *, hidden: bool) -> None:
        """Refuse nothing: it knows everything."""

    @torch.no_grad()
    def targets(self, sequences: Tensor, tokens: Tensor) -> Targets:
        """Run the model; see :class:`Teacher`."""
        with self.head.removed():
            out = self.model(input_ids=tokens, use_cache=False, output_hidden_states=self.hidden)

        def pair(logits: Tensor, temperature: float, states: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                teacher = (self.head.logits(states) / temperature).log_softmax(-1)
            return teacher, (logits / temperature).log_softmax(-1)

        return Targets((out.logits[:, :-1].flatten(0, 1),), pair, tuple(out.hidden_states or ()))
