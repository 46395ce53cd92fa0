"""The evaluation against a plain forward pass, and against damage: ref-7m."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import engine
from bench.quality.command import DESCRIPTION
from bench.quality.measure import measure_windows
from bench.quality.needle import is_correct, make_trials
from quant_methods.calibration.text_source import load_tokenizer
from quant_methods.model_source import resolve_model
from tests.end_to_end.engines import in_this_process

pytestmark = pytest.mark.engine
LENGTH = 400


@pytest.fixture(scope="module")
def model():
    return resolve_model("ref-7m")


@pytest.fixture(scope="module")
def settings(model):
    """Settings of engines in this process: all have one extension of workers, which vLLM mixes into their class."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield engine.EngineSettings(
            str(model), max_model_len=2048, kv_cache_memory_bytes=256 << 20,
            worker_extension="damage_extension.DamagingTap",
        )  # fmt: skip


@pytest.fixture(scope="module")
def llm(settings):
    with in_this_process(), engine.running(settings) as running:
        yield running, settings


@pytest.fixture(scope="module")
def tokens(model):
    ids = load_tokenizer(model)(DESCRIPTION)["input_ids"]
    return (ids * (LENGTH // len(ids) + 1))[:LENGTH]


@pytest.mark.parametrize("chunk", [1, 16])
def test_windows_that_advance_together_have_the_figures_of_windows_alone(settings, tokens, chunk):
    """A chunk a step for three windows at once, in an engine set up as the plan does.

    It comes before the tests of the other engine: only one can be in this process.
    """
    windows = [tokens[:120], tokens[50:130], tokens[200:230]]
    together_too = replace(
        settings, dtype="float32", max_num_batched_tokens=4 * chunk, extra={"long_prefill_token_threshold": chunk}
    )
    with in_this_process(), engine.running(together_too) as llm:
        together = measure_windows(llm, [(window, None, None) for window in windows], chunk)
        for window, figures in zip(windows, together, strict=True):
            (alone,) = measure_windows(llm, [(window, None, None)], chunk)
            assert figures["max_chunk"] == alone["max_chunk"] == chunk
            np.testing.assert_allclose(figures["nll"], alone["nll"], atol=1e-3)


def test_likelihoods_agree_with_transformers_in_float32(llm, model, tokens):
    from transformers import AutoModelForCausalLM

    (figures,) = measure_windows(llm[0], [(tokens, None, None)])
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = reference(ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy()
    measured = np.array(figures["nll"])
    assert figures["max_chunk"] == 64
    assert len(measured) == LENGTH - 1
    assert measured.mean() == pytest.approx(expected.mean(), abs=0.005)
    # bfloat16 noise; a shift by one position would be off by several nats.
    assert np.abs(measured - expected).mean() < 0.05


def test_divergence_is_zero_for_the_same_and_grows_with_damage(llm, tokens, tmp_path):
    path = str(tmp_path / "logits.bin")
    (base,) = measure_windows(llm[0], [(tokens, path, None)])
    figures = []
    for amount in (0.0, 0.02, 0.2):
        llm[0].collective_rpc("pareto_test_damage", args=(amount,))
        figures += measure_windows(llm[0], [(tokens, None, [path, base["dtype"]])])
    llm[0].collective_rpc("pareto_test_damage", args=(0.0,))
    same, little, much = (float(np.mean(f["kl"])) for f in figures)
    assert abs(same) < 1e-6
    assert 1e-5 < little < much / 5
    assert [np.mean(f["top1"]) for f in figures] == sorted([np.mean(f["top1"]) for f in figures], reverse=True)
    assert np.mean(figures[0]["top1"]) == 1
    assert np.mean(figures[2]["nll"]) > np.mean(base["nll"])


def test_the_capacity_is_what_the_memory_holds(llm):
    cache = engine.kv_cache(*llm)
    # 6 layers, 2 KV heads of 64 channels, key and value, two bytes each.
    assert cache.bytes_per_token == 6 * 2 * 64 * 2 * 2
    assert cache.bits_per_element == 16
    assert cache.budget_bytes * 0.98 < cache.memory_bytes <= cache.budget_bytes
    assert cache.tokens * cache.bytes_per_token <= cache.memory_bytes


def test_the_embedded_model_finds_needles(llm, model):
    from vllm import SamplingParams

    tokenizer = load_tokenizer(model)
    filler = tokenizer(DESCRIPTION, add_special_tokens=False)["input_ids"]
    trials = make_trials(tokenizer, filler, [1024], [0.1, 0.5, 0.9], per_cell=2, seed=0)
    outputs = llm[0].generate(
        [{"prompt_token_ids": t.prompt} for t in trials],
        [SamplingParams(max_tokens=t.answer_tokens, temperature=0.0) for t in trials],
        use_tqdm=False,
    )
    assert sum(is_correct(t, o.outputs[0].text) for t, o in zip(trials, outputs, strict=True)) >= 5
