"""Shows an observer the queries, keys and values of every attention layer of a transformers model.

transformers lets a model's attention be any registered function, which it calls with the tensors after rotary
embedding. The function here does what ``sdpa`` does and, while ``observing(...)`` is active, hands the tensors to the
observer; models that use transformers' attention interface need nothing else. An observer with ``attend`` is asked for
attention's output instead, and so can put other keys and values in the place of the model's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kv_cache.calibration import LayerShape
from kv_cache.decoder_layers import keeps_keys, layer_type
from kv_cache.errors import ParetoError
from kv_cache.formats import unserved_head_size
from kv_cache.rotary import Rotary

ATTENTION = "pareto_observed"
SINKS = "s_aux"
"""Under what name models of transformers hand sinks to their attention function."""
SOFT_CAP = "softcap"
"""Under what name they hand it the cap of logits."""


class Observer(Protocol):
    """What takes the tensors; ``kv_cache.calibration.KVCalibrator`` is one."""

    def observe(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> None:
        """Take a batch of sequences, each from its first position on.

        Args:
            layer: index of the decoder layer.
            query: [sequences, tokens, num_heads, head_dim] in the model's dtype, after rotary embedding, such that
                logits are ``q . k / sqrt(head_dim)``.
            key: [sequences, tokens, num_kv_heads, head_dim], after rotary embedding.
            value: [sequences, tokens, num_kv_heads, head_dim].
            mask: bool [sequences or 1, 1, tokens, tokens], what each token sees; None: all up to its own.
            sinks: [num_heads], a logit of each head that joins the sum in the softmax and brings no value; None: there
                are none.

        """


@dataclass(frozen=True)
class AttentionCall:
    """One call of a layer's attention, on a batch of sequences that start at their first position.

    Attributes:
        layer: index of the decoder layer.
        query: [sequences, num_heads, tokens, head_dim], after rotary embedding.
        key: [sequences, num_kv_heads, tokens, head_dim], after rotary embedding; ``value`` likewise.
        value: see ``key``.
        mask: bool, what each token sees, of a shape that broadcasts to [sequences, heads, tokens, tokens]. None:
            all up to its own.
        scaling: what ``q . k`` is multiplied by.
        module: the layer's attention module.
        options: what else the model handed on.

    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    module: torch.nn.Module
    options: dict[str, Any]

    def sdpa(self, key: Tensor, value: Tensor) -> Tensor:
        """Attend as the model would, but over these keys and values; [sequences, tokens, num_heads, head_dim]."""
        return _sdpa(self.module, self.query, key, value, self.mask, self.options)


@runtime_checkable
class Attention(Protocol):
    """An observer that computes attention itself."""

    def attend(self, call: AttentionCall) -> Tensor:
        """Return attention's output, [sequences, tokens, num_heads, head_dim]."""


_observers: list[tuple[Observer | Attention, Callable[[], object]] | None] = [None]
"""Those of the contexts that are entered, the newest last. All threads see them: on a GPU, blocks that run again on the
way back do so in a thread of autograd's."""


