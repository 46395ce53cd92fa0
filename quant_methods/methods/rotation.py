"""Rotation: turns the residual stream, so that no channel of any layer's input is larger than the others.

Ashkboos, Mohtashami, Croci, Li, Jaggi, Alistarh, Hoefler, Hensman: "QuaRot: Outlier-Free 4-Bit Inference in Rotated
LLMs" (2024), https://arxiv.org/abs/2404.00456, section 4, stage 1a: norms' weights are folded into the layers that they
feed; what reads the stream becomes ``W Q``, what writes to it ``Q^T W``, embeddings ``E Q``. An RMS norm without
weights commutes with Q, so the model computes what it did (computational invariance, Ashkboos et al., "SliceGPT", 2024,
Theorem 1). Q is a Hadamard matrix behind random signs: ``diag(signs) H``. Nothing is left to do at serving time.

A layer norm subtracts the mean, which is a projection along the vector of ones. It commutes with every Q that leaves
that vector where it is: there ``diag(signs) H`` is followed by the reflection that puts it back (``rotation``). The
norm's bias goes into the biases of the layers that it feeds.

Tied embeddings come apart, since the final norm's weight is folded into the head: the head is stored too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.handlers import register, wraps_source
from quant_methods.model_source import read_config
from quant_methods.steps import SourceStep

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head"


@dataclass(frozen=True)
class Wiring:
    """What of a model touches the residual stream.

    Attributes:
        readers: layers of a block that read it, by the norm in between.
        writers: layers of a block that write to it.
        final: the norm before the head.
        offset: what norms add to their weight before they multiply by it.
        centred: norms subtract the mean.

    """

    readers: dict[str, tuple[str, ...]]
    writers: tuple[str, ...]
    final: str
    offset: float = 0.0
    centred: bool = False


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = Wiring(
    {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")},
    ("self_attn.o_proj", "mlp.down_proj"),
    "model.norm",
)
GEMMA = replace(LLAMA, offset=1.0)
PHI = Wiring(
    {"input_layernorm": (*QKV, "mlp.fc1")}, ("self_attn.dense", "mlp.fc2"), "model.final_layernorm", centred=True
)
WIRINGS = {"gemma": GEMMA, "phi": PHI}
"""By model type, where it is not that of Llama."""

_APART = "vLLM has no head for it apart from the embedding, as a rotated model needs it"
_BETWEEN = "a norm with weights lies between its layers and the stream that they write to, which nothing can take in"
REFUSED = {
    "gemma2": _BETWEEN, "gemma3": _BETWEEN, "gemma3_text": _BETWEEN, "cohere": _APART, "cohere2": _APART,
}  # fmt: skip
"""Why models of a type cannot be rotated."""
INSTEAD = "use a recipe without rotate: gptq-w4, awq-w4, or smoothquant-w8a8 for 8-bit activations"
BLOCK = re.compile(r"(model\.layers\.\d+\.)(.+)\.(weight|bias)$")


@register("rotate")
@dataclass(frozen=True)
class Rotate(SourceStep):
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


def rotation(size: int, seed: int, *, centred: bool) -> Tensor:
    """Return Q, an orthogonal matrix float64 [size, size].

    Args:
        size: channels.
        seed: of the random signs.
        centred: leave the vector of ones where it is.

    """
    signs = torch.randint(2, (size,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    turn = signs[:, None] * hadamard(size)
    ones = torch.full((size,), size**-0.5, dtype=torch.float64)
    away = ones @ turn - ones
    if centred and away.norm() > 1e-9:
        turn -= 2 * torch.outer(turn @ away, away) / away.square().sum()
    return turn


@wraps_source(Rotate)
class RotatedSource(Source):
    """A checkpoint as if it had been rotated.

    Attributes:
        wiring: what touches the residual stream.
        turn: Q, float64 [width, width].

    """

    def __init__(self, step: Rotate, source: Source) -> None:
        """Wrap a checkpoint.

        Raises:
            ParetoError: its tensors are not those of a model that can be rotated.

        """
        self.dir, self.entries = source.dir, dict(source.entries)
        self._plain = source
        kind = str(read_config(source.dir).get("model_type"))
        if kind in REFUSED:
            raise ParetoError(f"{source.dir}: rotate does not serve {kind}: {REFUSED[kind]}; {INSTEAD}")
        self.wiring = WIRINGS.get(kind, LLAMA)
        norm, head = f"{self.wiring.final}.weight", f"{HEAD}.weight"
        if missing := [name for name in (EMBEDDING, norm) if name not in source]:
            raise ParetoError(
                f"{source.dir}: rotate serves models built like Llama, and the checkpoint lacks {missing[0]}; {INSTEAD}"
            )
        if head not in self.entries:  # Tied to the embedding.
            self.entries[head] = source.entries[EMBEDDING]
        for name in self.entries:
            role, fed_by = self._role(name)
            bias = f"{name.removesuffix('.weight')}.bias"
            if role == "reader" and fed_by is not None and f"{fed_by}.bias" in source and bias not in source:
                raise ParetoError(f"{source.dir}: rotate finds no {bias} to take in that of {fed_by}; {INSTEAD}")
        self.turn = rotation(source.entries[norm][1]["shape"][0], step.seed, centred=self.wiring.centred)

    def _role(self, name: str) -> tuple[str, str | None]:
        """Return what a tensor is, and the norm that feeds it, by its name without ``.weight``."""
        wiring = self.wiring
        if name == EMBEDDING:
            return "reader", None
        module, _, part = name.rpartition(".")
        if module == wiring.final and part in ("weight", "bias"):
            return part, None
        if module == HEAD:
            return self._reads(part, wiring.final)
        if match := BLOCK.match(name):
            block, local, part = match.groups()
            if local in wiring.readers:
                return part, None
            for norm, fed in wiring.readers.items():
                if local in fed:
                    return self._reads(part, f"{block}{norm}")
            if local in wiring.writers:
                return "writer", None
            if local in ("self_attn.q_norm", "self_attn.k_norm"):
                return "inside", None
        raise ParetoError(
            f"{self.dir}: rotate serves models built like Llama, and does not know what {name} is; {INSTEAD}"
        )

    def _reads(self, part: str, norm: str) -> tuple[str, str | None]:
        """Return what a tensor of a layer is that a norm feeds: a bias matters only where the norm has one."""
        if part == "weight":
            return "reader", norm
        return ("taking", norm) if f"{norm}.bias" in self._plain else ("inside", None)

    def size(self) -> int:
        """Return the bytes of the checkpoint's tensors, as they are on disk."""
        return self._plain.size()

    def changed(self) -> list[str]:
        """Return the names of the tensors that ``read`` returns other than the files have them."""
        return [name for name in self.entries if self._role(name)[0] != "inside"]

    def check_block(self, block: nn.Module, config: Any) -> None:
        """Refuse a model whose norms are not what the wiring says, so that they would not commute with the rotation.

        Args:
            block: its first block.
            config: transformers' configuration of it.

        Raises:
            ParetoError: they subtract the mean, or their weights mean something else.

        """
        wiring, turn = self.wiring, self.turn.float()
        for name in wiring.readers:
            norm = block.get_submodule(name)
            probe = type(norm)(config.hidden_size, eps=0.0)
            x = torch.randn(4, config.hidden_size) + 1
            with torch.no_grad():
                probe.weight.fill_(1 - wiring.offset)
                plain, turned = probe(x), probe(x @ turn)
                probe.weight.fill_(2 - wiring.offset)
                doubled = probe(x)
            if not torch.allclose(plain @ turn, turned, atol=1e-3) or not torch.allclose(2 * plain, doubled, atol=1e-3):
                known = "a layer norm" if wiring.centred else "a plain RMS norm"
                raise ParetoError(f"rotate: {type(norm).__name__} is not {known}; {INSTEAD}")

    def read(self, name: str) -> Tensor:
        """Return one tensor, float32 where it is rotated."""
        role, _ = self._role(name)
        return self._stored(name) if role == "inside" else self.turned(name).float()

    def _stored(self, name: str) -> Tensor:
        return self._plain.read(name if name in self._plain else EMBEDDING)

    def turned(self, name: str) -> Tensor:
        """Return one tensor as it is in the rotated model, float64."""
        role, norm = self._role(name)
        tensor = self._stored(name).double()
        if role == "weight":  # of a norm
            return torch.ones_like(tensor) - self.wiring.offset
        if role == "bias":  # of a norm
            return torch.zeros_like(tensor)
        if role == "writer":
            return self.turn.T @ tensor
        if role == "taking":
            weight = self._stored(f"{name.removesuffix('.bias')}.weight").double()
            return tensor + weight @ self._plain.read(f"{norm}.bias").double()
        if role == "reader":
            if norm is not None:
                tensor = tensor * (self._plain.read(f"{norm}.weight").double() + self.wiring.offset)
            return tensor @ self.turn
        return tensor
