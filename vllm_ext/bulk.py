"""Chooses what multiplies the bulk of a quantized layer: one of vLLM's kernels where one fits, else one of ours.

| bulk | CPU | CUDA |
| --- | --- | --- |
| 8 bits, symmetric, one scale per channel, activations int8 | vLLM's int8 kernel | vLLM's int8 kernel |
| 4 bits on a grid | vLLM's 4-bit kernel | ours (below) for few sequences, else vLLM's (Machete, Marlin) |
| 2 and 3 bits on a grid | vLLM's 4-bit kernel | ours, ``quant_methods/kernels/low_bit_cuda.py`` |
| 8 bits, symmetric | dequantized once at load | vLLM's 8-bit kernel (Machete, Marlin) |
| 2 to 4 bits in a table, 5 to 7 bits on a grid | dequantized once at load | ours |
| everything else | dequantized once at load | expanded by PyTorch at every step |

The ways of the last row are slow: a line of the log says so.

What a bulk holds is registered as parameters and buffers, so that compiled graphs take it as inputs.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quant_methods.formats.native_format import Form, pack_codes, slow_on_cuda
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.kernels.low_bit import LowBitLinear
from quant_methods.kernels.low_bit_cuda import LowBitCUDA, low_bit_module
from vllm_ext.compat import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    MPLinearLayerConfig,
    PackedvLLMParameter,
    choose_mp_linear_kernel,
    dispatch_cpu_unquantized_gemm,
    init_int8_linear_kernel,
    init_logger,
    scalar_types,
)
from vllm_ext.low_bit_kernel import takes

logger = init_logger(__name__)


class Bulk(Protocol):
    """Multiplies inputs by a layer's bulk."""

    rounds: bool
    """Whether it rounds activations to 8 bits itself."""

    def apply(self, x: Tensor) -> Tensor:
        """Return the product [..., out] with inputs [..., in]."""
        ...


SERVED_ON_CUDA = "use 2 to 7 bits, in groups of 32, 64 or 128 channels or with one scale for each output channel"
"""What is always served by a kernel of ours; said where neither that nor one of vLLM's takes a layer."""


def on_cuda(linear: QuantizedLinear) -> bool:
    """Return whether a layer lies on a CUDA device, and so will be multiplied there."""
    return linear.codes.is_cuda


def make_bulk(linear: QuantizedLinear, form: Form, dtype: torch.dtype) -> Bulk:
    """Return what multiplies by a layer's codes.

    Args:
        linear: the layer, on the device that it will run on; its parts beside the bulk are not looked at.
        form: how it is stored; of it the bits, the kind of bulk, and the activations.
        dtype: of inputs and outputs.

    """
    out, width = linear.codes.shape
    per_channel = linear.scale.shape[1] == 1
    cuda = on_cuda(linear)
    zero_points = bool(linear.zero_point.any())
    what = f"{form.bits}-bit {'look-up' if form.table else 'grid'} weights"
    if form.activations == "int8" and form.bits == 8 and per_channel and not zero_points and not form.table:
        return Int8Bulk(linear)
    if not form.table and (form.bits == 4 or (form.bits < 4 and not cuda) or (form.bits == 8 and cuda)):
        config = _mixed_config(linear, form, dtype, zero_points=zero_points)
        if config is not None and not takes(config):
            try:
                kernel = choose_mp_linear_kernel(config)
            except ValueError as error:
                logger.warning_once("vLLM has no kernel for %s [%d, %d]: %s", what, out, width, str(error))
            else:
                return MixedBulk(linear, config, kernel)
    if cuda:
        module = low_bit_module(linear.codes, linear.scale, linear.zero_point, linear.table, dtype, form.bits)
        if isinstance(module, LowBitLinear):
            logger.warning_once(
                form.slow_on_cuda() or slow_on_cuda("weights of this layout", form.bits, SERVED_ON_CUDA)
            )
        return LowBitBulk(module)
    logger.warning_once("%s have no CPU kernel: dequantized to %s at load", what, dtype)
    return DenseBulk(linear.bulk().to(dtype))


