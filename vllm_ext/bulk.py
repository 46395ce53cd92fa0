"""What multiplies the bulk of a quantized layer: one of vLLM's kernels where one fits, else one of ours.

| bulk | CPU | CUDA |
| --- | --- | --- |
| 8 bits, symmetric, one scale per channel, activations int8 | vLLM's int8 kernel | vLLM's int8 kernel |
| 4 bits on a grid | vLLM's 4-bit kernel | ours (below) for few sequences, else vLLM's (Machete, Marlin) |
| 2 and 3 bits on a grid | vLLM's 4-bit kernel | ours, ``quant_methods/kernels/low_bit_cuda.py`` |
| 8 bits, symmetric | dequantized once at load | vLLM's 8-bit kernel (Machete, Marlin) |
| 2 to 4 bits in a table, 5 to 7 bits on a grid | dequantized once at load | ours |
| 2 to 4 bits of a trellis, 2:4 codes of 4 bits | dequantized once at load | ours |
| 4 bits with a bitmap | as 4 bits on a grid, the zeros too | ours |
| everything else | dequantized once at load | expanded by PyTorch at every step |

The ways of the last row are slow: a line of the log says so.

What a bulk holds is registered as parameters and buffers, so that compiled graphs take it as inputs.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quant_methods.formats.parts.bitmap_codes import BitmapCodes, BitmapForm
from quant_methods.formats.parts.grid_codes import GridCodes, GridForm
from quant_methods.formats.parts.part import Bulk, BulkForm, slow_on_cuda
from quant_methods.formats.parts.planes import pack_codes
from quant_methods.formats.parts.semi_sparse import SemiSparseCodes, SemiSparseForm
from quant_methods.formats.parts.table_codes import TableCodes, TableForm
from quant_methods.formats.parts.trellis_codes import TrellisCodes, TrellisForm
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


class BulkKernel(Protocol):
    """Multiplies inputs by a layer's bulk."""

    rounds: bool
    """Whether it rounds activations to 8 bits itself."""

    def apply(self, x: Tensor) -> Tensor:
        """Return the product [..., out] with inputs [..., in]."""
        ...


SERVED_ON_CUDA = "use 2 to 7 bits, in groups of 32, 64 or 128 channels or with one scale for each output channel"
"""What is always served by a kernel of ours; said where neither that nor one of vLLM's takes a layer."""


def grid_on_cpu(codes: GridCodes, activations: str, dtype: torch.dtype) -> BulkKernel:
    """Return what multiplies by codes on a grid on a CPU.

    Args:
        codes: on the device that they will be multiplied on.
        activations: what inputs are rounded to, as in ``Form``.
        dtype: of inputs and outputs.

    """
    kernel = _int8(codes, activations) or (_mixed(codes, dtype) if codes.bits <= 4 else None)
    return kernel or _dense(codes, "grid", dtype)


def grid_on_cuda(codes: GridCodes, activations: str, dtype: torch.dtype) -> BulkKernel:
    """Return what multiplies by codes on a grid on a CUDA device; see :func:`grid_on_cpu`."""
    kernel = _int8(codes, activations) or (_mixed(codes, dtype) if codes.bits in (4, 8) else None)
    if kernel is not None:
        return kernel
    return _low_bit(low_bit_module(codes, dtype), GridForm(codes.bits, symmetric=codes.symmetric))


def table_on_cpu(codes: TableCodes, activations: str, dtype: torch.dtype) -> BulkKernel:
    """Return what multiplies by codes with tables on a CPU; see :func:`grid_on_cpu`."""
    return _dense(codes, "look-up", dtype)


def table_on_cuda(codes: TableCodes, activations: str, dtype: torch.dtype) -> BulkKernel:
    """Return what multiplies by codes with tables on a CUDA device; see :func:`grid_on_cpu`."""
    return _low_bit(low_bit_module(codes, dtype), TableForm(codes.bits))


def trellis_on_cpu(codes: TrellisCodes, activations: str, dtype: torch.dtype) -> BulkKernel:
    """Return what multiplies by codes of a trellis on a CPU; see :func:`grid_on_cpu`."""
    return _dense(codes, "trellis", dtype)


def trellis_on_cuda(codes: TrellisCodes, activations: str, dtype: torch.dtype) -> BulkKernel:
    """Return what multiplies by codes of a trellis on a CUDA device; see :func:`grid_on_cpu`."""
    form = TrellisForm(codes.bits, _group_size(codes))
    return _low_bit(low_bit_module(codes, dtype), form)


def semi_sparse_on_cpu(codes: SemiSparseCodes, activations: str, dtype: torch.dtype) -> BulkKernel:
    """Return what multiplies by 2:4 codes on a CPU; see :func:`grid_on_cpu`."""
    return _dense(codes, "2:4", dtype)


def semi_sparse_on_cuda(codes: SemiSparseCodes, activations: str, dtype: torch.dtype) -> BulkKernel:
    """Return what multiplies by 2:4 codes on a CUDA device; see :func:`grid_on_cpu`."""
    form = SemiSparseForm(codes.bits, _group_size(codes), codes.symmetric)
    return _low_bit(low_bit_module(codes, dtype), form)


