"""What an adapter starts as: the best product for what quantization took from the outputs of each layer.

LoftQ starts an adapter as the product nearest to the error of the weight (Li et al., "LoftQ: LoRA-Fine-Tuning-Aware
Quantization for Large Language Models", 2023, https://arxiv.org/abs/2310.08659). Codes that were chosen for a layer's
outputs, as GPTQ's, have their errors where inputs are small, and such a product makes the model worse. So the nearest
product is that in the metric of the layer's inputs X, ``|| (W - Q - B A) X ||``, as in Deng et al., "CLoQ: Enhancing
Fine-Tuning of Quantized LLMs via Calibrated LoRA Initialization" (2025), https://arxiv.org/abs/2501.18475, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.finetuning.coded_linear import CodedLinear
from quant_methods.methods.gptq import factorize
from quant_methods.methods.zeroquant import DAMPING, low_rank

EXAMPLES = 128
"""That layers' inputs are taken from."""
HELD_BYTES = 2 << 30
"""Second moments of inputs that are held at once: a pass over the examples for each so many."""


@torch.no_grad()
def start_from_error(model: PeftModel, original: Path, examples: Sequence[Sequence[int]]) -> float:
    """Let the adapter start as what quantization took from the outputs, as far as its rank goes.

    Args:
        model: with an adapter.
        original: folder of the model that was quantized, in 16 or 32 bits.
        examples: tokens of each that will be learnt from; the first ``EXAMPLES`` of them are read.

    Returns:
        How much of the squared error of the layers' outputs on the examples the products take back, 0 to 1.

    Raises:
        ParetoError: the original lacks a layer, or has it in another size.

    """
    source = Source(original)
    layers = {
        name: module
        for name, module in model.base_model.model.named_modules()
        if isinstance(getattr(module, "base_layer", None), CodedLinear) and "default" in module.lora_A
    }
    before = after = 0.0
    for some in _groups(layers):
        moments = _second_moments(model, some, examples[:EXAMPLES])
        for name, module in some.items():
            base = module.base_layer
            weight = source.read(f"{name}.weight").to(base.weight.device).float()
            if tuple(weight.shape) != (base.out_features, base.in_features):
                raise ParetoError(
                    f"{original}: {name}.weight is {list(weight.shape)}, the model's {list(base.weight.shape)}"
                )
            error, (_, factor) = weight - base.linear().read(), factorize(moments[name], DAMPING)
            product = low_rank(error, factor, module.r["default"], torch.float32)
            _put(module, product.up, product.down)
            before += float((error.double() @ factor).square().sum())
            after += float(((error - product.up @ product.down).double() @ factor).square().sum())
    if not before:
        raise ParetoError("--start-from: the model has no quantized layers whose error could be taken back")
    return 1 - after / before


def _groups(layers: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield layers whose second moments fit into what is held at once, in order."""
    some: dict[str, Any] = {}
    held = 0
    for name, module in layers.items():
        size = 4 * module.base_layer.in_features**2
        if some and held + size > HELD_BYTES:
            yield some
            some, held = {}, 0
        some[name] = module
        held += size
    if some:
        yield some


def _second_moments(
    model: PeftModel, layers: dict[str, nn.Module], examples: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Return ``X X^T`` of each layer's inputs over the examples' tokens, float32 [in, in]."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            found[name] = x.T @ x if name not in found else found[name].addmm_(x.T, x)

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    device, was_training = next(iter(layers.values())).base_layer.weight.device, model.training
    decoder = model.base_model.model.get_decoder()
    model.eval()
    try:
        for tokens in examples:
            decoder(input_ids=torch.tensor([list(tokens)], device=device), use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def _put(module: Any, up: Tensor, down: Tensor) -> None:
    """Let a layer's adapter be a product [out, r] by [r, in]; what its rank has more than the layer stays 0."""
    rank = up.shape[1]
    module.lora_A["default"].weight[:rank] = down
    module.lora_B["default"].weight[:, :rank] = up / module.scaling["default"]
    if "default" in module.lora_magnitude_vector:
        # DoRA starts from the norms of what the layer is now.
        changed = module.base_layer.linear().read() + up @ down
        module.lora_magnitude_vector["default"].weight.copy_(changed.norm(dim=1))
