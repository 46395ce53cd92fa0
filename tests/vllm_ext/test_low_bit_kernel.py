"""Our 4-bit kernel behind vLLM's interface: which layers it takes, and that it computes what their parameters mean."""

import pytest
import torch

pytest.importorskip("vllm")

from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter as parameter_module
from vllm.model_executor.kernels import linear as vllm_kernels
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedColumnParameter, PackedvLLMParameter
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from quant_methods.formats.parts.planes import pack_codes
from quant_methods.kernels import low_bit_cuda, low_bit_matrix
from tests.kv_cache.cuda.emulator import EmulatedKernel
from vllm_ext import low_bit_kernel, plugin
from vllm_ext.low_bit_kernel import ParetoLowBitLinearKernel

ROWS, INPUTS = 64, 256


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter_module, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter_module, "get_tensor_model_parallel_world_size", lambda: 1)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA device would answer, and a kernel that runs here."""
    monkeypatch.setattr(low_bit_kernel.current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(low_bit_matrix, "load_kernel", EmulatedKernel)
    monkeypatch.setattr(low_bit_matrix, "device_limits", lambda device: (3, 227 << 10, True))
    monkeypatch.setattr(low_bit_cuda.LowBitCUDA, "prepare", lambda self: None)
    for cache in (low_bit_matrix._arrivals, low_bit_matrix._arrangement):
        cache.cache_clear()


def config(weight_type=scalar_types.uint4b8, group_size=128, act_type=torch.bfloat16, inputs=INPUTS, whole=INPUTS):
    return MPLinearLayerConfig(
        (whole, ROWS), (inputs, ROWS), weight_type, act_type, group_size, zero_points=weight_type == scalar_types.uint4
    )


def server(sequences: int) -> VllmConfig:
    made = VllmConfig()
    made.scheduler_config.max_num_seqs = sequences
    return made


def test_it_takes_what_it_is_faster_for(cuda: None) -> None:
    with set_current_vllm_config(server(32)):
        assert ParetoLowBitLinearKernel.can_implement(config()) == (True, None)
        assert ParetoLowBitLinearKernel.can_implement(config(scalar_types.uint4, 32, torch.float16))[0]
        assert ParetoLowBitLinearKernel.can_implement(config(group_size=-1, inputs=96))[0]
        for refused, reason in (
            (config(scalar_types.uint8b128), "4 bits"),
            (config(act_type=torch.float32), "16-bit activations"),
            (config(act_type=torch.float8_e4m3fn), "16-bit activations"),
            (config(group_size=16), "groups of 32"),
            (config(inputs=100), "in eights"),
            (config(inputs=192), "cut a group"),
        ):
            taken, why = ParetoLowBitLinearKernel.can_implement(refused)
            assert not taken
            assert reason in str(why)
    with set_current_vllm_config(server(33)):
        assert ParetoLowBitLinearKernel.can_implement(config()) == (False, "it is for at most 32 sequences at once")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list:
    """vLLM's list, as it comes."""
    known = vllm_kernels._POSSIBLE_KERNELS
    stock = [kernel for kernel in known[PlatformEnum.CUDA] if kernel is not ParetoLowBitLinearKernel]
    monkeypatch.setitem(known, PlatformEnum.CUDA, stock)
    return stock


@pytest.mark.parametrize("value", [None, "", "0", "off"])
def test_to_install_the_package_is_no_choice(kernels: list, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("VLLM_PARETO_LOW_BIT_KERNEL", raising=False)
    else:
        monkeypatch.setenv("VLLM_PARETO_LOW_BIT_KERNEL", value)
    plugin.register()
    assert ParetoLowBitLinearKernel not in kernels


def test_checkpoints_in_the_format_of_ours_use_it_in_any_case(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PARETO_LOW_BIT_KERNEL", raising=False)
    with set_current_vllm_config(server(32)):
        assert low_bit_kernel.takes(config())
        monkeypatch.setenv("VLLM_DISABLED_KERNELS", "ParetoLowBitLinearKernel")
        assert not low_bit_kernel.takes(config())
    monkeypatch.delenv("VLLM_DISABLED_KERNELS")
    with set_current_vllm_config(server(33)):
        assert not low_bit_kernel.takes(config())


def test_it_is_asked_first_and_once(kernels: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PARETO_LOW_BIT_KERNEL", "1")
    plugin.register()
    plugin.register()
    assert kernels[0] is ParetoLowBitLinearKernel
    assert kernels.count(ParetoLowBitLinearKernel) == 1


def test_not_on_a_cpu() -> None:
    with set_current_vllm_config(server(4)):
        assert ParetoLowBitLinearKernel.can_implement(config()) == (False, "it is for CUDA")


CASES = [
    pytest.mark.parametrize("zero_points", [False, True]),
    pytest.mark.parametrize("inputs_first", [False, True], ids=["compressed-tensors", "gptq"]),
    pytest.mark.parametrize("group_size", [32, -1]),
]


def every_case(test):
    for mark in CASES:
        test = mark(test)
    return test


@every_case
def test_it_computes_what_the_parameters_mean(
    cuda: None, zero_points: bool, inputs_first: bool, group_size: int
) -> None:
    check("cpu", zero_points=zero_points, inputs_first=inputs_first, group_size=group_size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_case
def test_it_does_on_a_device(zero_points: bool, inputs_first: bool, group_size: int) -> None:
    check("cuda", zero_points=zero_points, inputs_first=inputs_first, group_size=group_size)


def check(device: str, *, zero_points: bool, inputs_first: bool, group_size: int) -> None:
    groups = 1 if group_size == -1 else INPUTS // group_size
    codes = torch.randint(0, 16, (ROWS, INPUTS))
    scale = (torch.rand(ROWS, groups) + 0.5).bfloat16()
    zero = torch.randint(0, 16, (ROWS, groups)) if zero_points else torch.full((ROWS, groups), 8)
    grouped = codes.double().unflatten(1, (groups, -1)) - zero.double()[:, :, None]
    weight = (grouped * scale.double()[:, :, None]).flatten(1)

    def parameter(kind, data, packed=None, flip=inputs_first):
        """[out, in], or turned around, with what vLLM wants to know of it."""
        extra = {} if packed is None else {"packed_factor": 8, "packed_dim": 1 - packed if flip else packed}
        if kind is not PackedColumnParameter:
            extra["input_dim"] = 0 if flip else 1
        made = (data.T if flip else data).contiguous().to(device)
        return kind(data=made, output_dim=1 if flip else 0, weight_loader=lambda *_: None, **extra)

    layer = nn.Module()
    layer.codes = parameter(PackedvLLMParameter, pack_codes(codes, 4)[4], packed=1)
    layer.scale = parameter(GroupQuantScaleParameter, scale)
    if zero_points:
        layer.zero = parameter(PackedvLLMParameter, pack_codes(zero.T.contiguous(), 4)[4].T, packed=0)
    with set_current_vllm_config(server(8)):
        settings = config(scalar_types.uint4 if zero_points else scalar_types.uint4b8, group_size)
        kernel = ParetoLowBitLinearKernel(settings, "codes", "scale", "zero" if zero_points else None)
    kernel.process_weights_after_loading(layer)
    assert layer.codes.numel() == layer.scale.numel() == 0

    x = torch.randn(2, 3, INPUTS, dtype=torch.bfloat16)
    bias = torch.randn(ROWS, dtype=torch.bfloat16)
    found = kernel.apply_weights(layer, x.to(device), bias.to(device)).double().cpu()
    expected = x.double() @ weight.T + bias.double()
    assert (found - expected).norm() < 5e-3 * expected.norm()
