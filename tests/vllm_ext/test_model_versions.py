"""Every flag that says which version of a model is meant reaches every place that reads the model."""

import argparse
from types import SimpleNamespace

import huggingface_hub
import pytest

from kv_cache.errors import ParetoError
from kv_cache.scales import SCALES_FILE
from vllm_ext import auto_calibration, scale_source, serve
from vllm_ext.auto_calibration import Origin


def run(*words):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args, args.rest = parser.parse_known_args(words)
    serve.run(args)


def test_serve_leaves_a_hub_model_to_vllm_with_all_flags(started, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append((*a, k)))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    versions = ["--tokenizer-revision", "t", "--code-revision", "c", "--download-dir", "/models"]
    run("org/m", "--revision", "v2", "--hf-token", "secret", *versions)
    words = " ".join(started[0])
    assert " serve org/m " in words
    assert " ".join(versions) in words
    for expected in ("--revision v2", "--hf-token secret"):
        assert expected in words
    assert asked == [("org/m", "config.json", {"revision": "v2", "token": "secret"})]
    run("org/m", "--hf-token")
    assert started[1][-1] == "--hf-token"
    assert "--revision" not in started[1]


def config(**changes):
    model = {"model": "org/m", "revision": "r", "tokenizer": "org/m", "tokenizer_revision": "r", "hf_token": None}
    return SimpleNamespace(**model | changes), SimpleNamespace(load_format="auto", download_dir="/models")


def test_the_engines_configuration_says_all_of_it():
    assert Origin.of(*config()) == Origin("org/m", "r", download_dir="/models")
    elsewhere = Origin("org/m", "r", download_dir="/models", config="/other")
    assert Origin.of(*config(hf_config_path="/other")) == elsewhere
    assert Origin.of(*config(hf_config_path="org/m")) == Origin("org/m", "r", download_dir="/models")
    assert Origin.of(*config(tokenizer_revision="t", hf_token="x")) == Origin(
        "org/m", "r", "org/m", "t", "/models", "x"
    )
    assert Origin.of(*config(tokenizer="org/t")).tokenizer == "org/t"
    assert Origin.of(*config(hf_overrides={"b": {"c": 1}, "a": 2})).overrides == '{"a": 2, "b": {"c": 1}}'
    assert Origin.of(*config(hf_overrides={})).overrides is None
    with pytest.raises(ParetoError, match="org/m: hf_overrides is a function, and KV scales need"):
        Origin.of(*config(hf_overrides=lambda found: found))


def test_scales_of_the_checkpoint_are_not_for_what_overrides_make_of_it(monkeypatch, tmp_path):
    (tmp_path / "m" / "kv_scales").mkdir(parents=True)
    (tmp_path / "m" / "kv_scales" / "scales.safetensors").touch()
    made = tmp_path / "made"
    monkeypatch.setattr("vllm_ext.auto_calibration.calibrate", lambda origin, device: made)
    plain = config(model=str(tmp_path / "m"), tokenizer=str(tmp_path / "m"))
    assert scale_source._find(*plain) == tmp_path / "m"
    changed = config(model=str(tmp_path / "m"), tokenizer=str(tmp_path / "m"), hf_overrides={"rope_theta": 1e6})
    assert scale_source._find(*changed) == made


def test_scales_are_fetched_and_made_from_the_files_that_are_served(monkeypatch, tmp_path):
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "cache"))
    asked, ran = [], []

    def fetch(name, *file, **settings):
        asked.append((name, *file, settings["revision"], settings["cache_dir"], settings["token"]))
        if file:
            response = SimpleNamespace(headers={}, request=None)
            raise huggingface_hub.errors.RemoteEntryNotFoundError("404", response=response)
        folder = tmp_path / name.replace("/", "-") / str(settings["revision"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(str(folder))
        return str(folder)

    def calibrated(source, folder, device, tokenizer):
        ran.append((source, tokenizer))
        (folder / SCALES_FILE).parent.mkdir()
        (folder / SCALES_FILE).write_text("")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr("quant_methods.model_source.validate_checkpoint", lambda *a, **k: None)
    monkeypatch.setattr(auto_calibration, "sampled_fingerprint", lambda folder: "f" * 64)
    monkeypatch.setattr(auto_calibration, "_run", calibrated)
    first = scale_source._find(*config(tokenizer_revision="t", hf_token="x"))
    assert asked == [
        ("org/m", str(SCALES_FILE), "r", "/models", "x"),
        ("org/m", "r", "/models", "x"),
        ("org/m", "t", "/models", "x"),
    ]
    assert ran == [(tmp_path / "org-m" / "r", tmp_path / "org-m" / "t")]
    # Another tokenizer has other scales, and the same one the same.
    assert scale_source._find(*config(tokenizer_revision="t")) == first
    assert len({first, scale_source._find(*config(tokenizer_revision="u")), scale_source._find(*config())}) == 3
    assert ran[-1] == (tmp_path / "org-m" / "r", None)


def test_calibration_reads_the_tokenizer_that_is_served(monkeypatch, tmp_path):
    from quant_methods import kv_scales

    seen = []
    monkeypatch.setattr(kv_scales, "make_scales", lambda *a: seen.append(a))
    monkeypatch.setattr("sys.argv", ["kv_scales", "m", "out", "--tokenizer", "t"])
    assert kv_scales.main() == 0
    assert str(seen[0][-1]) == "t"


def test_a_revision_that_is_not_there_is_said_before_vllm_starts(started, monkeypatch):
    def absent(*args, **settings):
        raise huggingface_hub.errors.RevisionNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    with pytest.raises(ParetoError, match="no revision 'v9' of it"):
        run("org/m", "--revision", "v9")
    assert not started


def test_trouble_with_the_hub_is_not_taken_for_no_scales(monkeypatch):
    errors = huggingface_hub.errors
    response = SimpleNamespace(headers={}, request=None)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    late = errors.LocalEntryNotFoundError("An error happened while trying to locate the file")
    late.__cause__ = TimeoutError("timed out")
    for trouble, said in (
        (errors.HfHubHTTPError("401 Client Error: Unauthorized", response=response), "401 Client Error"),
        (errors.HfHubHTTPError("500 Server Error", response=response), "500 Server Error"),
        (late, "TimeoutError: timed out"),
    ):

        def fail(*args, trouble=trouble, **settings):
            raise trouble

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        with pytest.raises(ParetoError, match=rf"whether org/m has KV scales of its own \(.*{said}.*HF_HUB_OFFLINE=1"):
            scale_source._checkpoint_folder(Origin("org/m"))
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: huggingface_hub._CACHED_NO_EXIST)
        assert scale_source._checkpoint_folder(Origin("org/m")) is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert scale_source._checkpoint_folder(Origin("org/m")) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [(["a"], "--additional-config is list, and --kv-cache-dtype int4"), ({"pareto_kv_scales": 1}, "a folder's name")],
)
def test_additional_config_of_another_kind_gets_one_line(value, said):
    model, load = config()
    cache = SimpleNamespace(cache_dtype="int4_per_head")
    made = SimpleNamespace(model_config=model, load_config=load, cache_config=cache, additional_config=value)
    with pytest.raises(ParetoError, match=said):
        scale_source.find_scales(made)
