"""Our kernel for 4-bit weights behind vLLM's interface, for GPTQ, AWQ and compressed-tensors checkpoints on CUDA too.

vLLM asks a list of kernels, in order, which one takes a layer; ``patches.py`` puts this one first where the user chose
it: under ``pareto serve``, or with ``VLLM_PARETO_LOW_BIT_KERNEL=1``. It takes a layer where it is the faster one, which
is while few sequences decode at once (docs/weight-format.md has the times). Checkpoints in the format of ours
(``bulk.py``) use it in any case.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.kernels.low_bit_cuda import GROUPS, LowBitCUDA
from vllm_ext.compat import (
    MPLinearKernel,
    MPLinearLayerConfig,
    current_platform,
    envs,
    get_current_vllm_config_or_none,
    permute_param_layout_,
    scalar_types,
    unpack_quantized_values_into_int32,
)

FEW_SEQUENCES = 32
"""That a server may run at once (``--max-num-seqs``) for this kernel to be taken."""
HALF = 8
"""Codes here are signed, vLLM's count from 0."""


def takes(c: MPLinearLayerConfig) -> bool:
    """Return whether this kernel is to take a layer of a checkpoint in the format of ours."""
    return "ParetoLowBitLinearKernel" not in envs.VLLM_DISABLED_KERNELS and ParetoLowBitLinearKernel.can_implement(c)[0]


class ParetoLowBitLinearKernel(MPLinearKernel):
    """4-bit weights with 16-bit activations, by ``quant_methods/kernels/low_bit_cuda.py``."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least compute capability, times ten."""
        return 80

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Return whether this kernel takes a layer, and why not."""
        config = get_current_vllm_config_or_none()
        sequences = None if config is None else config.scheduler_config.max_num_seqs
        inputs, whole = c.partition_weight_shape[0], c.group_size in (-1, c.full_weight_shape[0])
        refusals = {
            "it is for CUDA": not current_platform.is_cuda(),
            f"it is for at most {FEW_SEQUENCES} sequences at once": sequences is None or sequences > FEW_SEQUENCES,
            "it is for 4 bits": c.weight_type not in (scalar_types.uint4, scalar_types.uint4b8),
            "it is for 16-bit activations": c.act_type not in (torch.bfloat16, torch.float16),
            "it is for channels in eights": inputs % 8 != 0,
            "it is for groups of 32, 64, 128 or whole rows": not whole and c.group_size not in GROUPS,
            "ranks would cut a group": not whole and inputs % c.group_size != 0,
        }
        reason = next((reason for reason, refused in refusals.items() if refused), None)
        return reason is None, reason

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Lay a layer's weights out anew; vLLM's own parameters become empty.

        They are, as for vLLM's kernels: codes packed along the input channels, scales and zero-points (packed along the
        output channels) in groups of these.
        """
        c = self.config
        codes, scale, zero = self._get_weight_params(layer)
        permute_param_layout_(codes, input_dim=0, output_dim=1, packed_dim=0)
        unpacked = unpack_quantized_values_into_int32(codes.data, c.weight_type, packed_dim=0)
        permute_param_layout_(scale, input_dim=0, output_dim=1)
        scales = scale.data.T.contiguous()
        zeros = torch.zeros(scales.shape, dtype=torch.int8, device=scales.device)
        if c.zero_points:
            assert zero is not None
            permute_param_layout_(zero, input_dim=0, output_dim=1, packed_dim=1)
            points = unpack_quantized_values_into_int32(zero.data, c.weight_type, packed_dim=1)
            zeros = (points[:, : scales.shape[0]].T - HALF).to(torch.int8).contiguous()
        signed = (unpacked[: c.partition_weight_shape[0]].T - HALF).to(torch.int8).contiguous()
        layer.pareto_low_bit = LowBitCUDA(GridCodes(signed, scales, zeros, bits=4), c.act_type)
        layer.pareto_low_bit.prepare()
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            self._transform_param(layer, name, lambda parameter: parameter.data.new_empty(0))

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the product of inputs [..., in] with a layer, its bias added."""
        y = layer.pareto_low_bit.apply(x)
        return y if bias is None else y + bias
