"""An adapter that learnt over codes, served by vLLM over the same checkpoint, and merged into it."""

import dataclasses

import pytest
import torch

from quant_methods.checkpoints.reference import load_reference
from quant_methods.finetuning.job import Job, finetune
from quant_methods.finetuning.load import load_coded
from tests.end_to_end.engines import engine, environment, prompts
from tests.quant_methods.finetuning.test_job import SETTINGS, chats  # noqa: F401

NEW = 16
CUDA = torch.cuda.is_available()
on_cpu = pytest.mark.skipif(CUDA, reason="vLLM serves on the CUDA device here")
on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("device", "merged"),
    [
        pytest.param("cpu", False, marks=on_cpu),
        pytest.param("cpu", True, marks=[on_cpu, pytest.mark.long]),
        pytest.param("cuda", False, marks=on_cuda),
        pytest.param("cuda", True, marks=on_cuda),
    ],
)
def test_vllm_puts_out_what_the_training_model_does(coded_model, chats, tmp_path, device, merged):  # noqa: F811
    """Over every kind of part; the adapter changes the log-probabilities by far more than bfloat16 does."""
    from peft import PeftModel
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    out = tmp_path / "out"
    settings = dataclasses.replace(SETTINGS, steps=8, save_steps=4)
    finetune(Job(coded_model, chats, out, settings, merged=merged, device=device))
    adapter = out / "adapter" if merged else out
    more = {} if merged else {"enable_lora": True, "max_lora_rank": 8}
    if CUDA:  # So little that others may use the device too.
        more |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 128 << 20}
    texts = prompts(4, 48, seed=3, vocabulary=8192)
    with (
        environment(VLLM_CPU_INT4_W4A8="0"),
        engine(
            out if merged else coded_model,
            "auto",
            dtype="bfloat16",
            max_num_batched_tokens=96,
            max_model_len=128,
            **more,
        ) as llm,
    ):  # fmt: skip
        outputs = llm.generate(
            [{"prompt_token_ids": text} for text in texts],
            SamplingParams(max_tokens=NEW, temperature=1, ignore_eos=True, logprobs=0, detokenize=False),
            lora_request=None if merged else LoRARequest("tuned", 1, str(adapter)),
            use_tqdm=False,
        )
    made = [list(output.outputs[0].token_ids) for output in outputs]
    served = torch.tensor([
        [step[token].logprob for step, token in zip(output.outputs[0].logprobs, ids, strict=True)]
        for output, ids in zip(outputs, made, strict=True)
    ])  # fmt: skip
    tokens = torch.tensor([text + ids for text, ids in zip(texts, made, strict=True)])

    def wanted(model):
        with torch.no_grad():
            scores = model(tokens).logits[:, -NEW - 1 : -1].float().log_softmax(-1)
        return scores.gather(2, tokens[:, -NEW:, None]).squeeze(2)

    base = load_coded(coded_model)
    without = wanted(base)
    trained = wanted(PeftModel.from_pretrained(base, adapter).eval())
    in_16_bits = wanted(PeftModel.from_pretrained(load_coded(coded_model, dtype=torch.bfloat16), adapter).eval())
    if merged:
        # What merging rounds is little beside what was learnt; serving is held against what was merged.
        before, trained = trained, wanted(load_reference(out))
        assert (trained - before).abs().mean() < 0.1 * (without - before).abs().mean()
    error = (served - trained).abs().mean()
    # What bfloat16 does to the training model itself is the measure; doubled, since engines round in other places.
    assert error < 2 * (in_16_bits - trained).abs().mean() + 0.01
    assert error < 0.2 * (without - trained).abs().mean()
