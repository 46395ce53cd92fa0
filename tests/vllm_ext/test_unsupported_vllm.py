"""An unsupported vLLM stays as it is, with one warning; only what asks for something of ours is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from kv_cache.errors import ParetoError
from vllm_ext import plugin, serve, versions

# In a process of its own: what a plugin does to vLLM stays done.
SCRIPT = """
import subprocess, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.config import cache
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm_ext import plugin, versions

versions.SUPPORTED_VLLM = ("0.31",)
before = cache.CacheDType
plugin.register()
plugin.register()
assert cache.CacheDType is before
assert "vllm_ext.patches" not in sys.modules
model = sys.argv[1]
try:
    EngineArgs(model, kv_cache_dtype="int4_per_head").create_engine_config()
except ValueError as error:
    print("dtype:", error)
config = EngineArgs(model, max_model_len=128).create_engine_config()
print("served:", config.cache_config.cache_dtype)
try:
    get_quantization_config("pareto").from_config({})
except ValueError as error:
    print("checkpoint:", error)
# A worker of the same server says it no second time.
subprocess.run([sys.executable, "-c", "from vllm_ext import plugin, versions;"
                "versions.SUPPORTED_VLLM = ('0.31',); plugin.register()"], check=True)
"""


def test_it_serves_what_needs_nothing_of_ours():
    pytest.importorskip("vllm")
    model = Path(__file__).parents[2] / "quant_methods" / "models" / "ref-7m"
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(model)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("pareto: ")]
    assert len(said) == 1
    assert "warning: the plugin is off" in said[0]
    assert "supports vLLM 0.31.*, found 0." in said[0]
    out = [line for line in done.stdout.splitlines() if line.startswith(("dtype:", "served:", "checkpoint:"))]
    assert out[0].startswith("dtype: --kv-cache-dtype int4_per_head: vllm-pareto ")
    assert out[1] == "served: auto"
    assert out[2].startswith("checkpoint: the checkpoint is of the format 'pareto': vllm-pareto ")


def test_a_vllm_of_unknown_version_is_no_error(monkeypatch, capsys):
    def none():
        raise ParetoError("vLLM is not installed")

    monkeypatch.setenv(plugin.WARNED, "")
    monkeypatch.setattr(versions, "vllm_version", none)
    for name in ("_refuse_dtypes", "_refuse_checkpoints"):
        monkeypatch.setattr(plugin, name, lambda error: None)
    plugin.register()
    plugin.register()
    assert capsys.readouterr().err.count("\n") == 1


def test_serve_refuses_our_dtypes_only(monkeypatch):
    monkeypatch.setattr(versions, "vllm_version", lambda: "0.99.0")
    serve.check_plugin("auto")
    serve.check_plugin("a_dtype_of_that_version")
    with pytest.raises(ParetoError, match=r"supports vLLM 0\.32\.\*, 0\.33\.\*, found 0\.99\.0"):
        serve.check_plugin("int4_per_head")
