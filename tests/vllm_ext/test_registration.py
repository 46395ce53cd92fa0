"""How the dtypes come into vLLM, what that costs, and what happens where a patch does not fit."""

import enum
import subprocess
import sys
import types

import pytest
import torch

from kv_cache.formats import DTYPES, LAYER_FORMATS
from vllm_ext import compat, dtype_names

# In a process of its own: what was imported stays so, and so does what a plugin does to vLLM.
COST = """
import sys
import vllm.engine.arg_utils  # what every front end imports

before = set(sys.modules)
from vllm_ext.plugin import register
register()
added = set(sys.modules) - before
print(len(added), *sorted(name for name in added if not name.startswith(("vllm_ext", "kv_cache", "quant_methods"))))
# Later, each module is patched as it comes.
from vllm.model_executor.layers.attention.attention import Attention
from vllm.v1.attention import selector
knows = getattr(selector, "is_known_kv_cache_dtype", None) or (lambda name: name in selector.CacheDType.__args__)
print(hasattr(Attention.__init__, "__wrapped__"), knows("mixed_k4v3"))
"""

BROKEN = """
import sys
from vllm_ext import dtype_names, plugin

def broken():
    raise AttributeError("module 'x' has no attribute 'y'")

dtype_names.known_dtypes = broken
plugin.register()
from vllm.engine.arg_utils import EngineArgs
assert EngineArgs("m").kv_cache_dtype == "auto"
try:
    EngineArgs("m", kv_cache_dtype="int4_per_head").create_engine_config()
except ValueError as error:
    print(error)
"""


@pytest.fixture
def python(monkeypatch):
    """Runs a script beside vLLM; returns its output and its errors."""
    pytest.importorskip("vllm")
    monkeypatch.delenv("VLLM_PARETO_WARNED", raising=False)

    def run(script):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done

    return run


def test_registering_imports_almost_nothing(python):
    cost, patched = python(COST).stdout.splitlines()[-2:]
    count, *foreign = cost.split()
    assert int(count) < 40
    assert foreign == []
    assert patched == "True True"


def test_a_patch_that_fails_costs_our_dtypes_and_nothing_else(python):
    done = python(BROKEN)
    said = [line for line in done.stderr.splitlines() if line.startswith("pareto: ")]
    assert len(said) == 1
    assert "is not as expected (AttributeError: module 'x' has no attribute 'y')" in said[0]
    assert "--kv-cache-dtype int4_per_head: vLLM 0." in done.stdout
    assert "pareto vllm-contract" in done.stdout


class KVQuantMode(enum.IntEnum):
    """As in vLLM 0.33.0, whose CUSTOM is another name of OCTAVE_K3V4."""

    NONE = 0
    OCTAVE_K3V4 = 12
    CUSTOM = 12


@pytest.fixture
def registry(monkeypatch):
    """The modules of vLLM 0.33 that have to do with names of dtypes, as far as the plugin knows them."""
    handlers, known, sizes = {}, ["auto", "fp8"], {}

    def register_kv_cache_dtype(name):
        def decorate(cls):
            known.append(name)
            handlers[name] = cls()
            sizes[name] = handlers[name].torch_dtype()
            return cls

        return decorate

    def is_known_kv_cache_dtype(name):
        return name in known

    modules = {
        "vllm.config.cache": {
            "KV_CACHE_DTYPES": known,
            "register_kv_cache_dtype": register_kv_cache_dtype,
            "is_known_kv_cache_dtype": is_known_kv_cache_dtype,
        },
        "vllm.v1.attention.selector": {"is_known_kv_cache_dtype": is_known_kv_cache_dtype},
        "vllm.v1.kv_cache_interface": {"KVQuantMode": KVQuantMode},
        "vllm.utils.torch_utils": {"STR_DTYPE_TO_TORCH_DTYPE": sizes},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    for module in (compat, dtype_names):
        monkeypatch.setattr(module, "vllm_release", lambda: "0.33")
    return types.SimpleNamespace(handlers=handlers, known=known, sizes=sizes)


def test_where_vllm_has_a_registry_of_dtypes_it_is_used(registry):
    dtype_names.add_dtypes()
    dtype_names.add_dtypes()
    assert registry.known == ["auto", "fp8", *DTYPES]
    assert dtype_names.known_dtypes() == ("auto", "fp8", *DTYPES)
    assert [registry.handlers[name].name for name in DTYPES] == list(DTYPES)
    assert registry.sizes == dict.fromkeys((*DTYPES, *LAYER_FORMATS), torch.uint8)


def test_the_registry_is_not_told_a_mode_that_it_takes_for_another(registry):
    dtype_names.add_dtypes()
    assert KVQuantMode.CUSTOM is KVQuantMode.OCTAVE_K3V4
    for handler in registry.handlers.values():
        assert handler.quant_mode() is KVQuantMode.NONE


def test_only_the_choice_of_a_backend_knows_the_names_of_layers(registry):
    dtype_names.add_dtypes()
    knows = sys.modules["vllm.v1.attention.selector"].is_known_kv_cache_dtype
    assert all(knows(name) for name in ("auto", *DTYPES, *LAYER_FORMATS))
    assert not knows("mixed_k4v5")
    assert not compat.is_known_kv_cache_dtype("mixed_k4v3")