def bitmap_on_cpu(codes: BitmapCodes, activations: str, dtype: torch.dtype) -> BulkKernel:
    """Return what multiplies by codes with a bitmap on a CPU; see :func:`grid_on_cpu`."""
    logger.warning_once("%d-bit codes with a bitmap have no CPU kernel: zeros are codes too, once loaded", codes.bits)
    return grid_on_cpu(codes.grid(), activations, dtype)


def bitmap_on_cuda(codes: BitmapCodes, activations: str, dtype: torch.dtype) -> BulkKernel:
    """Return what multiplies by codes with a bitmap on a CUDA device; see :func:`grid_on_cpu`."""
    form = BitmapForm(codes.bits, _group_size(codes), codes.symmetric)
    return _low_bit(low_bit_module(codes, dtype), form)


def _group_size(codes: TrellisCodes | SemiSparseCodes | BitmapCodes) -> int:
    """Return how many input channels share a scale, -1 for all of them."""
    groups = codes.scale.shape[1]
    return -1 if groups == 1 else codes.shape[1] // groups


def _int8(codes: GridCodes, activations: str) -> BulkKernel | None:
    """Return vLLM's kernel for int8 activations and weights, None if the codes are not for it."""
    fits = activations == "int8" and codes.bits == 8 and codes.scale.shape[1] == 1
    return Int8Bulk(codes) if fits and not codes.zero_point.any() else None


def _mixed(codes: GridCodes, dtype: torch.dtype) -> BulkKernel | None:
    """Return one of vLLM's kernels for 16-bit activations, None if it has none or ours is to take the layer."""
    config = _mixed_config(codes, dtype)
    if config is None or takes(config):
        return None
    try:
        kernel = choose_mp_linear_kernel(config)
    except ValueError as error:
        shape = *codes.shape, str(error)
        logger.warning_once("vLLM has no kernel for %s-bit grid weights [%d, %d]: %s", codes.bits, *shape)
        return None
    return MixedBulk(codes, config, kernel)


def _low_bit(module: nn.Module, form: BulkForm) -> BulkKernel:
    """Return our kernel, or what PyTorch does in its place, which is said."""
    if isinstance(module, LowBitLinear):
        logger.warning_once(form.slow_on_cuda() or slow_on_cuda("weights of this layout", form.bits, SERVED_ON_CUDA))
    return LowBitBulk(module)


def _dense(codes: Bulk, kind: str, dtype: torch.dtype) -> BulkKernel:
    """Return what multiplies by the dequantized weight, which is said."""
    logger.warning_once("%d-bit %s weights have no CPU kernel: dequantized to %s at load", codes.bits, kind, dtype)
    return DenseBulk(codes.read().to(dtype))


def _mixed_config(codes: GridCodes, dtype: torch.dtype) -> MPLinearLayerConfig | None:
    """Return what vLLM's mixed-precision kernels are asked for; None if they have no such weights."""
    (out, width), groups, zero_points = codes.shape, codes.scale.shape[1], bool(codes.zero_point.any())
    if codes.bits == 8:
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
        codes: on a grid.
        config: what the kernel was chosen for.
        kernel: its class.

    """

    rounds = False

    def __init__(self, codes: GridCodes, config: MPLinearLayerConfig, kernel: Any) -> None:
        super().__init__()
        bits = config.weight_type.size_bits
        half = 1 << (bits - 1)
        packed = pack_codes(codes.codes.int() + half, bits)[bits]
        common = {"weight_loader": _loader, "output_dim": 0}
        self.weight_packed = PackedvLLMParameter(
            data=packed, input_dim=1, packed_dim=1, packed_factor=32 // bits, **common
        )
        scale = codes.scale.to(config.act_type).contiguous()
        if config.group_size == -1:
            self.weight_scale = ChannelQuantScaleParameter(data=scale, **common)
        else:
            self.weight_scale = GroupQuantScaleParameter(data=scale, input_dim=1, **common)
        if config.zero_points:
            # Packed along the output channels, which are multiples of 32 wherever this kernel is taken.
            zero = pack_codes((codes.zero_point.int() + half).T.contiguous(), bits)[bits].T.contiguous()
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
        """Return the product; see :class:`BulkKernel`."""
        return self.kernel.apply_weights(self, x, None)


class Int8Bulk(nn.Module):
    """vLLM's kernel of int8 activations, rounded per token, and int8 weights."""

    rounds = True

    def __init__(self, codes: GridCodes) -> None:
        super().__init__()
        self.logical_widths = [codes.shape[0]]
        self.weight = ModelWeightParameter(
            data=codes.codes.contiguous(), input_dim=1, output_dim=0, weight_loader=_loader
        )
        self.weight_scale = ChannelQuantScaleParameter(
            data=codes.scale.float().contiguous(), output_dim=0, weight_loader=_loader
        )
        for name in ("input_scale", "input_zero_point", "azp_adj", "bias"):
            self.register_parameter(name, None)
        self.kernel = init_int8_linear_kernel(
            is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name="pareto"
        )
        self.kernel.process_weights_after_loading(self)

    def apply(self, x: Tensor) -> Tensor:
        """Return the product; see :class:`BulkKernel`."""
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
        """Return the product; see :class:`BulkKernel`."""
        return self.linear.apply(x)


class DenseBulk(nn.Module):
    """A 16-bit weight on the CPU."""

    rounds = False

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def apply(self, x: Tensor) -> Tensor:
        """Return the product; see :class:`BulkKernel`."""
        return self.cpu_linear(x, self.weight, None)
