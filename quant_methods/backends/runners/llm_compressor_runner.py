"""Runs llm-compressor's ``oneshot`` in its own environment: round-to-nearest, GPTQ, AWQ, SmoothQuant, SparseGPT, Wanda.

Written for llm-compressor 0.14 (https://github.com/vllm-project/llm-compressor). Everything that the job does not say
is that tool's default. The checkpoint is written as compressed-tensors.
"""

from __future__ import annotations

from typing import Any

from runner_job import Job


def modifiers(job: Job) -> list[Any]:
    """Return the recipe: an optional transformation or pruning, then the rounding, if any."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    first: list[Any] = []
    if job["prune"] is not None:
        # Its mask structure 0:0 is that of weights of any place.
        pruning: dict[str, Any] = {"sparsity": job["sparsity"], "ignore": job["ignore"], "targets": ["Linear"]}
        pruning["mask_structure"] = "0:0" if job["pattern"] == "any" else job["pattern"]
        if job["prune"] == "sparsegpt":
            first = [SparseGPTModifier(**pruning, dampening_frac=job["prune_damping"])]
        else:
            first = [WandaPruningModifier(**pruning)]
    if job["rounding"] is None:
        return first
    channel = job["group_size"] == -1
    weights: dict[str, Any] = {
        "num_bits": job["bits"],
        "type": "int",
        "symmetric": job["symmetric"],
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else job["group_size"],
    }
    scheme: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if job["activations"] == "int8":
        scheme["input_activations"] = {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
        }  # fmt: skip
    rounding: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": job["ignore"]}
    if job["transform"] == "awq":
        first = [AWQModifier()]
    elif job["transform"] == "smoothquant":
        first = [SmoothQuantModifier(**({} if job["alpha"] is None else {"smoothing_strength": job["alpha"]}))]
    if job["rounding"] == "rtn":
        return [*first, QuantizationModifier(**rounding)]
    order = "static" if job["act_order"] else None
    return [*first, GPTQModifier(**rounding, actorder=order, dampening_frac=job["damping"])]


def shim(device: str) -> list[str]:
    """Change what keeps the tool from running without a CUDA device, and say what."""
    if device != "cpu":
        return []
    from llmcompressor.pipelines.cache import IntermediatesCache

    def nothing(*_: Any, **__: Any) -> None:
        """Leave tensors where they are."""

    # AWQ pins its cached activations for copies to an accelerator, which fails where there is none.
    IntermediatesCache.pin_memory = nothing
    return ["IntermediatesCache.pin_memory does nothing: there is no accelerator to copy to"]


def main() -> None:
    """Perform the job."""
    job = Job()
    job.tell("starting llm-compressor")
    import torch
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    torch.manual_seed(job["seed"])
    recipe, shims, tokens = modifiers(job), shim(job["device"]), job.tokens()
    job.start_clock()
    job.tell("loading the model")
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job.dtype()).to(job["device"])
    arguments: dict[str, Any] = {"pipeline": "datafree"}
    if tokens is not None:
        samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
        loader = DataLoader(samples, batch_size=1)
        arguments = {"dataset": loader, "num_calibration_samples": len(samples)}
    oneshot(model=model, recipe=recipe, **arguments)
    job.tell("writing the checkpoint")
    model.save_pretrained(job["out"], save_compressed=True)
    job.finish(["llmcompressor", "compressed-tensors", "torch", "transformers"], shims)


if __name__ == "__main__":
    main()
