"""A linear layer whose weight stays in codes while what is around it learns (QLoRA).

The layer is read from its codes for each product, forward and backward, and forgotten after it: the weight in 16 bits
is never kept, neither by the layer nor for the backward pass. Gradients go through to the inputs; the codes themselves
do not learn. So adapters of any library that wraps ``nn.Linear`` learn over it, peft's among them (Dettmers et al.,
"QLoRA: Efficient Finetuning of Quantized LLMs" (2023), https://arxiv.org/abs/2305.14314, section 3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant_methods.checkpoints.stored_layers import Rounding
from quant_methods.formats.form import Form, form_of
from quant_methods.formats.parts.planes import INPUT_MULTIPLE
from quant_methods.formats.quantized import QuantizedLinear


class _ByCodes(torch.autograd.Function):
    """A product with a weight that is made when it is needed, and again for the gradient of the inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, weight().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        gradient = gradients[0]
        return (gradient @ ctx.weight().to(gradient.dtype) if ctx.needs_input_grad[0] else None), None


class CodedLinear(nn.Linear):
    """A quantized linear layer that does not learn, for adapters around it.

    It is an ``nn.Linear`` to whoever asks for its class, its sizes, its ``weight`` or its ``bias``. Its weight is no
    parameter: what it reads as is computed for each access. Its tensors keep the dtypes that they are stored in
    whatever dtype the model is moved to, since another dtype's scales would mean another weight.

    Args:
        linear: the layer.
        bias: [out] or None.
        dtype: that ``weight`` reads as; products are in the dtype of the inputs.
        rounding: of the inputs, as serving does it; None: not.

    Raises:
        ParetoError: a code needs more bits than its part has.

    """

    def __init__(
        self, linear: QuantizedLinear, bias: Tensor | None, dtype: torch.dtype, rounding: Rounding | None = None
    ) -> None:
        nn.Module.__init__(self)  # That of nn.Linear would make the weight that this layer is there to do without.
        self.out_features, self.in_features = linear.shape
        self.dtype, self.rounding = dtype, rounding
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.form: Form | None = None
        self.tensors: dict[str, Tensor] = {}
        self.whole: QuantizedLinear | None = linear
        # Packed as our format packs them, whatever format the layer comes from, memory holds as many bits as a file
        # does. A width that is no multiple of 32 has no planes: such codes stay a byte each.
        if linear.shape[1] % INPUT_MULTIPLE == 0:
            tensors = {local: tensor for part in linear.parts for local, tensor in part.pack().items()}
            form = form_of({local: tuple(tensor.shape) for local, tensor in tensors.items()}, "none")
            if form is not None:
                self.form, self.tensors, self.whole = form, tensors, None

    def linear(self) -> QuantizedLinear:
        """Return the layer as parts of its weight, unpacked, on the device where its tensors lie."""
        if self.form is None:
            assert self.whole is not None
            return self.whole
        return QuantizedLinear(*(part.unpack(self.tensors) for part in self.form.parts))

    @property
    def stored_bytes(self) -> int:
        """How much memory the weight takes."""
        if self.whole is not None:
            held = [value for part in self.whole.parts for value in vars(part).values() if isinstance(value, Tensor)]
        else:
            held = list(self.tensors.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def weight(self) -> Tensor:
        """What the codes read as, [out, in], made for each access; it takes no gradient."""
        with torch.no_grad():
            return self.linear().read().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for inputs [..., in], in their dtype or in that of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.rounding is None:
            out = _ByCodes.apply(x, lambda: self.linear().read())
        else:
            out = self._rounded(x, self.rounding)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _rounded(self, x: Tensor, rounding: Rounding) -> Tensor:
        """Round inputs for the bulk alone, without the columns kept apart; gradients pass the rounding unchanged."""
        linear = self.linear()
        apart = linear.apart()
        entering = x if apart is None else x.index_fill(-1, apart, 0)
        with torch.no_grad():
            change = rounding(entering) - entering
        out = _ByCodes.apply(entering + change, lambda: self.linear().read_bulk())
        if linear.additions:
            out = out + _ByCodes.apply(x, lambda: (one := self.linear()).read() - one.read_bulk())
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the tensors along, and keep their dtypes; the dtype of a cast is what ``weight`` reads as from then."""
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        # A cast there and back would round, so only the device is taken of what ``fn`` does.
        old = next(iter(self.tensors.values())).device if self.whole is None else self.whole.bulk.device
        device = fn(torch.empty(0, device=old)).device
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        self.whole = None if self.whole is None else self.whole.to(device)
        if isinstance(self.rounding, functools.partial):
            given = self.rounding.keywords.items()
            moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given}
            self.rounding = functools.partial(self.rounding.func, *self.rounding.args, **moved)
        return self

    def extra_repr(self) -> str:
        """Say which parts the weight is the sum of."""
        kinds = " + ".join(part.kind for part in self.linear().parts)
        return f"{super().extra_repr()}, {kinds}"