@contextlib.contextmanager
def observing(observer: Observer | Attention | None, after: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Show ``observer`` every attention call of models built with ``ATTENTION`` inside the context.

    Args:
        observer: what takes the tensors, or computes attention itself; None: nothing does.
        after: called when a batch has been shown to an observer, before its attention is computed.

    """
    _observers.append(None if observer is None else (observer, after))
    try:
        yield
    finally:
        _observers.pop()


def _sdpa(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Compute ``sdpa`` attention, which knows no sinks and no soft caps; [batch, tokens, heads, head_dim].

    A sink becomes one more token, before all others, that all see. Its value is 0, and so is its key but for a channel
    that is added to all heads, in which other keys are 0 and queries are the sink divided by the logits' scaling.
    """
    if options.get(SOFT_CAP):
        return _capped(query, key, value, mask, options)
    if (sinks := options.get(SINKS)) is None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    dim = query.shape[-1]
    scaling = options.get("scaling") or dim**-0.5
    # Channels in eights, as quick kernels ask for. A query more keeps each other one beside its own token.
    query, key, value = (torch.nn.functional.pad(x, (0, 8, 1, 0)) for x in (query, key, value))
    channel = torch.nn.functional.one_hot(torch.tensor(dim, device=query.device), dim + 8).to(query.dtype)
    query = query + (sinks.to(query.dtype) / scaling)[:, None, None] * channel
    key = torch.cat([channel.expand_as(key[:, :, :1]), key[:, :, 1:]], 2)
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (1, 0, 1, 0), value=mask.dtype == torch.bool)
    out = sdpa_attention_forward(module, query, key, value, mask, **{**options, "scaling": scaling})[0]
    return out[:, 1:, :, :dim]


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Compute attention whose logits x become ``c * tanh(x / c)`` (Gemma 2), one sequence and KV head at a time.

    Raises:
        ParetoError: there are sinks too, which no model that is known has.

    """
    if options.get(SINKS) is not None:
        raise ParetoError("attention with a soft cap and with sinks is not known here; KV scales cannot be calibrated")
    cap, scaling = options[SOFT_CAP], options.get("scaling") or query.shape[-1] ** -0.5
    tokens, group = query.shape[2], query.shape[1] // key.shape[1]
    past = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - tokens)
    seen = past[None, None] if (seen := _seen(mask)) is None else seen
    out = torch.empty_like(query)
    for sequence in range(query.shape[0]):
        shown = seen[min(sequence, seen.shape[0] - 1)]
        for head in range(key.shape[1]):
            rows = slice(head * group, (head + 1) * group)
            logits = query[sequence, rows] @ key[sequence, head].T * scaling
            logits = (cap * torch.tanh(logits / cap)).masked_fill(~shown, torch.finfo(logits.dtype).min)
            out[sequence, rows] = logits.softmax(-1, torch.float32).to(value.dtype) @ value[sequence, head]
    return out.transpose(1, 2)


def _seen(mask: Tensor | None) -> Tensor | None:
    """Return a mask of any kind as bool [sequences or 1, 1, tokens, tokens]: whether a token is seen."""
    if mask is None or mask.dtype == torch.bool:
        return None if mask is None else mask[:, :1]
    return mask[:, :1] > torch.finfo(mask.dtype).min / 2


def _observed_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute ``sdpa`` attention, with sinks; tensors are [batch, heads, tokens, head_dim]."""
    if getattr(module, "sinks", None) is not None and kwargs.get(SINKS) is None:
        raise ParetoError(f"{type(module).__name__} has attention sinks and does not say so to its attention function")
    if (found := _observers[-1]) is not None:
        observer, after = found
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise ParetoError(f"{type(module).__name__} does not know its layer; KV scales cannot be calibrated")
        if isinstance(observer, Attention):
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            call = AttentionCall(layer, query, key, value, attention_mask, scaling, module, kwargs)
            return observer.attend(call), None
        # Observers take logits to be q.k / sqrt(head_dim); a few models scale them otherwise.
        factor = (kwargs.get("scaling") or query.shape[-1] ** -0.5) * query.shape[-1] ** 0.5
        asked = query if abs(factor - 1) < 1e-6 else query * factor
        asked, shown_key, shown_value = (x.transpose(1, 2) for x in (asked, key, value))
        observer.observe(layer, asked, shown_key, shown_value, _seen(attention_mask), kwargs.get(SINKS))
        after()
    return _sdpa(module, query, key, value, attention_mask, kwargs), None


