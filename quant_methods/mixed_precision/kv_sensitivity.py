"""Measures what coding each layer's keys and values loses, at each width: what a KV budget is spent by.

The KL divergence of a model's output from what it was is quadratic in small errors: half of the sum of
``(J e)^T (diag(p) - p p^T) (J e)`` over positions, where e is the error, J the derivative of the logits, and p the
model's probabilities. That matrix is the Fisher information of the output, and it is the mean of ``u u^T`` over
``u = (I - p 1^T) diag(p)^1/2 z`` with random signs z. One backward pass of ``u . logits``, all positions having signs
of their own, so gives a gradient g at every layer's keys and values, such that ``(g . e)^2 / 2`` is on average the sum
of the divergences that e causes (Hutchinson 1990; KVQuant, Hooper et al. 2024, section 3.4, weighs errors of the cache
by a Fisher information too). The errors of different tokens and heads are nearly independent, so their squares are
added up one by one, which leaves far less to chance than the square of their sum.

Sequences differ in what codes cost them, some by fifty times the others (a script that the model hardly knows). Each
is scaled to what all codes together cost the median sequence, so that no few of them decide.

A pass forward and one backward so measure all layers at all widths, where coding one layer at one width and running
the model would take a pass for each. Blocks are loaded one at a time, and run again on the way back. An interrupted
measurement goes on from the gradient that was saved last.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kv_cache.scales import KVScales
from quant_methods.calibration.kv_codes import KINDS, LayerCodes
from quant_methods.calibration.kv_observer import AttentionCall, observing
from quant_methods.calibration.served import Served
from quant_methods.checkpoints.checkpoint import read_tensors, write_json, write_tensors
from quant_methods.checkpoints.quality import divergence
from quant_methods.mixed_precision.kv_budget import Losses


@dataclass(frozen=True)
class KVSettings:
    """How the loss of codes is measured.

    Attributes:
        sequences: of the calibration data, the last ones.
        seed: of the random signs.
        save_every: seconds between two savings of an unfinished measurement.

    """

    sequences: int = 8
    seed: int = 0
    save_every: float = 20.0


class _Gradients:
    """Keeps the keys and values of one attention call, with their gradients; an observer of the attention hook."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """Attend as the model does."""
        self.seen = {"key": call.key, "value": call.value}
        for tensor in self.seen.values():
            tensor.retain_grad()
        return call.sdpa(call.key, call.value)


class _Coded:
    """Lets attention read keys and values of one layer from codes; an observer of the attention hook.

    A token's own are read from codes too, which a server takes as they are: so a server loses about a tenth less.
    """

    def __init__(self, codes: LayerCodes, bits: tuple[int, int]) -> None:
        self.codes, self.bits = codes, bits

    def attend(self, call: AttentionCall) -> Tensor:
        """Attend to what is read."""
        read = []
        for kind, x, bits in zip(KINDS, (call.key, call.value), self.bits, strict=True):
            (error,) = self.codes.errors(kind, x.transpose(1, 2), (bits,))
            read.append(x + error.transpose(1, 2).to(x.dtype))
        return call.sdpa(*read)


OfSequences = dict[str, dict[int, list[float]]]
"""What one layer's codes cost each sequence, nats a token: by "key" and "value", then by bits."""


@dataclass
class _State:
    """How far a measurement is.

    Attributes:
        blocks: the first so many blocks are still to be measured.
        gradient: of what leaves the last of them, [sequences, length, width].
        losses: of the measured layers, by index: what each sequence loses, by kind and bits.

    """

    blocks: int
    gradient: Tensor
    losses: dict[int, OfSequences]


