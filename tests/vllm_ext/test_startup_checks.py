"""Checks that need vLLM's configuration classes but no engine."""

import argparse
import socket
from types import SimpleNamespace

import pytest
import torch

from kv_cache.errors import ParetoError
from kv_cache.formats import DTYPES, FORMATS, get_format
from tests.vllm_ext.fake_engines import fake_config, some_scales
from vllm_ext import serve
from vllm_ext.metrics import cache_cost
from vllm_ext.names import SCALES_KEY
from vllm_ext.versions import check_vllm_version


@pytest.fixture(scope="module", autouse=True)
def plugin():
    from vllm_ext.plugin import register

    register()
    register()  # vLLM calls it more than once


def test_an_unsupported_vllm_is_named():
    check_vllm_version("0.32.1")
    check_vllm_version("0.33.0")
    with pytest.raises(ParetoError, match=r"supports vLLM 0\.32\.\*, 0\.33\.\*, found 0\.34\.0"):
        check_vllm_version("0.34.0")
    with pytest.raises(ParetoError):
        check_vllm_version("0.320.0")


def test_vllm_parses_our_dtypes_and_still_refuses_others():
    from vllm.config.cache import CacheConfig
    from vllm.config.speculative import SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    for name in DTYPES:
        assert parser.parse_args(["--kv-cache-dtype", name]).kv_cache_dtype == name
        assert CacheConfig(cache_dtype=name).cache_dtype == name
    for name in ("auto", "fp8", "int4_per_token_head"):
        assert CacheConfig(cache_dtype=name).cache_dtype == name
    with pytest.raises(ValueError, match="int4_per_head"):
        CacheConfig(cache_dtype="int5_per_head")
    draft = {"method": "ngram", "num_speculative_tokens": 1}
    assert SpeculativeConfig(**draft, kv_cache_dtype="int4_per_head").kv_cache_dtype == "int4_per_head"
    with pytest.raises(ValueError, match="int4_per_head"):
        SpeculativeConfig(**draft, kv_cache_dtype="int5_per_head")


def selection(**changes):
    values = {
        "kv_cache_dtype": "int4_per_head",
        "head_size": 64,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "attn_type": "decoder",
        "use_non_causal": False,
        "use_dcp": False,
        "use_pcp": False,
    }
    return SimpleNamespace(**values | changes)


def test_each_dtype_has_a_backend_that_vllm_can_import():
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_ext.cpu_backend import backend_path

    for name, fmt in FORMATS.items():
        backend = resolve_obj_by_qualname(backend_path(selection(kv_cache_dtype=name)))
        assert backend.fmt is fmt
        spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=128, dtype=torch.uint8)
        assert backend.customize_spec(spec).page_size_bytes == 32 * 2 * fmt.bytes_per_token(128)
        plain = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=128, dtype=torch.bfloat16)
        assert backend.customize_spec(plain) is plain


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_size": 72}, "head size 72"),
        ({"use_mla": True}, "multi-head latent"),
        ({"has_sink": True}, "sinks"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"use_dcp": True}, "context parallelism"),
    ],
)
def test_a_layer_that_cannot_be_served_names_the_alternative(changes, reason):
    from vllm_ext.cpu_backend import backend_path

    with pytest.raises(ParetoError, match=f"does not serve .*{reason}.*--kv-cache-dtype auto"):
        backend_path(selection(**changes))


def cuda_config(**changes):
    values = {
        "use_v2_model_runner": True,
        "speculative_config": None,
        "model_config": SimpleNamespace(dtype=torch.bfloat16),
    }
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize(
    ("changes", "capability", "message"),
    [
        ({}, 75, "compute capability 8.0"),
        ({"use_v2_model_runner": False}, 90, "VLLM_USE_V2_MODEL_RUNNER=1"),
        ({"speculative_config": SimpleNamespace(num_speculative_tokens=16)}, 90, "up to 15 speculative tokens"),
        ({"model_config": SimpleNamespace(dtype=torch.float32)}, 90, "--dtype bfloat16"),
    ],
)
def test_what_cuda_cannot_serve_is_refused(changes, capability, message, monkeypatch):
    import vllm.platforms

    from vllm_ext import startup

    platform = SimpleNamespace(has_device_capability=lambda least: capability >= least)
    monkeypatch.setattr(vllm.platforms, "current_platform", platform)
    if capability >= 80:
        served = cuda_config(speculative_config=SimpleNamespace(num_speculative_tokens=15))
        startup._check_cuda(served, "int4_per_head")
    with pytest.raises(ParetoError, match=message):
        startup._check_cuda(cuda_config(**changes), "int4_per_head")


