"""vLLM serves what compress writes: every layout of the CPU in one checkpoint a format, in one engine each."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress
from quant_methods.methods.awq import AWQ
from quant_methods.methods.gptq import GPTQ
from quant_methods.methods.rtn import RTN
from quant_methods.methods.smoothquant import SmoothQuant
from quant_methods.model_source import resolve_model
from quant_methods.recipe import Calibration, Recipe, Serving, Step
from tests.quant_methods.random_layers import Parts

# Scales moved into norms and layers, and one layout for each of ref-7m's six blocks.
LAYOUTS: tuple[Step, ...] = (
    SmoothQuant(targets=("model.layers.5.*",)),
    AWQ(targets=("model.layers.3.*", "model.layers.4.*")),
    GPTQ(bits=4, group_size=128, symmetric=False, targets=("model.layers.0.*",)),
    GPTQ(bits=4, group_size=32, symmetric=True, targets=("model.layers.1.*",)),
    GPTQ(bits=4, group_size=64, symmetric=False, act_order=False, targets=("model.layers.2.*",)),
    RTN(bits=4, group_size=-1, symmetric=True, targets=("model.layers.3.*",)),
    RTN(bits=4, group_size=-1, symmetric=False, targets=("model.layers.4.*",)),
    RTN(bits=8, group_size=-1, symmetric=True, activations="int8", targets=("model.layers.5.*",)),
)


# The same for the format of ours: bits, tables, columns, sparse and low-rank parts, rounded activations. Of these only
# a few layers: rounding turns a last bit of bfloat16 into a whole step. In PyTorch alone, the reference in bfloat16
# differs from itself in float32 by 0.016 without rounded activations, by 0.036 as below, by 0.081 with 6-bit
# activations in all of block 1.
OUR_LAYOUTS: tuple[Step, ...] = (
    Parts(bits=3, group_size=32, symmetric=False, product=4, targets=("model.layers.0.*",)),
    Parts(bits=6, group_size=64, activations="int6", targets=("model.layers.1.self_attn.o_proj",)),
    Parts(bits=6, group_size=64, targets=("model.layers.1.*",)),
    Parts(bits=2, group_size=32, symmetric=False, columns=16, targets=("model.layers.2.*",)),
    Parts(bits=3, group_size=-1, table=True, sparse=True, columns=3, targets=("model.layers.3.*",)),
    Parts(bits=8, group_size=-1, columns=4, column_bits=8, activations="int8", targets=("model.layers.4.*",)),
    Parts(bits=4, group_size=64, symmetric=False, activations="int8", targets=("model.layers.5.mlp.*",)),
    Parts(bits=5, group_size=32, sparse=True, columns=5, column_bits=8, product=2, targets=("model.layers.5.*",)),
)


@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(("layouts", "plugin"), [(LAYOUTS, False), (OUR_LAYOUTS, True)], ids=["standard", "ours"])
@pytest.mark.usefixtures("parts_handled")
def test_vllm_computes_what_the_dequantized_model_computes(
    tmp_path: Path, layouts: tuple[Step, ...], plugin: bool
) -> None:
    model_dir = resolve_model("ref-7m")
    recipe = Recipe("layouts", steps=layouts, calibration=Calibration(8, 64), kv_scales=False)
    report = compress(model_dir, recipe, tmp_path / "out")
    assert report.serving == Serving(("cpu", "cuda"), plugin)

    tokens = load_sequences(model_dir, None, 4, 96, split="evaluation")

    @torch.no_grad()
    def score(checkpoint: Path) -> torch.Tensor:
        logits = load_reference(checkpoint)(tokens).logits[:, :-1].log_softmax(-1)
        return logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)

    original, expected = score(model_dir), score(tmp_path / "out")

    (tmp_path / "tokens.json").write_text(json.dumps(tokens.tolist()))
    script = Path(__file__).with_name("engine_logprobs.py")
    command = [
        sys.executable,
        str(script),
        str(tmp_path / "out"),
        str(tmp_path / "tokens.json"),
        str(tmp_path / "s.json"),
    ]
    # By default vLLM's CPU kernel rounds the activations of 4-bit layers to 8 bits too, where the CPU has AMX.
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_INT4_W4A8": "0", "VLLM_PLUGINS": "pareto" if plugin else ""}
    run = subprocess.run(
        command, env={**os.environ, **settings}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    served = torch.tensor(json.loads((tmp_path / "s.json").read_text()))

    noise = (served - expected).abs().mean().item()
    damage = (original - expected).abs().mean().item()
    print(f"mean |difference| of log-probabilities: served {noise:.4f}, quantization itself {damage:.4f}")
    # bfloat16 arithmetic alone moves log-probabilities by about 0.01, and by more where activations are rounded; a
    # misread layout moves them by several.
    assert noise < (0.08 if plugin else 0.05)
    assert noise < 0.3 * damage
