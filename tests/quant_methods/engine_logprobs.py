"""Prints the prompt log-probabilities that vLLM computes for a checkpoint; run as a script, for vLLM spawns workers."""

import json
import os
import sys


def main(checkpoint: str, tokens_file: str, out_file: str) -> None:
    """Write, as JSON, the log-probability of each prompt token after the first, one list a prompt."""
    from vllm import LLM, SamplingParams

    with open(tokens_file) as file:
        prompts = [{"prompt_token_ids": ids} for ids in json.load(file)]
    engine = LLM(checkpoint, max_model_len=512, enforce_eager=True, max_num_seqs=4)
    results = engine.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0))
    scores = []
    for result in results:
        pairs = zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True)
        scores.append([entry[token].logprob for token, entry in pairs])
    with open(out_file, "w") as file:
        json.dump(scores, file)
    engine.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Now and then a thread of vLLM's outlives the interpreter, which C++ answers by aborting the process.
    sys.stdout.flush()
    os._exit(0)
