"""Cuts a student out of its teacher: the parts that do most are kept, in depth and in width.

Muralidharan et al. (Minitron, 2024), https://arxiv.org/abs/2407.14679, section 2.3; ``importance.py`` says what a part
does. Heads that share a key and a value go together: whole groups are cut first, then heads within the groups, as many
in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import quiet_transformers
from quant_methods.distillation.importance import Importance, blocks_of, influence, measure
from quant_methods.distillation.student import config_with

ROWS = {
    "self_attn.q_proj": "queries",
    "self_attn.k_proj": "keys",
    "self_attn.v_proj": "keys",
    "mlp.gate_proj": "channels",
    "mlp.up_proj": "channels",
    "self_attn.o_proj": "hidden",
    "mlp.down_proj": "hidden",
    "input_layernorm": "hidden",
    "post_attention_layernorm": "hidden",
    "self_attn.q_norm": None,
    "self_attn.k_norm": None,
}
"""By which part a block's parameters are cut along their first dimension; None: not at all."""
COLUMNS = {
    "self_attn.q_proj": "hidden",
    "self_attn.k_proj": "hidden",
    "self_attn.v_proj": "hidden",
    "mlp.gate_proj": "hidden",
    "mlp.up_proj": "hidden",
    "self_attn.o_proj": "queries",
    "mlp.down_proj": "channels",
}
"""The same, of weights, along their second."""


@dataclass(frozen=True)
class Sizes:
    """How much of a teacher is kept; None: all.

    Attributes:
        layers: blocks.
        heads: query heads.
        kv_heads: heads of keys and values.
        intermediate: channels of each MLP.
        hidden: channels of hidden states.

    """

    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    intermediate: int | None = None
    hidden: int | None = None

    @property
    def narrower(self) -> bool:
        """Whether the width is cut."""
        return any(x is not None for x in (self.heads, self.kv_heads, self.intermediate, self.hidden))

    def check(self, config: Any) -> None:
        """Refuse sizes that the teacher does not have, or heads that do not divide among their groups.

        Raises:
            ParetoError: such a size.

        """
        limits = {
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "intermediate": config.intermediate_size,
            "hidden": config.hidden_size,
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= limit:
                raise ParetoError(f"--keep-{name.replace('_', '-')} {value}: the teacher has {limit}")
        if not self.narrower:
            return
        kv = self.kv_heads or config.num_key_value_heads
        group = config.num_attention_heads // config.num_key_value_heads
        heads = self.heads or kv * group
        if heads % kv or heads > kv * group:
            allowed = ", ".join(str(kv * each) for each in range(1, group + 1))
            raise ParetoError(f"--keep-heads {heads} with {kv} heads of keys and values: possible are {allowed}")


def top(importance: Tensor, count: int) -> list[int]:
    """Return the places of the ``count`` largest numbers, in ascending order."""
    return sorted(importance.topk(count).indices.tolist())


def kept_heads(importance: Tensor, kv_heads: int, keep_kv: int, keep: int) -> tuple[list[int], list[int]]:
    """Return which query heads and which heads of keys and values are kept.

    Args:
        importance: [query heads].
        kv_heads: of the teacher.
        keep_kv: of the student.
        keep: query heads of the student.

    """
    groups = importance.unflatten(0, (kv_heads, -1))
    size = groups.shape[1]
    keys = top(groups.sum(1), keep_kv)
    queries = [key * size + place for key in keys for place in top(groups[key], keep // keep_kv)]
    return queries, keys


def cut(teacher: Any, sizes: Sizes, tokens: Tensor) -> Any:
    """Return a student, float32 on the CPU, with the weights of its teacher that matter most.

    Args:
        teacher: a model of transformers, with weights.
        sizes: of the student.
        tokens: int64 [sequences, length], text that the importance is measured on.

    Raises:
        ParetoError: sizes that make no sense, or a model that nobody knows how to cut.

    """
    from transformers import AutoModelForCausalLM

    config = teacher.config
    sizes.check(config)
    total = len(blocks_of(teacher))
    found = measure(teacher, tokens) if sizes.narrower else None
    turned = influence(teacher, tokens) if found is None else found.blocks
    layers = top(turned, sizes.layers or total)
    changes: dict[str, Any] = {}
    if found is not None:
        kv = sizes.kv_heads or config.num_key_value_heads
        heads = sizes.heads or kv * (config.num_attention_heads // config.num_key_value_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        changes = {
            "hidden_size": sizes.hidden or config.hidden_size,
            "intermediate_size": sizes.intermediate or config.intermediate_size,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": head_dim,
        }
    made = config_with(config, changes, layers)
    state = _state(teacher, layers, found, made)
    with quiet_transformers():
        student = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    missing, unexpected = student.load_state_dict(state, strict=False)
    tied = set(getattr(student, "all_tied_weights_keys", None) or {})
    if unexpected or set(missing) - tied:
        name = (unexpected or sorted(set(missing) - tied))[0]
        raise ParetoError(f"{type(teacher).__name__} cannot be cut: {name} has no counterpart in the student")
    student.tie_weights()
    return student


def _state(teacher: Any, layers: list[int], found: Importance | None, made: Any) -> dict[str, Tensor]:
    """Return the student's tensors by name."""
    names = {module: name for name, module in teacher.named_modules()}
    prefix = names[blocks_of(teacher)]
    hidden = None if found is None else top(found.hidden, made.hidden_size)
    places = {old: new for new, old in enumerate(layers)}
    parts = {old: _parts(old, found, made, teacher.config, hidden) for old in layers}
    state = {}
    for name, tensor in teacher.state_dict().items():
        value = tensor.detach().float().cpu()
        if not name.startswith(f"{prefix}."):
            # Embedding and head are [vocabulary, hidden]; the last norm is [hidden].
            state[name] = value if hidden is None or value.dim() == 0 else value[..., hidden]
            continue
        number, _, local = name.removeprefix(f"{prefix}.").partition(".")
        if int(number) in places:
            state[f"{prefix}.{places[int(number)]}.{local}"] = _narrowed(local, value, parts[int(number)])
    return state


def _parts(
    layer: int, found: Importance | None, made: Any, config: Any, hidden: list[int] | None
) -> dict[str, list[int]] | None:
    """Return which rows of what is kept in a layer."""
    if found is None or hidden is None:
        return None
    queries, keys = kept_heads(
        found.heads[layer], config.num_key_value_heads, made.num_key_value_heads, made.num_attention_heads
    )
    dim = made.head_dim

    def spread(heads: list[int]) -> list[int]:
        return [head * dim + channel for head in heads for channel in range(dim)]

    channels = top(found.channels[layer], made.intermediate_size)
    return {"queries": spread(queries), "keys": spread(keys), "channels": channels, "hidden": hidden}


def _narrowed(local: str, value: Tensor, parts: dict[str, list[int]] | None) -> Tensor:
    """Return what is kept of a block's parameter."""
    if parts is None:
        return value
    module = local.rpartition(".")[0]
    if module not in ROWS:
        raise ParetoError(
            f"nobody knows how to cut {module} narrower; models of Llama's kind can be, others with --keep-layers alone"
        )
    if (rows := ROWS[module]) is not None:
        value = value[parts[rows]]
    if value.dim() == 2 and module in COLUMNS:
        value = value[:, parts[COLUMNS[module]]]
    return value.contiguous()
