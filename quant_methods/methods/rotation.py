"""Rotation: turns the residual stream, so that no channel of any layer's input is larger than the others.

Ashkboos, Mohtashami, Croci, Li, Jaggi, Alistarh, Hoefler, Hensman: "QuaRot: Outlier-Free 4-Bit Inference in Rotated
LLMs" (2024), https://arxiv.org/abs/2404.00456, section 4, stage 1a: norms' weights are folded into the layers that they
feed; what reads the stream becomes ``W Q``, what writes to it ``Q^T W``, embeddings ``E Q``. An RMS norm without
weights commutes with Q, so the model computes what it did (computational invariance, Ashkboos et al., "SliceGPT", 2024,
Theorem 1). Q is a Hadamard matrix behind random signs: ``diag(signs) H``. Nothing is left to do at serving time.

Tied embeddings come apart, since the final norm's weight is folded into the head: the head is stored too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.recipe import Step, register

# What reads the residual stream, by the norm in between, and what writes to it.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
INSTEAD = "use a recipe without rotate: gptq-w4, awq-w4, or smoothquant-w8a8 for 8-bit activations"
BLOCK = re.compile(r"(model\.layers\.\d+\.)(.+)\.(weight|bias)$")


@register("rotate")
@dataclass(frozen=True)
class Rotate(Step):
    """Rotation of the residual stream, before all other steps.

    Attributes:
        seed: of the random signs.

    """

    seed: int = 0


def hadamard(size: int) -> Tensor:
    """Return an orthogonal matrix float64 [size, size] that spreads every channel over as many others as it can.

    Sylvester's construction over the largest power of two in ``size``; the odd number of blocks that is left is mixed
    by a reflection, all of whose elements off the diagonal are equal.

    Args:
        size: channels.

    """
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    odd = size // power
    reflection = torch.eye(odd, dtype=torch.float64) - 2 / odd if odd > 1 else torch.ones(1, 1, dtype=torch.float64)
    return torch.kron(reflection, matrix / power**0.5)


class RotatedSource(Source):
    """A checkpoint as if it had been rotated."""

    def __init__(self, source: Source, step: Rotate) -> None:
        """Wrap a checkpoint.

        Raises:
            ParetoError: its tensors are not those of a model like Llama.

        """
        self.dir, self.entries = source.dir, dict(source.entries)
        self._plain = source
        needed = [EMBEDDING, NORM]
        if missing := [name for name in needed if name not in source]:
            raise ParetoError(
                f"{source.dir}: rotate serves models built like Llama, and the checkpoint lacks {missing[0]}; {INSTEAD}"
            )
        if HEAD not in self.entries:  # Tied to the embedding.
            self.entries[HEAD] = source.entries[EMBEDDING]
        for name in self.entries:
            self._role(name)
        width = source.entries[NORM][1]["shape"][0]
        signs = torch.randint(2, (width,), generator=torch.Generator().manual_seed(step.seed)).double() * 2 - 1
        self._turn = signs[:, None] * hadamard(width)

    def _role(self, name: str) -> tuple[str, str | None]:
        """Return what a tensor is, and the norm that feeds it."""
        if name in (EMBEDDING, NORM, HEAD):
            return {EMBEDDING: ("reader", None), NORM: ("norm", None), HEAD: ("reader", NORM)}[name]
        if match := BLOCK.match(name):
            block, local, part = match.groups()
            if local in READERS:
                return "norm", None
            for norm, fed in READERS.items():
                if local in fed:
                    return ("reader", f"{block}{norm}.weight") if part == "weight" else ("inside", None)
            if local in WRITERS:
                return "writer", None
            if local in ("self_attn.q_norm", "self_attn.k_norm"):
                return "inside", None
        raise ParetoError(
            f"{self.dir}: rotate serves models built like Llama, and does not know what {name} is; {INSTEAD}"
        )

    def size(self) -> int:
        """Return the bytes of the checkpoint's tensors, as they are on disk."""
        return self._plain.size()

    def changed(self) -> list[str]:
        """Return the names of the tensors that ``read`` returns other than the files have them."""
        return [name for name in self.entries if self._role(name)[0] != "inside"]

    def read(self, name: str) -> Tensor:
        """Return one tensor, float32 where it is rotated."""
        role, norm = self._role(name)
        tensor = self._plain.read(EMBEDDING if name not in self._plain else name)
        if role == "inside":
            return tensor
        if role == "norm":
            return torch.ones_like(tensor)
        turned = tensor.double()
        if role == "writer":
            return (self._turn.T @ turned).float()
        if norm is not None:
            turned = turned * self._plain.read(norm).double()
        return (turned @ self._turn).float()


def check_norms(block: nn.Module, config: Any) -> None:
    """Refuse a model whose norms do not commute with rotations.

    Raises:
        ParetoError: they subtract the mean, or their weights mean something else than a factor.

    """
    for name in READERS:
        norm = block.get_submodule(name)
        probe = type(norm)(config.hidden_size, eps=0.0)
        x, turn = torch.randn(4, config.hidden_size) + 1, hadamard(config.hidden_size).float()
        with torch.no_grad():
            probe.weight.fill_(1)
            plain, turned = probe(x), probe(x @ turn)
            probe.weight.fill_(2)
            doubled = probe(x)
        if not torch.allclose(plain @ turn, turned, atol=1e-3) or not torch.allclose(2 * plain, doubled, atol=1e-3):
            raise ParetoError(f"rotate: {type(norm).__name__} is not a plain RMS norm; {INSTEAD}")
