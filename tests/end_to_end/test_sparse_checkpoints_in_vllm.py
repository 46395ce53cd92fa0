"""Sparse checkpoints of others in an engine: greedy answers are those of the dense model with the same weights."""

import pytest

from tests.end_to_end.engines import VOCABULARY, engine, environment, prompts, run, write_model
from tests.quant_methods.sparse_writer import write_sparse

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("kind", "dtype", "apart"), [("bitmask-24", "float32", 1e-4), ("marlin-4", "bfloat16", 0.15)])
def test_greedy_answers_are_those_of_the_dense_model(kind, dtype, apart, tmp_path):
    write_model(tmp_path / "model")
    found = []
    for folder in write_sparse(tmp_path / "model", tmp_path, kind):
        with (
            environment(VLLM_CPU_INT4_W4A8="0"),  # vLLM's kernel rounds activations else.
            engine(folder, dtype=dtype, skip_tokenizer_init=True) as llm,
        ):
            found.append(run(llm, prompts(3, 24, vocabulary=VOCABULARY), 8))
    alike = []
    for (tokens, logprobs), (expected, dense) in zip(*found, strict=True):
        same = next((i for i, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) > 1), len(tokens))
        # Where bfloat16 decides between two tokens that are as likely as each other, what follows is another text.
        assert logprobs[: same + 1] == pytest.approx(dense[: same + 1], abs=apart)
        alike.append(same)
    assert sum(alike) == 24 if dtype == "float32" else sum(alike) >= 12
