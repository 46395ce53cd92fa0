"""Serves checkpoints one after another and writes their logits; run by serving.py, vLLM's settings in environment.

Each engine runs in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), so that its layers can be looked at, and so
that vLLM is imported once.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn


def main(answers: int) -> None:
    """Serve what each line of standard input names, and write a line to a descriptor when it is done.

    A line is a JSON list of a file with prompts, a folder to write to and checkpoints; the answer is whether all were
    served.
    """
    # An engine collects garbage seven times, which finds little among all that importing vLLM left: half of its time.
    gc.collect = lambda generation=2: 0  # type: ignore[assignment]
    with os.fdopen(answers, "w", buffering=1) as done:
        for line in sys.stdin:
            answer = json.dumps(serve(*json.loads(line)))
            sys.stdout.flush()
            print(answer, file=done)


def serve(tokens_file: str, out: str, *checkpoints: str) -> bool:
    """Write ``NAME.pt`` for each checkpoint directory ``NAME``; return whether all of them were served.

    It holds ``logits``, float32 [prompts, tokens - 1, vocabulary], of all prompt tokens but the last, and ``layers``,
    what each linear layer inside blocks runs on; or ``error``, if vLLM refused to start. ``plugin`` says whether the
    plugin was there.
    """
    from vllm import LLM

    prompts, served = json.loads(Path(tokens_file).read_text()), True
    for checkpoint in checkpoints:
        try:
            engine = LLM(
                checkpoint,
                max_model_len=128,
                max_num_seqs=1,
                enforce_eager=True,
                enable_prefix_caching=False,
                kv_cache_memory_bytes=1 << 24,
                skip_tokenizer_init=True,
                disable_log_stats=True,
                # Of what is free, which other processes may use at the same time; memory is given.
                **({"gpu_memory_utilization": 0.02} if torch.cuda.is_available() else {}),
            )
        except Exception as error:
            result: dict[str, Any] = {"error": str(error)}
            served = False
        else:
            runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
            result = {"logits": logits(engine, runner.model, prompts), "layers": look(runner.model)}
            engine.llm_engine.engine_core.shutdown()
            del engine, runner
        result["plugin"] = "vllm_ext" in sys.modules
        torch.save(result, Path(out) / f"{Path(checkpoint).name}.pt")
    return served


def logits(engine: Any, model: nn.Module, prompts: list[list[int]]) -> torch.Tensor:
    """Return what the model's head puts out for each prompt token but the last, [prompts, tokens - 1, vocabulary]."""
    from vllm import SamplingParams

    found: list[torch.Tensor] = []
    # Those of the last token, from which the next is drawn, come by themselves, and on CUDA here too.
    last = len(prompts[0]) - 1
    hook = model.logits_processor.register_forward_hook(
        lambda module, args, output: found.append(output[:last].float().cpu().clone()) if len(output) > 1 else None
    )
    settings = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0, detokenize=False)
    for prompt in prompts:
        engine.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
    hook.remove()
    return torch.stack(found)


def look(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return, for each linear layer inside blocks, its method, what multiplies, and its tensors' dtypes and sizes."""
    layers: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if ".layers." not in name or not hasattr(module, "output_size"):
            continue
        scheme = getattr(module, "scheme", None)
        parts = [scheme] if scheme is not None else [part.bulk for part in getattr(module, "served", [])]
        layers[name] = {
            "method": f"{type(module.quant_method).__module__}.{type(module.quant_method).__qualname__}",
            "by": [(type(part).__name__, type(getattr(part, "kernel", None)).__name__) for part in parts],
            "size": module.input_size * module.output_size,
            "tensors": {
                local: (str(tensor.dtype), tensor.numel())
                for local, tensor in [*module.named_parameters(), *module.named_buffers()]
            },
        }
    return layers


if __name__ == "__main__":
    main(int(sys.argv[1]))
    # Now and then a thread of vLLM's outlives the interpreter, which C++ answers by aborting the process.
    sys.stdout.flush()
    os._exit(0)