def _mixed_config(
    linear: QuantizedLinear, form: Form, dtype: torch.dtype, *, zero_points: bool
) -> MPLinearLayerConfig | None:
    """Return what vLLM's mixed-precision kernels are asked for; None if they have no such weights."""
    out, width = linear.codes.shape
    groups = linear.scale.shape[1]
    if form.bits == 8:
        if zero_points:
            return None
        weight_type = scalar_types.uint8b128
    else:
        weight_type = scalar_types.uint4 if zero_points else scalar_types.uint4b8
    return MPLinearLayerConfig(
        full_weight_shape=(width, out),
        partition_weight_shape=(width, out),
        weight_type=weight_type,
        act_type=dtype,
        group_size=-1 if groups == 1 else width // groups,
        zero_points=zero_points,
    )


def _loader(*args: Any) -> None:
    raise AssertionError("nothing is loaded into a kernel's own parameters")


class MixedBulk(nn.Module):
    """vLLM's kernels of 16-bit activations and 4- or 8-bit weights; codes of fewer bits are 4-bit codes too.

    Args:
        linear: the layer.
        config: what the kernel was chosen for.
        kernel: its class.

    """

    rounds = False

    def __init__(self, linear: QuantizedLinear, config: MPLinearLayerConfig, kernel: Any) -> None:
        super().__init__()
        bits = config.weight_type.size_bits
        half = 1 << (bits - 1)
        packed = pack_codes(linear.codes.int() + half, bits)[bits]
        common = {"weight_loader": _loader, "output_dim": 0}
        self.weight_packed = PackedvLLMParameter(
            data=packed, input_dim=1, packed_dim=1, packed_factor=32 // bits, **common
        )
        scale = linear.scale.to(config.act_type).contiguous()
        if config.group_size == -1:
            self.weight_scale = ChannelQuantScaleParameter(data=scale, **common)
        else:
            self.weight_scale = GroupQuantScaleParameter(data=scale, input_dim=1, **common)
        if config.zero_points:
            # Packed along the output channels, which are multiples of 32 wherever this kernel is taken.
            zero = pack_codes((linear.zero_point.int() + half).T.contiguous(), bits)[bits].T.contiguous()
            self.weight_zero_point = PackedvLLMParameter(
                data=zero, input_dim=1, packed_dim=0, packed_factor=32 // bits, **common
            )
        self.bias = None
        self.kernel = kernel(config, "weight_packed", "weight_scale", "weight_zero_point")
        self.kernel.process_weights_after_loading(self)
        if getattr(self, "use_w4a8", False):
            logger.warning_once(
                "vLLM's 4-bit CPU kernel rounds activations to 8 bits here; VLLM_CPU_INT4_W4A8=0 turns that off"
            )

    def apply(self, x: Tensor) -> Tensor:
        """Return the product; see :class:`Bulk`."""
        return self.kernel.apply_weights(self, x, None)


class Int8Bulk(nn.Module):
    """vLLM's kernel of int8 activations, rounded per token, and int8 weights."""

    rounds = True

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.logical_widths = [linear.codes.shape[0]]
        self.weight = ModelWeightParameter(
            data=linear.codes.contiguous(), input_dim=1, output_dim=0, weight_loader=_loader
        )
        self.weight_scale = ChannelQuantScaleParameter(
            data=linear.scale.float().contiguous(), output_dim=0, weight_loader=_loader
        )
        for name in ("input_scale", "input_zero_point", "azp_adj", "bias"):
            self.register_parameter(name, None)
        self.kernel = init_int8_linear_kernel(
            is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name="pareto"
        )
        self.kernel.process_weights_after_loading(self)

    def apply(self, x: Tensor) -> Tensor:
        """Return the product; see :class:`Bulk`."""
        return self.kernel.apply_weights(self, x, None)


class LowBitBulk(nn.Module):
    """The kernel of ours, for CUDA."""

    rounds = False

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        if isinstance(linear, LowBitCUDA):
            linear.prepare()

    def apply(self, x: Tensor) -> Tensor:
        """Return the product; see :class:`Bulk`."""
        return self.linear.apply(x)


class DenseBulk(nn.Module):
    """A 16-bit weight on the CPU."""

    rounds = False

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def apply(self, x: Tensor) -> Tensor:
        """Return the product; see :class:`Bulk`."""
        return self.cpu_linear(x, self.weight, None)
