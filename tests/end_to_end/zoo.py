"""Small random models with the shapes of what people run: one for each kind of decoder that vLLM has a class for.

A family is one entry; ``docs/models.md`` is made of them (``tests/support_table.py``).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.end_to_end.engines import REF_7M

_SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1}


@dataclass(frozen=True)
class Family:
    """A kind of decoder.

    Attributes:
        name: of transformers' classes, ``{name}Config`` and ``{name}ForCausalLM``.
        models: what people know it by.
        kind: what is special about its attention.
        settings: of the configuration, beside the common ones.
        refused: what the line says that refuses its KV dtypes; empty if they are served.
        quick: whether it is tested in every run, not by ``make test-long`` alone.

    """

    name: str
    models: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    quick: bool = False

    def write(self, folder: Path) -> Path:
        """Write its random weights and a tokenizer."""
        import torch
        import transformers

        torch.manual_seed(0)
        model = self.model_class(getattr(transformers, f"{self.name}Config")(**(_SHAPE | self.settings)))
        model.float().eval().save_pretrained(folder)
        for path in REF_7M.glob("token*"):
            shutil.copy(path, folder)
        return folder

    @property
    def noise(self) -> float:
        """Return what share of another context's effect codes of 8 bits may have: more where they change the choice of
        experts, which a random router decides by very little.
        """
        return 0.15 if MIXTURE in self.kind else 0.05

    @property
    def model_class(self) -> Any:
        """transformers' class."""
        import transformers

        for kind in ("ForCausalLM", "LMHeadModel"):
            if hasattr(transformers, self.name + kind):
                return getattr(transformers, self.name + kind)
        raise AttributeError(f"transformers has no causal {self.name}")


GROUPED, WINDOWS, MIXTURE = "grouped-query attention", "sliding windows in some layers", "mixture of experts"
FAMILIES = [
    Family("Llama", "Llama 2 and 3, SmolLM2, Yi, Mistral 7B v0.3 and later", GROUPED),
    Family("Mistral", "Mistral 7B v0.1", "a sliding window in all layers", {"sliding_window": 100}),
    Family("Qwen2", "Qwen2, Qwen2.5", "biases of keys", quick=True),
    Family("Qwen3", "Qwen3", "normalized keys", {"head_dim": 64}),
    Family("Phi3", "Phi-3, Phi-4", "fused projections"),
    Family("Gemma", "Gemma", GROUPED, {"head_dim": 64}),
    Family(
        "Gemma2", "Gemma 2", f"soft caps, {WINDOWS}",
        {"head_dim": 64, "sliding_window": 100, "query_pre_attn_scalar": 64}, quick=True,
    ),
    Family("Olmo2", "OLMo 2", "keys normalized over all heads"),
    Family("Olmo3", "OLMo 3", f"keys normalized over all heads, {WINDOWS}", {"sliding_window": 100}),
    Family("Granite", "Granite 3", GROUPED),
    Family("GraniteMoe", "Granite 3 MoE", MIXTURE, {"num_local_experts": 4}),
    Family("Cohere", "Command R", "interleaved rotary embedding"),
    Family("Cohere2", "Command R7B, Command A", f"{WINDOWS}, no positions in others", {"sliding_window": 100}),
    Family("StableLm", "StableLM 2", "a quarter of the channels turned", {"partial_rotary_factor": 0.25}),
    Family("Starcoder2", "StarCoder2", GROUPED),
    Family("SmolLM3", "SmolLM3", "no positions in every fourth layer"),
    Family("Glm4", "GLM-4", "half of the channels turned, interleaved", {"head_dim": 64}),
    Family("Exaone4", "EXAONE 4", f"{WINDOWS}, no positions in others", {"sliding_window": 100}),
    Family("Ernie4_5", "ERNIE 4.5", "interleaved rotary embedding"),
    Family("SeedOss", "Seed-OSS", GROUPED, {"head_dim": 64}),
    Family("Nemotron", "Nemotron 4, Minitron", "half of the channels turned"),
    Family("Phi", "Phi-1.5, Phi-2", "half of the channels turned"),
    Family("GPTNeoX", "Pythia, GPT-NeoX", "a quarter of the channels turned", {"num_key_value_heads": 4}),
    Family("GPT2", "GPT-2", "learned positions", refused="not a supported decoder"),
    Family("OPT", "OPT", "learned positions", {"num_key_value_heads": 4, "word_embed_proj_dim": 256}),
    Family("Falcon", "Falcon", "one key head", refused="not a supported decoder"),
    Family("GPTBigCode", "StarCoder", "learned positions, one key head", refused="not a supported decoder"),
    Family("Bloom", "BLOOM", "ALiBi", refused="not a supported decoder"),
    Family("Mixtral", "Mixtral", MIXTURE, {"num_local_experts": 4}),
    Family("Qwen2Moe", "Qwen1.5-MoE, Qwen2-57B-A14B", MIXTURE, {**_EXPERTS, "shared_expert_intermediate_size": 64}),
    Family("Qwen3Moe", "Qwen3-30B-A3B, Qwen3-235B-A22B", MIXTURE, {**_EXPERTS, "head_dim": 64}, quick=True),
    Family("Olmoe", "OLMoE", MIXTURE, _EXPERTS),
    Family("Glm4Moe", "GLM-4.5, GLM-4.6", f"{MIXTURE}, half of the channels turned", {**_ROUTED, "head_dim": 64}),
    Family("Dots1", "dots.llm1", MIXTURE, {**_ROUTED, "n_shared_experts": 1}),
    Family("HunYuanDenseV1", "Hunyuan dense", "keys normalized after they are turned", {"head_dim": 64}),
    Family("Arcee", "AFM", GROUPED),
    Family("Apertus", "Apertus", "normalized keys"),
]  # fmt: skip
