"""Runs a model whose attention reads its keys and values through a coder, and compares it with full precision.

The model runs in float32. Each layer's attention shows its keys and values to the coder and attends to what the coder
returns (kv_cache/simulate). Windows start at position 0, and all tokens of a window are computed at once: a query at
position t sees what a server would read from its cache in the step that computes token t, if that server had computed
the tokens one after the other.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from kv_cache.rotary import Rotary
from kv_cache.simulate.attention import attend
from kv_cache.simulate.coder import Coder, Decoded, Run, Sample, Shape
from quant_methods.calibration.kv_observer import (
    ATTENTION,
    AttentionCall,
    kv_geometry,
    kv_rotary,
    observing,
    value_metric,
)
from quant_methods.calibration.text_source import quiet_transformers

QUERIES = 256
"""Queries kept of each calibration window."""
FIRST_TOKENS = 256
"""Tokens of the calibration text that are run as texts of one token, to see many keys at position 0."""
LOGIT_TOKENS = 1024
"""Positions whose logits are in memory at once."""

Side = tuple[int, str]
"""A layer and "key" or "value"."""


@dataclass(frozen=True)
class Loss:
    """What a coder cost in each window.

    Attributes:
        kl: KL divergence of the coded model's next-token distribution from full precision's, nats per token.
        top1: share of positions where both put the same token first.
        nll: negative log-likelihood of the window, nats per token.

    """

    kl: list[float]
    top1: list[float]
    nll: list[float]


class _Collector:
    """Gathers calibration samples; an observer of the attention hook."""

    def __init__(self, layers: int, seed: int) -> None:
        self.seed = seed
        self.query_positions: Tensor | None = None
        self.scaling = 1.0
        self.parts: list[dict[str, list[Tensor]]] = [
            {"query": [], "key": [], "value": [], "first_key": []} for _ in range(layers)
        ]

    def attend(self, call: AttentionCall) -> Tensor:
        """Keep what the model attends to."""
        parts = self.parts[call.layer]
        query, key, value = (x.transpose(1, 2).float() for x in (call.query, call.key, call.value))
        self.scaling = call.scaling
        parts["first_key"].append(key[:, 0])
        tokens = key.shape[1]
        if tokens > 1:
            if self.query_positions is None:
                drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(self.seed))
                self.query_positions = drawn[:QUERIES].sort().values.to(key.device)
            parts["query"].append(query[:, self.query_positions])
            parts["key"].append(key)
            parts["value"].append(value)
        return call.sdpa(call.key, call.value)


class _Coding:
    """Puts a coder between the model and its cache; an observer of the attention hook."""

    def __init__(self, coder: Coder, only: Collection[Side] | None, run: Run) -> None:
        self.coder, self.only, self.run = coder, only, run

    def attend(self, call: AttentionCall) -> Tensor:
        """Attend to what the coder returns."""
        if call.mask is not None:
            raise ParetoError("this model's layers do not see all earlier tokens: the study has no coders for such")
        query, key, value = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        decoded = self.coder.code(call.layer, key, value, self.run)
        self.run.before = decoded
        if self.only is not None:
            decoded = Decoded(
                decoded.key if (call.layer, "key") in self.only else key,
                decoded.value if (call.layer, "value") in self.only else value,
                decoded.coded_keys,
                decoded.coded_values,
            )
        return attend(query, key, value, decoded, call.scaling)


class _Keeper:
    """Keeps every layer's keys and values; an observer of the attention hook."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor]] = []

    def attend(self, call: AttentionCall) -> Tensor:
        """Keep them and attend as usual."""
        self.kept.append((call.key.transpose(1, 2), call.value.transpose(1, 2)))
        return call.sdpa(call.key, call.value)


