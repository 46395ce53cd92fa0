"""Runs AutoAWQ in its own environment. Written for AutoAWQ 0.2.9 (https://github.com/casper-hansen/AutoAWQ).

Everything that the job does not say is that tool's default. The checkpoint is written in AWQ's gemm layout: 4 bits with
zero-points.
"""

from __future__ import annotations

from typing import Any

from runner_job import Job

# Sequences that run side by side; the tool's default runs all at once.
BATCH = 8


def quantizer_class() -> Any:
    """Return the tool's quantizer without its aliasing: it keeps ``v.cpu()`` of the weights that it then scales.

    On the CPU that is no copy, so every candidate of the scale search would change the weights for good.
    """
    from awq.quantize.quantizer import AwqQuantizer

    class Quantizer(AwqQuantizer):
        def _compute_best_scale(
            self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *args: Any, **kwargs: Any
        ) -> Any:
            state_dict = module2inspect.state_dict

            def copied(*a: Any, **k: Any) -> dict[str, Any]:
                return {name: value.clone() for name, value in state_dict(*a, **k).items()}

            module2inspect.state_dict = copied
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *args, **kwargs)
            finally:
                del module2inspect.state_dict

    return Quantizer


def main() -> None:
    """Perform the job."""
    job = Job()
    job.tell("starting AutoAWQ")
    import torch
    from awq import AutoAWQForCausalLM

    torch.manual_seed(job["seed"])
    tokens = job.tokens()
    job.start_clock()
    job.tell("loading the model")
    model = AutoAWQForCausalLM.from_pretrained(job["model"], torch_dtype=job.dtype(), device_map=job["device"])
    settings = {"zero_point": True, "q_group_size": job["group_size"], "w_bit": job["bits"], "version": "GEMM"}
    model.quantize(
        None,
        quant_config=settings,
        calib_data=tokens.tolist(),
        max_calib_samples=len(tokens),
        max_calib_seq_len=tokens.shape[1],
        n_parallel_calib_samples=BATCH,
        quantizer_cls=quantizer_class(),
    )
    job.tell("writing the checkpoint")
    model.save_quantized(job["out"])
    job.finish(
        ["autoawq", "torch", "transformers"], ["the scale search keeps copies of the weights, not their aliases"]
    )


if __name__ == "__main__":
    main()
