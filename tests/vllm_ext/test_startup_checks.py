"""Checks that need vLLM's configuration classes but no engine."""

import argparse
import importlib
import socket
import sys
from types import SimpleNamespace

import pytest
import torch

from kv_cache.errors import ParetoError
from kv_cache.formats import DTYPES, FORMATS, get_format
from tests.vllm_ext.fake_engines import arch, fake_config, some_scales
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


@pytest.mark.refuses("multi-head latent attention (DeepSeek, Kimi)", "encoder-only attention", "context parallelism")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_size": 72}, "head size 72"),
        ({"use_mla": True}, "multi-head latent"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"use_dcp": True}, "context parallelism"),
    ],
)
def test_a_layer_that_cannot_be_served_names_the_alternative(changes, reason):
    from vllm_ext.cpu_backend import backend_path

    with pytest.raises(ParetoError, match=f"does not serve .*{reason}.*--kv-cache-dtype auto"):
        backend_path(selection(**changes))


@pytest.mark.parametrize("version", [2, 3])
def test_sinks_are_served_on_cuda_where_flash_attention_serves_them(version, monkeypatch):
    from vllm.v1.attention.backends import fa_utils

    from vllm_ext import cpu_backend

    # A vLLM for CPUs lacks the function itself.
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", None, raising=False)
    monkeypatch.delitem(sys.modules, "vllm_ext.cuda_backend", raising=False)
    cuda_backend = importlib.import_module("vllm_ext.cuda_backend")
    monkeypatch.delitem(sys.modules, "vllm_ext.cuda_backend")
    assert "int4_per_head" in cpu_backend.backend_path(selection(has_sink=True))
    monkeypatch.setattr(cuda_backend, "flash_attn_supports_sinks", lambda: version >= 3)
    assert "int4_per_head" in cuda_backend.backend_path(selection())
    if version >= 3:
        assert "int4_per_head" in cuda_backend.backend_path(selection(has_sink=True))
        return
    with pytest.raises(ParetoError, match=r"int4_per_head serves attention sinks .* capability 9\.0: use .* auto"):
        cuda_backend.backend_path(selection(has_sink=True))


@pytest.mark.parametrize("sinks", [None, torch.tensor([1.5, -3.0, 0.25, 8.0]).bfloat16()])
def test_a_layer_reads_the_sinks_that_its_model_loads(sinks, monkeypatch):
    """The parameter has no values yet when the layer is built, and gets others where it lies when loaded again."""
    from vllm_ext import codes_backend

    monkeypatch.setattr(codes_backend, "get_current_vllm_config", lambda: None)
    parameter = None if sinks is None else torch.nn.Parameter(torch.full((4,), float("nan"), dtype=torch.bfloat16))
    layer = codes_backend.CodesLayer(4, 64, 0.125, 2, kv_cache_dtype="int4_per_head", sinks=parameter)
    layer.process_weights_after_loading(torch.bfloat16)
    if sinks is None:
        assert layer.sinks is None
        return
    addresses = set()
    for now in (sinks, -sinks):
        parameter.data.copy_(now)
        layer.process_weights_after_loading(torch.bfloat16)
        assert layer.sinks.dtype == torch.float32
        assert torch.equal(layer.sinks, now.float())
        addresses.add(layer.sinks.data_ptr())
    assert len(addresses) == 1
    with pytest.raises(ParetoError, match=r"sinks of shape \(4,\) do not fit 8 query heads"):
        codes_backend.CodesLayer(8, 64, 0.125, 2, kv_cache_dtype="int4_per_head", sinks=parameter)


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
        model_arch_config=arch(2, dim, 2),
        hf_text_config=SimpleNamespace(hidden_size=256, num_hidden_layers=2, rope_parameters=parameters),
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
    with pytest.raises(ParetoError, match="are for 2 layers, the model has 3"):
        check_geometry(some_scales(layers=2), fake_config().model_config, tmp_path)
    with pytest.raises(ParetoError, match="4 KV heads of 80 channels in layer 0, the model has 4 and 64"):
        check_geometry(some_scales(dim=80), fake_config().model_config, tmp_path)
    # A layer may have none: vLLM knows which layers it codes only when it builds them.
    some = some_scales()
    some.layers[1] = None
    check_geometry(some, fake_config().model_config, tmp_path)


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
    cost = cache_cost([(fmt, 2, 64) for fmt in (four, None, three, four)], element_bytes=2)
    assert cost.bytes_per_token == 2 * (68 + 256 + 52 + 68)
    assert cost.compression_ratio == pytest.approx(4 * 512 / cost.bytes_per_token)
    assert cost.bits_per_element == pytest.approx((4.25 + 3.25 + 4.25) / 3)
    assert cost.mean_bits == pytest.approx((4.25 + 16 + 3.25 + 4.25) / 4)
    # Layers may differ in their heads (Gemma 4): wide ones count for more.
    cost = cache_cost([(four, 16, 256), (None, 4, 512)], element_bytes=2)
    assert cost.bytes_per_token == 16 * 260 + 4 * 2048
    assert cost.mean_bits == pytest.approx((4.0625 * 8192 + 16 * 4096) / 12288)