class StudiedModel:
    """A model in float32, its calibration samples, and what it says of the test windows in full precision.

    Memory, on the device: the weights, and of each calibration token all layers' keys and values, 8 * layers * KV
    heads * head_dim bytes (46 KB for SmolLM2-135M: 3 GB for 32 x 2,048 tokens).
    """

    def __init__(self, folder: Path, device: str, batch_tokens: int = 16384) -> None:
        """Load a model.

        Args:
            folder: of the checkpoint.
            device: torch device.
            batch_tokens: tokens that go through the model at once, at least one window.

        Raises:
            ParetoError: transformers cannot load it, or it has attention sinks.

        """
        from transformers import AutoModelForCausalLM

        torch.backends.cuda.matmul.allow_tf32 = False
        self.device, self.batch_tokens = torch.device(device), batch_tokens
        try:
            with quiet_transformers():
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=ATTENTION)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ParetoError(f"{folder}: transformers cannot load this model ({reason})") from error
        self.model: Any = model.to(self.device).eval().requires_grad_(False)
        self.decoder: Any = self.model.get_decoder()
        if any(getattr(module, "sinks", None) is not None for module in self.decoder.modules()):
            raise ParetoError(f"{folder}: this model has attention sinks: the study has no coders for such")
        self.shape = Shape(*kv_geometry(self.model.config))
        self.samples: list[Sample] = []
        self.windows = torch.empty(0)
        self.reference: list[Tensor] = []
        self.reference_nll: list[float] = []

    @property
    def rotary(self) -> Rotary:
        """The model's rotary embedding; one that turns nothing where it has none."""
        config = self.model.config
        found = kv_rotary(self.decoder, config)
        return found or Rotary.over(self.shape.head_dim, None, getattr(config, "max_position_embeddings", 2048))

    def _hidden(self, tokens: Tensor) -> Tensor:
        return self.decoder(tokens.to(self.device), use_cache=False).last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return what the model makes of hidden states [tokens, width]: float32 [tokens, vocabulary].

        The model's own forward is used, its decoder replaced, since models scale and cap logits in ways of their own.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPast

        def decoder(*_: Any, **__: Any) -> BaseModelOutputWithPast:
            return BaseModelOutputWithPast(last_hidden_state=hidden[None])

        self.decoder.forward = decoder
        try:
            ignored = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.device)
            return self.model(input_ids=ignored).logits[0].float()
        finally:
            del self.decoder.forward

    def _batches(self, windows: Tensor) -> tuple[Tensor, ...]:
        return windows.split(max(1, self.batch_tokens // windows.shape[1]))

    @torch.no_grad()
    def calibrate(self, windows: Tensor, seed: int = 0) -> None:
        """Gather every layer's sample.

        Args:
            windows: int64 [windows, tokens] of calibration text.
            seed: of which queries and first tokens are looked at.

        """
        collector = _Collector(self.shape.layers, seed)
        drawn = torch.randperm(windows.numel(), generator=torch.Generator().manual_seed(seed))[:FIRST_TOKENS]
        with observing(collector):
            for batch in (*self._batches(windows), windows.flatten()[drawn][:, None]):
                self._hidden(batch)
        rotary, positions = self.rotary, collector.query_positions
        assert positions is not None
        self.samples = []
        for layer, parts in enumerate(collector.parts):
            joined = {}
            for name in list(parts):
                joined[name] = torch.cat(parts.pop(name))
            metric = value_metric(self.decoder.layers[layer], self.model.config)
            self.samples.append(
                Sample(
                    **joined,
                    query_positions=positions,
                    scaling=collector.scaling,
                    rotary=rotary,
                    value_metric=metric,
                )
            )

    @torch.no_grad()
    def refer(self, windows: Tensor) -> list[float]:
        """Run the test windows [windows, tokens] in full precision; returns each one's negative log-likelihood."""
        self.windows = windows
        self.reference = [hidden for batch in self._batches(windows) for hidden in self._hidden(batch)]
        self.reference_nll = []
        for tokens, hidden in zip(windows, self.reference, strict=True):
            total = 0.0
            for rows in torch.arange(len(tokens) - 1).split(LOGIT_TOKENS):
                chosen = tokens[rows + 1, None].to(self.device)
                total -= torch.log_softmax(self._logits(hidden[rows]), -1).gather(1, chosen).double().sum().item()
            self.reference_nll.append(total / (len(tokens) - 1))
        return self.reference_nll

    def finish(self) -> None:
        """Wait until the device has done all that it was given, so that times are of what was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def fit(self, coder: Coder) -> None:
        """Let a coder learn from every layer's sample."""
        for layer, sample in enumerate(self.samples):
            coder.fit(layer, sample)

    @torch.no_grad()
    def measure(self, coder: Coder, only: Collection[Side] | None = None) -> Loss:
        """Run the test windows through a fitted coder.

        Args:
            coder: fitted.
            only: the layers' sides that are coded, the others being as they were; None: all.

        """
        loss = Loss([], [], [])
        reference = iter(zip(self.windows, self.reference, strict=True))
        for batch in self._batches(self.windows):
            exact = None
            if coder.whole_pass:
                keeper = _Keeper()
                with observing(keeper):
                    self._hidden(batch)
                exact = keeper.kept
            with observing(_Coding(coder, only, Run(exact=exact))):
                coded = self._hidden(batch)
            for hidden in coded:
                self._compare(*next(reference), hidden, loss)
        return loss

    def _compare(self, tokens: Tensor, reference: Tensor, coded: Tensor, loss: Loss) -> None:
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for rows in torch.arange(len(tokens) - 1, device=self.device).split(LOGIT_TOKENS):
            before, after = (torch.log_softmax(self._logits(hidden[rows]), -1) for hidden in (reference, coded))
            chosen = tokens.to(self.device)[rows + 1, None]
            sums[0] += (before.exp() * (before - after)).sum(-1).double().sum()
            sums[1] += (before.argmax(-1) == after.argmax(-1)).double().sum()
            sums[2] -= after.gather(1, chosen).double().sum()
        kl, top1, nll = (sums / (len(tokens) - 1)).tolist()
        loss.kl.append(kl)
        loss.top1.append(top1)
        loss.nll.append(nll)
