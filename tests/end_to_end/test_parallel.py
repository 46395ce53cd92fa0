"""Engines of two ranks on CPU, in vLLM's own processes: the answers of one rank, within rounding."""

import asyncio
import dataclasses

import pytest
import torch

from kv_cache.scales import TENSORS, KVScales
from tests.end_to_end.engines import VOCABULARY, engine, environment, prompts, run, write_model
from tests.kv_cache.random_scales import random_scales

pytestmark = [pytest.mark.engine, pytest.mark.long]

LAYERS, HEADS, DIM = 4, 2, 64
BITS = [(8, 3), (3, 4), (2, 8), (6, 4)]
TEXTS = prompts(3, 100, seed=3, vocabulary=VOCABULARY)
NEW = 16
SETTINGS = {"skip_tokenizer_init": True, "max_num_batched_tokens": 128, "num_gpu_blocks_override": 64}
# vLLM wants a memory node for each rank to bind it to, or to be told not to.
FREE = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
RANKS = {
    "tensor": {"tensor_parallel_size": 2},
    # Without compiling, vLLM 0.32 on CPU does not make what a rank hands on to the next.
    "pipeline": {
        "pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"},
    },
}  # fmt: skip


def write_scales(folder, *, exchanged=False):
    """Write scales that differ from layer to layer and from head to head, or those with the two heads exchanged."""
    torch.manual_seed(7)
    made = [random_scales(HEADS, DIM) for _ in range(LAYERS)]
    made = [dataclasses.replace(one, rotary=made[0].rotary) for one in made]
    if exchanged:
        made = [dataclasses.replace(one, **{name: getattr(one, name).flip(0) for name in TENSORS}) for one in made]
    KVScales(made, BITS).save(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("parallel") / "model", layers=LAYERS)


def answers(model, **settings):
    with environment(**FREE), engine(model, "mixed_per_head", **SETTINGS | settings) as llm:
        return run(llm, TEXTS, NEW)


def apart(one, other):
    """Return the mean difference of the first new tokens' log-probabilities."""
    return sum(abs(a[1][0] - b[1][0]) for a, b in zip(one, other, strict=True)) / len(one)


@pytest.fixture(scope="module")
def alone(model):
    """The answers of one rank."""
    write_scales(model)
    return answers(model)


def test_scales_of_another_head_would_show(model, alone):
    write_scales(model, exchanged=True)
    try:
        difference = apart(alone, answers(model))
    finally:
        write_scales(model)
    assert difference > 0.1


@pytest.mark.serves("tensor parallelism", "pipeline parallelism")
@pytest.mark.parametrize("kind", RANKS)
def test_two_ranks_answer_like_one(model, alone, kind):
    """Each rank of the first kind has one head, each of the second two layers with bits of their own."""
    found = answers(model, **RANKS[kind])
    # A last bit of float32 turns a few codes into their neighbours.
    assert apart(found, alone) < 0.01
    if kind == "pipeline":
        assert found == alone


@pytest.mark.serves("data parallelism")
def test_engines_side_by_side_answer_alike(model, alone):
    """Data parallelism: each of two engines answers some of the requests."""

    async def all_of_them():
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "seed": 0}
        args = AsyncEngineArgs(str(model), kv_cache_dtype="mixed_per_head", data_parallel_size=2, **SETTINGS | settings)
        llm = AsyncLLM.from_engine_args(args)
        params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, detokenize=False)

        async def one(number, text):
            async for found in llm.generate(
                {"prompt_token_ids": text}, params, str(number), data_parallel_rank=number % 2
            ):
                last = found
            return list(last.outputs[0].token_ids)

        try:
            return await asyncio.gather(*[one(i, text) for i, text in enumerate(TEXTS)])
        finally:
            llm.shutdown()

    with environment(VLLM_CPU_KVCACHE_SPACE="1", **FREE):
        assert asyncio.run(all_of_them()) == [ids for ids, _ in alone]
