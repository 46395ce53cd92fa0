"""Models of every kind, calibrated at start-up and served with quantized KV caches, against transformers in float32."""

import pytest
import torch

from kv_cache.errors import ParetoError
from tests.end_to_end.engines import engine, prompts
from tests.end_to_end.zoo import FAMILIES

pytestmark = pytest.mark.engine
FAMILIES_TO_TEST = [
    pytest.param(family, id=family.name, marks=() if family.quick else pytest.mark.long) for family in FAMILIES
]
TOKENS, MOVED = 150, 100


def log_probabilities(family, folder, text):
    """What transformers says of each token but the first."""
    model = family.model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.tensor([text])).logits[0, :-1].double()
    return logits.log_softmax(-1)[torch.arange(len(text) - 1), torch.tensor(text[1:])]


def served(llm, text):
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": text}], params, use_tqdm=False)
    steps = output.prompt_logprobs[1:]
    return torch.tensor([step[token].logprob for step, token in zip(steps, text[1:], strict=True)]).double()


@pytest.mark.parametrize("family", FAMILIES_TO_TEST)
def test_family(family, tmp_path, monkeypatch):
    """Log-probabilities are near those of full precision, and far from those after a context in another order.

    Medians: where experts are chosen, a little noise changes the choice at a few tokens.
    """
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "cache"))
    folder = family.write(tmp_path / "model")
    settings = {"max_model_len": 256, "max_num_batched_tokens": 64}
    if family.refused:
        with pytest.raises(ParetoError, match=family.refused), engine(folder, "int8_per_head", **settings):
            pass
        return
    (text,) = prompts(1, TOKENS, seed=3)
    want = log_probabilities(family, folder, text)
    moved = log_probabilities(family, folder, text[:MOVED][::-1] + text[MOVED:])
    depends = (moved - want)[MOVED:].abs().median()
    with engine(folder, "int8_per_head", **settings) as llm:
        error = (served(llm, text) - want).abs().median()
    print(f"{family.name}: error {error:.4f}, of another context {depends:.4f}")
    assert error < family.noise * depends