class KVSensitivity:
    """One measurement, taken up where an earlier one stopped.

    Args:
        model: whose KV cache is coded.
        scales: of its KV cache.
        widths: bits of codes to measure.
        settings: how.
        folder: where the state and the result are kept.
        key: SHA-256 of what determines the result, settings aside; files with another are not used.

    """

    def __init__(
        self, model: Served, scales: KVScales, widths: tuple[int, ...], *, settings: KVSettings, folder: Path, key: str
    ) -> None:
        self.model, self.scales, self.widths, self.settings = model, scales, widths, settings
        self.decoder = model.decoder
        self.tokens = model.tokens[-settings.sequences :]
        self.total = len(self.decoder.blocks)
        self.key = f"{key} {settings.sequences} {settings.seed} {widths}"
        self.state_file, self.result_file = folder / "kv-gradient.safetensors", folder / "kv-losses.json"

    def _codes(self, index: int) -> LayerCodes:
        return LayerCodes(self.scales.layer(index), self.decoder.device)

    def measure(self) -> list[Losses]:
        """Return every layer's losses in the typical sequence (`typical`), nats a token."""
        if self.result_file.is_file():
            found = json.loads(self.result_file.read_text())
            if found["key"] == self.key:
                return typical([_with_numbers(losses) for losses in found["losses"]])
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        state = self._saved()
        entering, last = self._forward(self.total if state is None else state.blocks)
        if state is None:
            state = _State(self.total, self._head_gradient(last), {})
        del last
        saved = time.monotonic()
        while state.blocks:
            index = state.blocks - 1
            self.model.progress(self.total - state.blocks, self.total, f"loss of KV codes, block {index + 1}")
            state.losses[index] = self._backward(index, entering.pop(), state.gradient)
            state.blocks = index
            if time.monotonic() - saved >= self.settings.save_every:
                self._save(state)
                saved = time.monotonic()
        losses = [state.losses[index] for index in range(self.total)]
        write_json(self.result_file, {"key": self.key, "losses": losses})
        self.state_file.unlink(missing_ok=True)
        return typical(losses)

    @torch.no_grad()
    def _forward(self, blocks: int) -> tuple[list[Tensor], Tensor]:
        """Return what enters each of the first blocks, and what leaves the last of them."""
        hidden = self.decoder.embed(self.tokens)
        entering = []
        for index in range(blocks):
            self.model.progress(0, self.total, f"loss of KV codes, forward through block {index + 1}/{self.total}")
            entering.append(hidden.clone())
            with self.model.loaded(index) as block:
                self.decoder.advance(index, block, hidden)
        return entering, hidden

    def _head_gradient(self, last: Tensor) -> Tensor:
        """Return the gradient of ``u . logits``, summed over positions, at what leaves the last block."""
        gradient = torch.empty_like(last)
        device = self.decoder.device
        with self.model.head() as head:
            for number in range(len(last)):  # One sequence at a time: logits are large.
                self.model.progress(0, self.total, f"loss of KV codes, output of sequence {number + 1}/{len(last)}")
                with torch.enable_grad():
                    hidden = last[number : number + 1].to(device).requires_grad_()
                    logits = head(hidden.float()).float()
                    generator = torch.Generator(device).manual_seed(self.settings.seed * 1_000_003 + number)
                    logits.backward(probe(logits.detach(), generator))
                assert hidden.grad is not None
                gradient[number] = hidden.grad[0]
        return gradient

    def _backward(self, index: int, entering: Tensor, gradient: Tensor) -> OfSequences:
        """Take the gradient back through a block, in place, and return its layer's losses."""
        codes, device = self._codes(index), self.decoder.device
        losses: OfSequences = {kind: {bits: [] for bits in self.widths} for kind in KINDS}
        with self.model.loaded(index) as block:
            for number in range(len(entering)):
                place = slice(number, number + 1)
                watcher = _Gradients()
                with torch.enable_grad(), observing(watcher):
                    hidden = entering[place].to(device).requires_grad_()
                    self.decoder.run(index, block, hidden).backward(gradient[place].to(device))
                assert hidden.grad is not None
                gradient[place] = hidden.grad
                for kind, tensor in watcher.seen.items():
                    assert tensor.grad is not None
                    slope = tensor.grad.transpose(1, 2).float()
                    errors = codes.errors(kind, tensor.detach().transpose(1, 2), self.widths)
                    for bits, error in zip(self.widths, errors, strict=True):
                        moved = (slope * error).sum(-1).double()
                        losses[kind][bits].append(moved.square().sum().item() / (2 * self.tokens.shape[1]))
        return losses

    @torch.no_grad()
    def joint(self, bits: list[tuple[int, int]]) -> float:
        """Return the KL divergence of the model with all layers coded from the model as it is.

        Args:
            bits: of each layer's keys and values.

        Returns:
            Nats a token, of the median sequence.

        """
        exact = self.decoder.embed(self.tokens)
        coded = exact.clone()
        for index, pair in enumerate(bits):
            self.model.progress(index, self.total, f"KL of the chosen bits, block {index + 1}/{self.total}")
            with self.model.loaded(index) as block:
                self.decoder.advance(index, block, exact)
                with observing(_Coded(self._codes(index), pair)):
                    for start, batch in self.decoder.batches(coded):
                        coded[start : start + len(batch)] = self.decoder.run(index, block, batch)
        found = []
        with self.model.head() as head:
            for number in range(len(exact)):
                pair_of = (head(x[number : number + 1].to(self.decoder.device).float()).float() for x in (exact, coded))
                expected, got = (logits.log_softmax(-1) for logits in pair_of)
                found.append(divergence(expected, got).double().mean().item())
        return max(statistics.median(found), 0.0)

    def _save(self, state: _State) -> None:
        about = {"key": self.key, "blocks": state.blocks, "losses": state.losses}
        write_tensors(self.state_file, {"gradient": state.gradient}, {"state": json.dumps(about)})

    def _saved(self) -> _State | None:
        """Return the state of an interrupted measurement of the same."""
        if not self.state_file.is_file():
            return None
        tensors, metadata = read_tensors(self.state_file)
        about = json.loads(metadata["state"])
        if about["key"] != self.key:
            return None
        losses = {int(index): _with_numbers(found) for index, found in about["losses"].items()}
        return _State(about["blocks"], tensors["gradient"], losses)


def probe(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return random u such that the mean of ``u u^T`` is the Fisher information of each position's distribution.

    Args:
        logits: float32 [..., vocabulary].
        generator: on the logits' device.

    """
    p = logits.softmax(-1)
    signs = torch.randint(0, 2, p.shape, generator=generator, device=p.device, dtype=torch.int8)
    u = p.sqrt() * (2 * signs - 1)
    return u - p * u.sum(-1, keepdim=True)


def typical(layers: list[OfSequences]) -> list[Losses]:
    """Return every layer's losses, the mean over sequences that are scaled alike.

    A sequence's scale is what it loses with all layers in codes of 3 bits (or the fewest above), which is what budgets
    are about; all are scaled to the median of that.

    Args:
        layers: what each sequence loses, of each layer.

    """
    bits = min((b for b in layers[0]["key"] if b >= 3), default=max(layers[0]["key"]))
    whole = [sum(each) for each in zip(*(found[kind][bits] for found in layers for kind in KINDS), strict=True)]
    usual = statistics.median(whole)
    scale = [usual / one if one > 0 else 0.0 for one in whole]
    return [
        {
            kind: {
                b: sum(s * loss for s, loss in zip(scale, losses, strict=True)) / len(scale)
                for b, losses in found[kind].items()
            }
            for kind in KINDS
        }
        for found in layers
    ]


def _with_numbers(losses: dict[str, dict[str, list[float]]]) -> OfSequences:
    """Return losses from JSON, whose keys are strings."""
    return {kind: {int(bits): loss for bits, loss in found.items()} for kind, found in losses.items()}
