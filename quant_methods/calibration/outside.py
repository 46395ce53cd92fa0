"""What a decoder has outside of its blocks: the weights of embedding, final norm and head, and the way to logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.calibration.calibrator import Decoder


def weights(decoder: Decoder) -> dict[str, Tensor]:
    """Return the weights outside of the blocks, by name, float32 on the device."""
    names = [name for name in decoder.model.state_dict() if not name.startswith(decoder.prefix + ".")]
    found = {name: decoder.source.read(name) for name in names if name in decoder.source}
    return {name: tensor.to(decoder.device, torch.float32) for name, tensor in found.items()}


def load(decoder: Decoder, given: dict[str, Tensor]) -> list[nn.Module]:
    """Give what lies outside of the blocks its weights (and buffers); a missing head is the embedding.

    Args:
        decoder: whose.
        given: of ``weights``, not copied.

    Returns:
        The modules that have weights now.

    Raises:
        ParetoError: one is missing.

    """
    decoder.compute_buffers()
    embedding, head = decoder.base.get_input_embeddings(), decoder.model.get_output_embeddings()
    names = {module: name for name, module in decoder.model.named_modules()}
    loaded = []
    for module, name in names.items():
        present = [local for local, parameter in module._parameters.items() if parameter is not None]
        if f"{name}.".startswith(decoder.prefix + ".") or not present:
            continue
        for local in present:
            full = f"{name}.{local}"
            if full not in given and module is head and local == "weight":
                full = f"{names[embedding]}.weight"
            if full not in given:
                raise ParetoError(f"{decoder.source.dir}: the checkpoint lacks {full}")
            module._parameters[local] = nn.Parameter(given[full], requires_grad=False)
        loaded.append(module)
    return loaded


def logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Return a model's logits from what leaves its last block; ``load`` comes first.

    They have a gradient where the hidden states have one.

    Args:
        decoder: the model.
        hidden: float32 [batch, length, width] on the device.

    """
    for block in decoder.blocks:
        block.forward = lambda hidden_states, **arguments: hidden
    try:
        found: Tensor = decoder.model(inputs_embeds=hidden, use_cache=False).logits
    finally:
        for block in decoder.blocks:
            del block.forward
    return found


@contextlib.contextmanager
def head(decoder: Decoder, changed: Mapping[str, Tensor] | None = None) -> Iterator[Callable[[Tensor], Tensor]]:
    """Load what lies outside of the blocks for the duration of the context, and yield ``logits`` of the decoder.

    Args:
        decoder: whose.
        changed: tensors in the place of the checkpoint's, by name.

    """
    new = {name: tensor.to(decoder.device, torch.float32) for name, tensor in (changed or {}).items()}
    loaded = load(decoder, weights(decoder) | new)
    try:
        yield lambda hidden: logits(decoder, hidden)
    finally:
        for module in loaded:
            module.to("meta")
