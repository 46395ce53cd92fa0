"""What drafts tokens has KV scales of its own, or none. No engine is started."""

from types import SimpleNamespace

import pytest
import torch

from kv_cache.errors import ParetoError
from kv_cache.scales import KVScales
from tests.vllm_ext.fake_engines import arch, fake_config, some_scales
from vllm_ext.names import DRAFT_SCALES_KEY, SCALES_KEY

pytest.importorskip("vllm")


def draft_engine(tmp_path, method="draft_model", kv_cache_dtype=None, head_size=64):
    """Return an engine's configuration whose draft model has one layer of two heads."""
    some_scales(layers=1, heads=2).save(tmp_path)
    shape = {
        "get_total_num_hidden_layers": lambda: 1,
        "model_arch_config": arch(2, head_size, 1),
    }
    draft = SimpleNamespace(model=str(tmp_path), revision=None, use_mla=False, is_attention_free=False, **shape)
    config = fake_config()
    config.cache_config = SimpleNamespace(cache_dtype="int4_per_head")
    config.load_config = SimpleNamespace(load_format="auto", download_dir=None)
    config.speculative_config = SimpleNamespace(
        method=method, kv_cache_dtype=kv_cache_dtype, draft_model_config=draft, draft_load_config=None
    )
    return config


def test_a_draft_model_has_scales_of_its_own(tmp_path, monkeypatch):
    import vllm.distributed

    from vllm_ext.scale_source import layer_scales
    from vllm_ext.startup import _prepare_draft

    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_world_size", lambda: 1)
    (tmp_path / "target").mkdir()
    (tmp_path / "draft").mkdir()
    config = draft_engine(tmp_path / "draft")
    config.additional_config[SCALES_KEY] = str(tmp_path / "target")
    some_scales().save(tmp_path / "target")
    _prepare_draft(config, "int4_per_head")
    assert config.speculative_config.kv_cache_dtype is None
    for name, heads, folder in (("model.layers.0.attn", 4, "target"), ("draft_model.model.layers.0.attn", 2, "draft")):
        found = layer_scales(config, name, heads)
        assert torch.equal(found.key_mean, KVScales.load(tmp_path / folder).layer(0).key_mean)
    del config.additional_config[DRAFT_SCALES_KEY]
    with pytest.raises(ParetoError, match="a quantized KV cache of a draft model needs calibrated scales"):
        layer_scales(config, "draft_model.model.layers.0.attn", 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "eagle"}, "eagle drafts from the model's hidden states"),
        ({"head_size": 72}, "int4_per_head does not serve head size 72"),
    ],
)
def test_what_drafts_without_scales_keeps_16_bits_unless_the_user_said_otherwise(tmp_path, changes, reason, capsys):
    from vllm_ext.startup import _prepare_draft

    config = draft_engine(tmp_path, **changes)
    _prepare_draft(config, "int4_per_head")
    assert config.speculative_config.kv_cache_dtype == "auto"
    assert f"pareto: what drafts keeps its keys and values in 16 bits: {reason}" in capsys.readouterr().err
    with pytest.raises(ParetoError, match=f"in --speculative-config: {reason}"):
        _prepare_draft(draft_engine(tmp_path, kv_cache_dtype="int4_per_head", **changes), "int4_per_head")


def test_hidden_states_in_pages_are_refused(tmp_path):
    from vllm_ext.startup import _prepare_draft

    with pytest.raises(ParetoError, match="does not serve the speculative method extract_hidden_states"):
        _prepare_draft(draft_engine(tmp_path, method="extract_hidden_states"), "int4_per_head")


def test_methods_without_layers_need_nothing(tmp_path):
    from vllm_ext.drafts import draft_dtype

    assert draft_dtype(draft_engine(tmp_path, method="ngram")) is None
    assert draft_dtype(draft_engine(tmp_path, kv_cache_dtype="fp8")) is None
    assert draft_dtype(draft_engine(tmp_path)) == "int4_per_head"


def test_no_layer_is_read_with_the_scales_of_another(tmp_path, monkeypatch):
    import vllm.config

    from vllm_ext.scale_source import check_layer

    def layer(name, dtype="int4_per_head"):
        return SimpleNamespace(layer_name=name, kv_cache_dtype=dtype)

    some_scales().save(tmp_path)
    built = [layer("model.layers.0.attn"), layer("model.layers.1.attn", "auto"), layer("model.layers.2.attn")]
    context = {one.layer_name: one for one in built}
    config = fake_config(**dict.fromkeys((SCALES_KEY, DRAFT_SCALES_KEY), str(tmp_path)))
    config.compilation_config = SimpleNamespace(static_forward_context=context)
    monkeypatch.setattr(vllm.config, "get_current_vllm_config", lambda: config)
    for name in ("draft_model.model.layers.0.attn", "mtp.layers.1.attn", "model.layers.0.attn"):
        check_layer(context.get(name) or layer(name))
    with pytest.raises(ParetoError, match=r"mtp\.layers\.0\.attn would be read with the KV scales of model\.layers\.0"):
        check_layer(layer("mtp.layers.0.attn"))
    with pytest.raises(ParetoError, match="has KV scales for 3 layers, not for layer 3"):
        check_layer(layer("model.layers.3.attn"))


def test_a_draft_model_without_scales_is_calibrated_with_the_tokens_of_the_model(tmp_path, monkeypatch):
    from vllm_ext import auto_calibration
    from vllm_ext.scale_source import find_scales

    asked = []
    monkeypatch.setattr(auto_calibration, "calibrate", lambda origin, device: asked.append(origin) or tmp_path)
    config = draft_engine(tmp_path)
    (tmp_path / "draft").mkdir()
    config.speculative_config.draft_model_config.model = str(tmp_path / "draft")
    config.speculative_config.draft_model_config.tokenizer = "target"
    assert find_scales(config, draft=True) == tmp_path
    assert asked == [auto_calibration.Origin(str(tmp_path / "draft"), tokenizer="target")]
