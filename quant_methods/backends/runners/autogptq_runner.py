"""Runs AutoGPTQ in its own environment. Written for AutoGPTQ 0.7.1 (https://github.com/AutoGPTQ/AutoGPTQ).

Everything that the job does not say is that tool's default. The checkpoint is written in the GPTQ layout (v1).
"""

from __future__ import annotations

import logging
import re
from typing import Any

from runner_job import Job


class Watch(logging.Handler):
    """Tells the parent what the tool logs of its way through the layers; it draws no bar there."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    def emit(self, record: logging.LogRecord) -> None:
        """Tell of one record."""
        if found := re.match(r"Start quantizing layer (\d+)/(\d+)", record.getMessage()):
            self.job.tell("layers", int(found[1]) - 1, int(found[2]))


def shim() -> list[str]:
    """Let the tool quantize on the CPU, where it asks for CUDA, and say what was changed."""
    import torch
    from auto_gptq.modeling import _base

    def nothing(*_: Any, **__: Any) -> None:
        """Wait for nothing."""

    _base.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = nothing
    return ["layers stay on the CPU instead of cuda:0", "torch.cuda.synchronize does nothing"]


def main() -> None:
    """Perform the job."""
    job = Job()
    job.tell("starting AutoGPTQ")
    import torch
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(job["seed"])
    logging.getLogger("auto_gptq.modeling._base").addHandler(Watch(job))
    shims = shim() if job["device"] == "cpu" else []
    tokens = job.tokens()
    job.start_clock()
    job.tell("loading the model")
    kind = AutoConfig.from_pretrained(job["model"]).model_type
    if kind not in GPTQ_CAUSAL_LM_MODEL_MAP:
        raise SystemExit(f"AutoGPTQ does not know models of type {kind}")
    settings = BaseQuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["symmetric"],
        desc_act=job["act_order"],
        damp_percent=job["damping"],
    )
    # The tool's own from_pretrained refuses to load without CUDA; all that it does besides is this.
    model = AutoModelForCausalLM.from_pretrained(job["model"], torch_dtype=job.dtype()).eval()
    wrapped = GPTQ_CAUSAL_LM_MODEL_MAP[kind](model, False, settings)
    examples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    wrapped.quantize(examples, cache_examples_on_gpu=False)
    job.tell("writing the checkpoint")
    wrapped.save_quantized(job["out"], use_safetensors=True)
    job.finish(["auto-gptq", "peft", "torch", "transformers"], shims)


if __name__ == "__main__":
    main()