AttentionInterface.register(ATTENTION, _observed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def layer_config(config: Any, index: int) -> Any:
    """Return what a configuration says of one layer, where layers differ (Gemma 4); else the configuration itself."""
    return config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config


def kv_geometry(config: Any, index: int = 0) -> tuple[int, int, int]:
    """Return (layers, KV heads, head_dim) of a transformers configuration.

    Args:
        config: of the model's decoder.
        index: the layer whose heads are meant, in a model whose layers differ.

    """
    own = layer_config(config, index)
    heads = own.num_attention_heads
    kv_heads = getattr(own, "num_key_value_heads", None) or heads
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // heads
    return config.num_hidden_layers, kv_heads, head_dim


def unserved_kv(decoder: torch.nn.Module, config: Any) -> str | None:
    """Return what of a model no quantized KV cache serves, for the end of "... does not serve"; None if one does.

    Scales of such a model would be of no use: vLLM refuses to start with them (vllm_ext/startup.py). A model of which
    only some layers have heads of a size that no kernel serves keeps those in 16 bits.

    Args:
        decoder: transformers' decoder (``model.get_decoder()``).
        config: its configuration.

    """
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention"
    kept = [index for index in range(config.num_hidden_layers) if keeps_keys(config, index)]
    if not kept:
        return "models without attention"
    reasons = [unserved_head_size(kv_geometry(config, index)[2]) for index in kept]
    return None if None in reasons else reasons[0]


INTERLEAVED = frozenset({"cohere", "cohere2", "codegen", "ernie4_5", "glm", "glm4", "gptj", "helium"})
"""Model types whose rotary embedding turns channels 2i and 2i + 1 together; the others turn i and i + rotated / 2."""


def kv_rotary(decoder: torch.nn.Module, config: Any, index: int = 0) -> Rotary:
    """Return the rotary embedding of a decoder's layer; one that turns nothing where the decoder has none.

    Args:
        decoder: transformers' decoder (``model.get_decoder()``); its buffers may lie on the meta device.
        config: its configuration.
        index: of the layer; models whose layers are of several types (Gemma 3) have an embedding for each type.

    """
    _, _, head_dim = kv_geometry(config, index)
    embedding, frequencies = getattr(decoder, "rotary_emb", None), None
    name = next(
        (name for name in (f"{layer_type(config, index)}_inv_freq", "inv_freq") if hasattr(embedding, name)), None
    )
    if embedding is not None and name is not None:
        # The decoder was built without weights; frequencies follow from the configuration alone.
        frequencies = getattr(type(embedding)(config=config), name)
    interleaved = getattr(config, "model_type", "") in INTERLEAVED
    return Rotary.over(head_dim, frequencies, config.max_position_embeddings, interleaved)


def kv_shapes(decoder: torch.nn.Module, config: Any) -> list[LayerShape | None]:
    """Return what each layer's keys and values are like; None for layers that get no scales.

    Those are layers without attention, layers that read another layer's cache, and layers with heads of a size that
    no kernel serves. Layers of one type share one Rotary.
    """
    rotaries: dict[tuple[Any, ...], Rotary] = {}
    shapes: list[LayerShape | None] = []
    for index in range(config.num_hidden_layers):
        _, heads, dim = kv_geometry(config, index)
        if not keeps_keys(config, index) or unserved_head_size(dim):
            shapes.append(None)
            continue
        key = layer_type(config, index), dim
        if key not in rotaries:
            rotaries[key] = kv_rotary(decoder, config, index)
        shapes.append(LayerShape(heads, dim, rotaries[key]))
    return shapes


OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "wo")


def value_metric(block: torch.nn.Module, config: Any) -> Tensor | None:
    """Return what errors of a block's values cost: ``W_o^T W_o``, summed over the query heads of each KV head.

    Args:
        block: a decoder layer, loaded.
        config: of the model.

    Returns:
        float32 [num_kv_heads, head_dim, head_dim], or None for a block without an output projection of that shape.

    """
    _, kv_heads, head_dim = kv_geometry(config)
    heads = config.num_attention_heads
    for module in block.modules():
        for name, child in module.named_children():
            if not hasattr(module, "layer_idx") or name not in OUTPUT_PROJECTIONS or not hasattr(child, "weight"):
                continue
            weight = child.weight.detach().float()
            if weight.dim() == 2 and weight.shape[1] == heads * head_dim:
                split = weight.view(len(weight), kv_heads, heads // kv_heads, head_dim)
                return torch.einsum("ohgc,ohgd->hcd", split, split)
    return None
