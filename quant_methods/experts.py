"""Mixtures of experts with one linear layer a matrix, as checkpoints store them and as methods know layers.

transformers keeps the experts of a block in two parameters, [experts, out, in]: all gate and up projections, and all
down projections. Methods solve one linear layer at a time, and checkpoints (for vLLM too) name one tensor for each. So
before any weight is read, those parameters are replaced by ordinary layers under the checkpoint's names. What a block
computes stays the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIASES = {"mlp": "block_sparse_moe"}
"""What transformers calls a mixture, and what a checkpoint may call it (Mixtral's do)."""
NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What checkpoints call an expert's layers, in this order."""


class Expert(nn.Module):
    """One expert: a gated MLP.

    Args:
        names: of its layers: gate, up and down.
        width: input and output channels.
        inner: channels between.
        activation: applied to the gate's outputs.
        dtype: of its weights, which lie on the meta device until they are loaded.

    """

    def __init__(
        self, names: tuple[str, str, str], width: int, inner: int, activation: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        self.names, self.activation = names, activation
        for name, (rows, columns) in zip(names, ((inner, width), (inner, width), (width, inner)), strict=True):
            self.add_module(name, nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return its outputs for inputs [tokens, width]."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        outputs: Tensor = down(self.activation(gate(x)) * up(x))
        return outputs


class Experts(nn.ModuleList):
    """The experts of a block, in the place of transformers' module of the same name."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of what each token's experts put out.

        Args:
            hidden_states: [tokens, width].
            top_k_index: [tokens, k], the experts of each token.
            top_k_weights: [tokens, k].

        """
        result = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token, place = torch.where(top_k_index == index)
            if len(token):
                outputs = expert(hidden_states[token]) * top_k_weights[token, place, None]
                result.index_add_(0, token, outputs.to(result.dtype))
        return result


@dataclass(frozen=True)
class _Found:
    """A mixture in a model, and how a checkpoint stores it.

    Attributes:
        owner: the module that holds the mixture, and its name there.
        stored: the mixture's name in the checkpoint, there.
        names: of an expert's layers in the checkpoint.
        packed: transformers' module of experts.

    """

    owner: tuple[nn.Module, str]
    stored: str
    names: tuple[str, str, str]
    packed: nn.Module


def unpack_experts(model: nn.Module, stored: Callable[[str], bool]) -> None:
    """Replace the experts that a model keeps in joint parameters by linear layers that the checkpoint has.

    Experts of another kind, or under other names than those known here, are left as they are.

    Args:
        model: transformers' model, its weights on the meta device.
        stored: whether the checkpoint has a tensor of a name.

    """
    for found in _find(model, stored):
        (parent, local), packed = found.owner, found.packed
        inner, width = packed.gate_up_proj.shape[1] // 2, packed.gate_up_proj.shape[2]
        mixture = parent.get_submodule(local)
        mixture.experts = Experts(
            Expert(found.names, width, inner, packed.act_fn, packed.gate_up_proj.dtype)
            for _ in range(len(packed.gate_up_proj))
        )
        if found.stored != local:
            # Its parameters get the checkpoint's name, while the block's own code goes on calling it by the other.
            del parent._modules[local]
            parent.add_module(found.stored, mixture)
            parent.__dict__[local] = mixture


def _find(model: nn.Module, stored: Callable[[str], bool]) -> list[_Found]:
    """Return the mixtures of a model that a checkpoint stores in a way that is known here."""
    found: list[_Found] = []
    for name, module in model.named_modules():
        packed = getattr(module, "experts", None)
        if not isinstance(packed, nn.Module) or not _is_packed(packed):
            continue
        prefix, _, local = name.rpartition(".")
        for called in (local, ALIASES.get(local, local)):
            for names in NAMES:
                first = f"{prefix}.{called}.experts.0.{names[0]}.weight"
                if stored(first) and not any(known.packed is packed for known in found):
                    found.append(_Found((model.get_submodule(prefix), local), called, names, packed))
    return found


def _is_packed(module: nn.Module) -> bool:
    """Return whether a module holds gated experts without biases in two parameters, and nothing else."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    if set(shapes) != {"gate_up_proj", "down_proj"} or not callable(getattr(module, "act_fn", None)):
        return False
    both, down = shapes["gate_up_proj"], shapes["down_proj"]
    # Some models (GPT-OSS, Llama 4) store the transposed matrices.
    return len(both) == len(down) == 3 and tuple(down) == (both[0], both[2], both[1] // 2)


def waves(block: nn.Module) -> list[list[tuple[str, ...]]]:
    """Return the layers of a block's experts in the order in which they can be solved.

    Returns:
        Waves, each a list of layers that share an input, by their names within the block. Layers of a wave depend on
        earlier waves alone: all gate and up projections come before all down projections.

    """
    found: list[list[tuple[str, ...]]] = []
    for name, module in block.named_modules():
        if isinstance(module, Experts):
            of = [(f"{name}.{index}", expert.names) for index, expert in enumerate(module)]
            found.append([(f"{at}.{gate}", f"{at}.{up}") for at, (gate, up, _) in of])
            found.append([(f"{at}.{down}",) for at, (_, _, down) in of])
    return found


def routers(decoder: nn.Module) -> list[str]:
    """Return the names of the modules that choose experts: matrices of weights that are no linear layers."""
    return [
        f"{name}.{local}"
        for name, module in decoder.named_modules()
        if isinstance(getattr(module, "experts", None), nn.Module)
        for local, child in module.named_children()
        if not isinstance(child, nn.Linear)
        and (weight := child._parameters.get("weight")) is not None
        and weight.dim() == 2
    ]