@pytest.mark.parametrize("dim", [64, 80, 96, 128])
def test_dummy_weights_get_scales_with_every_part_that_calibrated_ones_have(dim, tmp_path, monkeypatch):
    import vllm.distributed

    from kv_cache import codec
    from vllm_ext.scale_source import find_scales, layer_scales

    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "cache"))
    parameters = {"rope_theta": 1e6, "partial_rotary_factor": 0.5 if dim == 80 else 1.0}
    model = SimpleNamespace(
        model=str(tmp_path), revision=None, max_model_len=1000, get_total_num_hidden_layers=lambda: 2,
        get_total_num_kv_heads=lambda: 2, get_head_size=lambda: dim,
        hf_text_config=SimpleNamespace(hidden_size=256, rope_parameters=parameters),
    )  # fmt: skip
    config = SimpleNamespace(
        model_config=model, additional_config={}, speculative_config=None,
        load_config=SimpleNamespace(load_format="dummy", download_dir=None),
        cache_config=SimpleNamespace(cache_dtype="int4_per_head"),
    )  # fmt: skip
    folder = find_scales(config)
    assert find_scales(config) == folder
    config.additional_config[SCALES_KEY] = str(folder)
    scales = layer_scales(config, "model.layers.1.attn", 2)
    assert scales.rotary.rotated == (20 if dim == 80 else dim // 2)
    assert not torch.equal(scales.key_transform, layer_scales(config, "model.layers.0.attn", 2).key_transform)
    same = torch.eye(dim).expand(2, dim, dim)
    torch.testing.assert_close(scales.key_inverse @ scales.key_transform, same, atol=1e-5, rtol=0)
    # Keys and values of a dummy model are brought to size 1.
    spread = 16 * (1e-3 / 3**0.5) ** 2
    torch.manual_seed(0)
    positions = torch.arange(300)
    key = torch.randn(300, 2, dim) * spread + codec.centres(scales, positions)
    value = torch.randn(300, 2, dim) * spread
    for even in (codec.even_keys(key, scales, positions), codec.even_values(value, scales)):
        assert 0.8 < even.std() < 1.25
    assert spread / 2 < scales.key_mean.std() < spread * 2


def test_scales_of_another_model_are_refused(tmp_path):
    from vllm_ext.scale_source import check_geometry

    check_geometry(some_scales(), fake_config().model_config, tmp_path)
    with pytest.raises(ParetoError, match="are for 2 layers of 4 KV heads"):
        check_geometry(some_scales(layers=2), fake_config().model_config, tmp_path)


def test_a_rank_gets_its_own_heads(tmp_path, monkeypatch):
    import vllm.distributed

    from vllm_ext.scale_source import layer_scales

    scales = some_scales()
    scales.save(tmp_path)
    config = fake_config(**{SCALES_KEY: str(tmp_path)})
    for world, rank, heads, expected in ((1, 0, 4, slice(0, 4)), (2, 1, 2, slice(2, 4)), (8, 5, 1, slice(2, 3))):
        monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_rank", lambda r=rank: r)
        monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_world_size", lambda w=world: w)
        found = layer_scales(config, "model.layers.1.attn", heads)
        for part in ("key_mean", "key_inverse", "value_size"):
            assert torch.equal(getattr(found, part), getattr(scales.layer(1), part)[expected])
    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_world_size", lambda: 2)
    with pytest.raises(ParetoError, match="has 1 KV heads on each of 2 ranks, its scales are for 4"):
        layer_scales(config, "model.layers.1.attn", 1)


def test_no_scales_is_an_error_not_a_scale_of_one():
    from vllm_ext.scale_source import layer_scales

    with pytest.raises(ParetoError, match="needs calibrated scales"):
        layer_scales(fake_config(), "model.layers.0.attn", 4)


def test_cost_counts_every_layers_own_bits():
    four, three = FORMATS["int4_per_head"], FORMATS["int3_per_head"]
    cost = cache_cost([four, None, three, four], kv_heads=2, head_dim=64, element_bytes=2)
    assert cost.bytes_per_token == 2 * (68 + 256 + 52 + 68)
    assert cost.compression_ratio == pytest.approx(4 * 512 / cost.bytes_per_token)
    assert cost.bits_per_element == pytest.approx((4.25 + 3.25 + 4.25) / 3)


@pytest.mark.parametrize("bits", [None, [(4, 3), (8, 2), (2, 6)]])
def test_layers_of_the_mixed_dtype_have_the_bits_of_the_checkpoint(tmp_path, bits):
    from vllm_ext.scale_source import layer_format_of

    scales = some_scales()
    scales.bits = bits
    scales.save(tmp_path)
    config = fake_config(**{SCALES_KEY: str(tmp_path)})
    config.cache_config = SimpleNamespace(cache_dtype="mixed_per_head")
    if bits is None:
        with pytest.raises(ParetoError, match="--kv-budget"):
            layer_format_of(config, 0)
        return
    assert [layer_format_of(config, i).name for i in range(3)] == ["mixed_k4v3", "mixed_k8v2", "mixed_k2v6"]
    assert layer_format_of(config, 1) == get_format("mixed_k8v2")
    with pytest.raises(ParetoError, match="for 3 layers, not for layer 3"):
        layer_format_of(config, 3)


def test_serve_says_that_the_port_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ParetoError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            serve.check_port("127.0.0.1", port)


def test_serve_says_that_the_plugin_is_switched_off(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ParetoError, match="add 'pareto' to it"):
        serve.check_plugin("auto")


def test_serve_lists_the_dtypes():
    with pytest.raises(ParetoError, match=r"unknown --kv-cache-dtype 'int5'; valid: auto, .*int4_per_head"):
        serve.check_plugin("int5")


def test_serve_takes_a_shape_alone_for_random_weights(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    started = []
    monkeypatch.setenv("VLLM_PARETO_LOW_BIT_KERNEL", "0")
    monkeypatch.setattr(serve, "check_port", lambda host, port: None)
    monkeypatch.setattr(serve.os, "execv", lambda program, command: started.append(command))

    def run(*words):
        args = parser.parse_args([str(tmp_path), *words])
        args.rest = ["--max-num-seqs", "4"]
        serve.run(args)

    run("--load-format", "dummy")
    assert " ".join(started[0]).endswith(f"--load-format dummy --served-model-name {tmp_path} --max-num-seqs 4")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ParetoError, match=r"no config\.json"):
        run("--load-format", "dummy")
