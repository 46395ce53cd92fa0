"""A configuration that vLLM answers wrongly is told from its neighbours, and said when an engine starts."""

from types import SimpleNamespace

import pytest

from vllm_ext import known_faults
from vllm_ext.known_faults import experts_of_one_group, group_size

OLMOE = {"num_experts": 64, "intermediate_size": 1024, "hidden_size": 2048}
QWEN3 = {"num_experts": 128, "moe_intermediate_size": 768, "intermediate_size": 6144, "hidden_size": 2048}
MIXTRAL = {"num_local_experts": 8, "intermediate_size": 14336, "hidden_size": 4096}
DENSE = {"intermediate_size": 128, "hidden_size": 2048, "num_experts": None}


@pytest.mark.parametrize(
    ("config", "group", "ranks", "wrong"),
    [
        (OLMOE, 128, 8, True), (OLMOE, 128, 4, False), (OLMOE, 64, 8, False), (OLMOE, None, 8, False),
        (QWEN3, 128, 6, True), (QWEN3, 128, 4, False), (QWEN3, 128, 1, False), (MIXTRAL, 128, 8, False),
        (DENSE, 128, 1, False), ({**OLMOE, "intermediate_size": 64, "hidden_size": 128}, 64, 1, True),
        ({**OLMOE, "intermediate_size": 128, "hidden_size": 64}, 64, 1, True),
        ({**OLMOE, "intermediate_size": 64, "hidden_size": 64}, 64, 1, False),
        (OLMOE, 128, 3, False),
    ],
)  # fmt: skip
def test_which_experts_are_meant(config, group, ranks, wrong):
    line = experts_of_one_group(SimpleNamespace(**config), group, ranks)
    assert (line is not None) == wrong
    if wrong:
        assert f"groups of {group}: vLLM orders such scales wrongly" in line
        assert ("fewer GPUs" in line) == (ranks > 1)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"quant_method": "gptq", "group_size": 128}, 128),
        ({"config_groups": {"a": {"weights": {"group_size": 64}}, "b": {"weights": {"group_size": None}}}}, 64),
        ({"config_groups": {"a": {"weights": None}}}, None),
        ({"group_size": -1}, None),
        (None, None),
    ],
)
def test_where_checkpoints_say_the_size_of_groups(settings, size):
    assert group_size(SimpleNamespace(quantization_config=settings)) == size


def engine_config(**parallel):
    config = SimpleNamespace(**OLMOE, quantization_config={"group_size": 128})
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, hf_text_config=config),
        parallel_config=SimpleNamespace(**{"tensor_parallel_size": 8, "enable_expert_parallel": False} | parallel),
    )


def test_it_is_said_at_start(monkeypatch):
    from vllm_ext import compat

    said = []
    monkeypatch.setattr(compat, "init_logger", lambda name: SimpleNamespace(warning=said.append))
    known_faults.warn(engine_config(enable_expert_parallel=True))
    assert said == []
    known_faults.warn(engine_config())
    assert len(said) == 1
    assert "--enable-expert-parallel" in said[0]
