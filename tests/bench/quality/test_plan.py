import json
import shutil

import pytest
import torch

from bench.quality.command import add_arguments, settings_from
from bench.quality.plan import Settings, default_memory, make_plan
from kv_cache.errors import ParetoError
from quant_methods.embedded import MODELS
from quant_methods.model_source import fingerprint

WORDS = "The quick brown fox jumps over the lazy dog. " * 400


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    return str(path)


def plan(text, **changes):
    base = {"model": "ref-7m", "texts": (text,), "num_windows": 2, "window_tokens": 128, "needle_lengths": (256,)}
    return make_plan(Settings(**(base | changes)))


def quantized_copy(tmp_path, **recipe):
    folder = tmp_path / "w4"
    shutil.copytree(MODELS / "ref-7m", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))
    if recipe:
        (folder / "pareto_recipe.json").write_text(json.dumps(recipe))
    return folder


def test_the_baseline_comes_first_and_is_not_repeated(text):
    p = plan(text, kv_cache_dtypes=("auto", "fp8", "fp8", "int4_per_head"))
    assert [(c.name, c.is_baseline) for c in p.configurations] == [
        ("ref-7m, bf16 KV", True), ("ref-7m, fp8 KV", False), ("ref-7m, int4_per_head KV", False),
    ]  # fmt: skip
    info = p.configurations[0].checkpoint.info
    assert info.bits_per_weight == 16
    assert info.weight_bytes == 2 * info.parameters
    assert p.texts[0].windows.shape == (2, 128)
    assert p.texts[0].windows.dtype == torch.int64


def test_keys_change_with_what_determines_the_result(text, tmp_path):
    base = plan(text, kv_cache_dtypes=("fp8",))
    same = plan(text, kv_cache_dtypes=("fp8", "int4_per_head"))
    assert [c.key for c in same.configurations[:2]] == [c.key for c in base.configurations]
    keys = {base.configurations[1].key}
    for change in ({"window_tokens": 100}, {"chunk_tokens": 32}, {"seed": 1}, {"kv_cache_memory_bytes": 1 << 29}):
        keys.add(plan(text, kv_cache_dtypes=("fp8",), **change).configurations[1].key)
    assert len(keys) == 5


def test_a_compressed_checkpoint_is_compared_with_its_source(text, tmp_path):
    folder = quantized_copy(tmp_path, model="ref-7m", model_sha256=fingerprint(MODELS / "ref-7m"))
    p = plan(text, model=str(folder))
    assert [(c.name, c.is_baseline) for c in p.configurations] == [
        ("ref-7m, bf16 KV", True), ("w4, bf16 KV", False),
    ]  # fmt: skip
    assert p.configurations[1].checkpoint.info.quantization == "compressed-tensors"


def test_an_unknown_or_changed_source_asks_for_the_baseline(text, tmp_path):
    folder = quantized_copy(tmp_path)
    with pytest.raises(ParetoError, match="give its original with --baseline"):
        plan(text, model=str(folder))
    (folder / "pareto_recipe.json").write_text(json.dumps({"model": "ref-7m", "model_sha256": "0" * 64}))
    with pytest.raises(ParetoError, match="not found here; give it with --baseline"):
        plan(text, model=str(folder))
    assert len(plan(text, model=str(folder), baseline="ref-7m").configurations) == 2


def test_lengths_beyond_the_context_are_left_out_or_refused(text):
    p = plan(text, needle_lengths=(256, 8192, 16384))
    assert p.skipped_lengths == [16384]
    assert p.max_model_len == 8192
    with pytest.raises(ParetoError, match="use at most 8191"):
        plan(text, window_tokens=8192)
    assert plan(text, needle_lengths=()).trials == []


def test_memory_holds_two_contexts_in_bf16():
    assert default_memory(MODELS / "ref-7m", 8192, 1) == 1 << 30
    # 3 KiB a token: two contexts of 200k tokens need 1.17 GiB.
    assert default_memory(MODELS / "ref-7m", 200_000, 1) == 2 << 30


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--num-windows", "0"], "--num-windows must be at least 1"), (["--window-tokens", "1"], "at least 2"),
     (["--needle-depths", "0.5", "50"], "between 0"), (["--chunk-tokens", "-3"], "--chunk-tokens")],
)  # fmt: skip
def test_flags_out_of_range(words, message):
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ParetoError, match=message):
        settings_from(parser.parse_args(["ref-7m", "--out", "x", *words]))


def test_a_model_called_as_its_baseline_has_a_name_of_its_own(text, tmp_path):
    (tmp_path / "other").mkdir()
    other = shutil.copytree(MODELS / "ref-7m", tmp_path / "other" / "ref-7m")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    p = plan(text, model=str(other), baseline="ref-7m")
    assert [c.name for c in p.configurations] == ["ref-7m, bf16 KV", f"{other}, bf16 KV"]