def mixed_config(block_size=128, **cache):
    """The shape of Gemma 4 31B: three layers of 16 heads of 256 channels, one of 4 heads of 512."""
    heads = [*arch(16, 256, 3), *arch(4, 512, 1)]
    model = SimpleNamespace(
        get_total_num_hidden_layers=lambda: 4, model_arch_config=heads, dtype=torch.bfloat16,
        get_num_kv_heads=lambda parallel, layer: layer.total_num_kv_heads // parallel.tensor_parallel_size,
    )  # fmt: skip
    return SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(block_size=block_size, skip_page_size_padded=None, **cache),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )


@pytest.mark.parametrize("block_size", [16, 128, 144])
@pytest.mark.parametrize(("heads", "full_heads"), [(16, 4), (1, 1), (8, 2), (4, 4)])
@pytest.mark.parametrize("name", FORMATS)
def test_blocks_of_coded_layers_fill_the_pages_of_uncoded_ones(name, heads, full_heads, block_size):
    """vLLM makes all pages as large as the largest; nothing but a page's worth of the difference may be lost."""
    from vllm.v1.core.kv_cache_utils import unify_kv_cache_spec_page_size
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from vllm_ext.cpu_backend import _BACKENDS
    from vllm_ext.layers import fitted, unserved_layers

    config = mixed_config(block_size)
    config.model_config.model_arch_config = [*arch(heads, 256, 3), *arch(full_heads, 512, 1)]
    assert unserved_layers(config.model_config) == [3]
    backend = _BACKENDS[name]
    spec = SlidingWindowSpec(
        block_size=block_size, num_kv_heads=heads, head_size=256, dtype=torch.uint8, sliding_window=1024
    )
    full = FullAttentionSpec(block_size=block_size, num_kv_heads=full_heads, head_size=512, dtype=torch.bfloat16)
    coded = backend.customize_spec(fitted(spec, backend, config))
    unified = unify_kv_cache_spec_page_size({"sliding": coded, "full": full})
    assert unified["sliding"].page_size_bytes == unified["full"].page_size_bytes
    assert unified["sliding"].block_size == coded.block_size
    per_token = FORMATS[name].bytes_per_token(256) * heads
    assert coded.block_size % block_size == 0
    lost = unified["full"].page_size_bytes - full.page_size_bytes
    assert 0 <= lost < per_token * block_size
    assert unified["sliding"].page_size_bytes == coded.block_size * per_token


def test_blocks_stay_as_they_are_where_nothing_is_to_be_filled():
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from vllm_ext.cpu_backend import _BACKENDS
    from vllm_ext.layers import fitted

    backend = _BACKENDS["int4_per_head"]
    shape = {"block_size": 128, "num_kv_heads": 16, "head_size": 256, "dtype": torch.uint8}
    sliding, full = SlidingWindowSpec(**shape, sliding_window=1024), FullAttentionSpec(**shape)
    assert fitted(sliding, backend, mixed_config()).block_size == 256
    assert fitted(full, backend, mixed_config()) is full
    together = mixed_config()
    together.scheduler_config.disable_hybrid_kv_cache_manager = True
    assert fitted(sliding, backend, together) is sliding
    alike = mixed_config()
    alike.model_config.model_arch_config = arch(16, 256, 4)
    assert fitted(sliding, backend, alike) is sliding


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
