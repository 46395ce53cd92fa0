"""How much each part of a model does on some text: its blocks, heads, channels of its MLPs and of its hidden states.

Only forward passes are needed. Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation"
(Minitron, 2024), https://arxiv.org/abs/2407.14679, section 2.2, for width: of a head the length of its output, of a
channel of an MLP or of the hidden states its size, each over tokens. Men et al., "ShortGPT" (2024),
https://arxiv.org/abs/2403.03853, section 3.2, for depth: a block's influence is by how much it turns its input,
``1 - cos(in, out)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kv_cache.errors import ParetoError

OUTPUT, DOWN = "self_attn.o_proj", "mlp.down_proj"
NORMS = "input_layernorm", "post_attention_layernorm"


@dataclass(frozen=True)
class Importance:
    """What a model's parts do, float64 on the CPU, a mean over tokens.

    Attributes:
        blocks: [layers], block influence.
        heads: [layers, query heads].
        channels: [layers, MLP channels].
        hidden: [hidden channels], summed over what norms put out.

    """

    blocks: Tensor
    heads: Tensor
    channels: Tensor
    hidden: Tensor


def blocks_of(model: Any) -> nn.ModuleList:
    """Return a decoder's blocks.

    Raises:
        ParetoError: the model has none where transformers keeps them.

    """
    found = getattr(model.get_decoder(), "layers", None)
    if not isinstance(found, nn.ModuleList):
        raise ParetoError(f"{type(model).__name__} has no list of blocks; give --student-config instead of --keep-...")
    return found


def influence(model: Any, tokens: Tensor) -> Tensor:
    """Return each block's influence, float64 [layers], on sequences int64 [n, length]; any decoder has it."""
    blocks = blocks_of(model)
    found = torch.zeros(len(blocks), dtype=torch.float64)

    def turned(index: int, entering: Tensor, out: Any) -> None:
        left = out[0] if isinstance(out, tuple) else out
        found[index] += (1 - functional.cosine_similarity(entering.float(), left.float(), dim=-1)).double().mean().cpu()

    hooks = [
        block.register_forward_hook(
            lambda module, args, kwargs, out, index=index: turned(
                index, args[0] if args else kwargs["hidden_states"], out
            ),
            with_kwargs=True,
        )
        for index, block in enumerate(blocks)
    ]
    _run(model, tokens, hooks)
    return found / len(tokens)


def measure(model: Any, tokens: Tensor) -> Importance:
    """Return the importance of all parts of a model of Llama's kind.

    Args:
        model: of transformers, with weights.
        tokens: int64 [sequences, length].

    Raises:
        ParetoError: a block lacks one of the modules that are looked at.

    """
    blocks, config = blocks_of(model), model.config
    heads = torch.zeros(len(blocks), config.num_attention_heads, dtype=torch.float64)
    channels = torch.zeros(len(blocks), config.intermediate_size, dtype=torch.float64)
    hidden = torch.zeros(config.hidden_size, dtype=torch.float64)

    def of_heads(index: int, x: Tensor) -> None:
        heads[index] += x.float().unflatten(-1, (heads.shape[1], -1)).norm(dim=-1).flatten(0, -2).mean(0).double().cpu()

    def of_channels(index: int, x: Tensor) -> None:
        channels[index] += x.float().abs().flatten(0, -2).mean(0).double().cpu()

    def of_hidden(out: Tensor) -> None:
        hidden.add_(out.float().abs().flatten(0, -2).mean(0).double().cpu())

    hooks = []
    for index, block in enumerate(blocks):
        for name, take in ((OUTPUT, of_heads), (DOWN, of_channels)):
            hooks.append(
                module_of(block, name).register_forward_pre_hook(
                    lambda module, args, take=take, index=index: take(index, args[0])
                )
            )
        for name in NORMS:
            hooks.append(module_of(block, name).register_forward_hook(lambda module, args, out: of_hidden(out)))
    _run(model, tokens, hooks)
    turned = influence(model, tokens)
    return Importance(turned, heads / len(tokens), channels / len(tokens), hidden / len(tokens))


def module_of(block: nn.Module, name: str) -> nn.Module:
    """Return a block's module.

    Raises:
        ParetoError: it has none of that name, so that nobody knows how to cut it narrower.

    """
    try:
        return block.get_submodule(name)
    except AttributeError as error:
        raise ParetoError(
            f"{type(block).__name__} has no {name}: models of Llama's kind can be cut narrower; others with "
            "--keep-layers alone"
        ) from error


@torch.no_grad()
def _run(model: Any, tokens: Tensor, hooks: list[Any]) -> None:
    """Run sequences one by one, and take the hooks away."""
    device = next(model.parameters()).device
    try:
        for row in tokens:
            model(input_ids=row[None].to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
