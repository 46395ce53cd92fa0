"""Trains a whole model, so that it puts out what the original does: what tuning, recovery and movement share.

The loss is ``KL(original || compressed)`` of the two models' next-token distributions, as in Liu et al., "LLM-QAT"
(2023), https://arxiv.org/abs/2305.17888, section 3.2: what a compressed model should put out is what the original does,
and its whole distribution says more than one token of text. Steps that train weights may take the text's own loss
instead.

Sequences that training never sees decide which state is kept. A run goes on from its last saved state, and ends with
the same bytes as one that was not interrupted.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kv_cache.errors import ParetoError
from quant_methods.calibration import outside
from quant_methods.calibration.calibrator import Decoder, batch_size, quick_dtype
from quant_methods.checkpoints.checkpoint import Source, read_tensors, write_json, write_tensors
from quant_methods.handlers import Tuned
from quant_methods.steps import PruneStep, RoundStep
from quant_methods.training.graphed import Gradients, keeps_activations
from quant_methods.training.losses import total_kl
from quant_methods.training.settings import Training
from quant_methods.training.tuned_model import Learned, learn_parameter, recompute_blocks

if TYPE_CHECKING:
    from quant_methods.checkpoints.storage import Storage

# Times that the held-out sequences are looked at, and the state saved; changes what can be kept, so part of the result.
LOOKS = 8
# Logits that exist at once bound the memory of a model with a large vocabulary: in numbers, of one float32 tensor of
# which some six exist at a time. Sequences that do not go together cost a pass over all weights each, so a GPU takes
# what a share of its memory holds.
LOGITS = 1 << 26
LOGITS_SHARE = 1 / 64
TARGETS_SHARE = 1 / 8
"""Of a GPU's free memory, what the hidden states that are aimed at may take there."""

Say = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what happens now)."""


def at_once(length: int, vocabulary: int, device: torch.device) -> int:
    """Return how many sequences of ``length`` tokens go through a model and its head at once on a device."""
    numbers = LOGITS
    if device.type == "cuda":
        numbers = max(LOGITS, int(torch.cuda.get_device_properties(device).total_memory * LOGITS_SHARE) // 4)
    return max(1, min(batch_size(length, device), numbers // (length * vocabulary)))


class Trainer:
    """Trains the compressed blocks of an unfinished run; what learns in a layer, a subclass says.

    Args:
        step: the settings.
        model_dir: the directory of the model that was compressed.
        source: its weights, as the recipe's other steps saw them.
        device: where everything runs.
        steps: full module name to the step that quantized it.
        prunes: full module name to the step that pruned it.
        storage: the format of the blocks' files.
        block_file: the file of a block's compressed tensors (absent for a block without).
        tokens: int64 [num_samples + held_out, length].
        work: directory of the state and the results.
        original: directory of the model whose outputs are aimed at; None: ``model_dir``.
        say: told how far it is.

    """

    verb = "training"
    """What it is called where it says how far it is."""
    steps_alike = True
    """Whether a step computes what the one before did, on other numbers alone, so that a CUDA graph can repeat it."""

    def __init__(
        self,
        step: Training,
        *,
        model_dir: Path,
        source: Source,
        device: torch.device,
        steps: dict[str, RoundStep],
        prunes: dict[str, PruneStep],
        storage: Storage,
        block_file: Callable[[int], Path],
        tokens: Tensor,
        work: Path,
        original: Path | None = None,
        say: Say = lambda done, total, what: None,
    ) -> None:
        self.settings, self.steps, self.prunes = step, steps, prunes
        self.storage, self.block_file = storage, block_file
        self.tokens, self.device, self.work, self.say = tokens, device, work, say
        aim = (model_dir, source) if original is None else (original, Source(original))
        self.teacher = Decoder(*aim, str(device))
        self.student = Decoder(model_dir, source, str(device))
        self.state_file, self.result_file = work / "tuning.safetensors", work / "tuned.json"
        self.at_once = at_once(step.length, self.teacher.config.vocab_size, self.device)
        self.quick = step.bfloat16 and quick_dtype(device) == torch.bfloat16

    @property
    def layers(self) -> set[str]:
        """The full names of the linear layers that learn."""
        raise NotImplementedError

    def layer(self, name: str, module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
        """Return what trains in the place of a layer.

        Args:
            name: its full name.
            module: the layer; its bias is on the device.
            tensors: its block's tensors as stored.

        """
        raise NotImplementedError

    def packed(self, name: str, layer: Any) -> dict[str, Tensor]:
        """Return the tensors to store, on the CPU, of what ``layer`` returned: its weight."""
        return {f"{name}.weight": layer.stored().cpu()}

    def groups(self, parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
        """Return Adam's groups: parameters, and the ``rate`` that is theirs."""
        return [{"params": list(parameters.values()), "rate": self.settings.learning_rate}]

    def prepare(self, step: int) -> None:
        """Make the student what it is after so many steps, beside its parameters."""

    def counts(self, step: int) -> bool:
        """Return whether the state after so many steps may be kept."""
        return True

    def block_result(self, index: int) -> Path:
        """Return the file that a block's trained tensors are written to."""
        return self.work / f"tuned-{index:05d}.safetensors"

    @property
    def outside_result(self) -> Path:
        """The file of trained tensors outside of the blocks."""
        return self.work / "tuned-outside.safetensors"

    def run(self) -> Tuned:
        """Train, or take up an interrupted training; write the results and return what was done.

        Raises:
            ParetoError: the loss is not finite.

        """
        if not self.result_file.is_file():
            common = outside.weights(self.teacher)
            targets = None if self.settings.on_text else self._targets(common)
            self._load_student(common)
            tuned = self._train(targets)
            self._write()
            del self.teacher, self.student  # Their memory is wanted for what comes after.
            write_json(self.result_file, {"kl": tuned.kl, "kept": tuned.kept, "on_text": tuned.on_text})
        return Tuned.of(json.loads(self.result_file.read_text()))

    def _targets(self, common: dict[str, Tensor]) -> Tensor:
        """Return what leaves the original's last block, float32 [sequences, length, width], on the device if small."""
        hidden = self.teacher.embed(self.tokens)
        total = len(self.teacher.blocks)
        for index in range(total):
            self.say(index, total, f"text to tune on through the original, block {index + 1}/{total}")
            with self.teacher.loaded(index) as block:
                self.teacher.advance(index, block, hidden)
        outside.load(self.teacher, common)
        # Copied in every step otherwise.
        if self.device.type == "cuda" and hidden.nbytes < TARGETS_SHARE * torch.cuda.mem_get_info(self.device)[0]:
            return hidden.to(self.device)
        return hidden

    def _load_student(self, common: dict[str, Tensor]) -> None:
        """Give the student its weights, and make what learns a parameter with a gradient."""
        decoder, layers = self.student, self.layers
        outside.load(decoder, common)
        changed: dict[str, Tensor] = {}
        for index, block in enumerate(decoder.blocks):
            path = self.block_file(index)
            tensors = read_tensors(path)[0] if path.is_file() else {}
            changed |= {name: tensor for name, tensor in tensors.items() if name in decoder.source}
            for local, module in list(block.named_modules()):
                name = decoder.name(index, local)
                for parameter in list(module._parameters):
                    if module._parameters[parameter] is None or (parameter == "weight" and name in layers):
                        continue
                    full = f"{name}.{parameter}"
                    value = tensors[full] if full in tensors else decoder.source.read(full)
                    value = value.to(self.device, torch.float32)
                    module._parameters[parameter] = nn.Parameter(value, requires_grad=False)
                if name in layers:
                    block.set_submodule(local, self.layer(name, module, tensors))
        if self.settings.norms:
            for name, module in list(decoder.model.named_modules()):
                for parameter, value in list(module._parameters.items()):
                    full = f"{name}.{parameter}"
                    if value is not None and value.dim() == 1 and full in decoder.source:
                        dtype = changed[full].dtype if full in changed else decoder.source.dtype(full)
                        learn_parameter(module, parameter, dtype)
        if not self.keeps_activations:
            recompute_blocks(decoder.blocks)

    @functools.cached_property
    def keeps_activations(self) -> bool:
        """Whether all activations of a micro-batch stay in memory until its backward pass."""
        config, tokens = self.student.config, min(self.at_once, self.settings.batch) * self.settings.length
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        return keeps_activations(tokens, len(self.student.blocks), config.hidden_size, inner, self.device)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.student.model.named_parameters() if value.requires_grad}

    def _train(self, targets: Tensor | None) -> Tuned:
        """Train, and leave the student in the best state seen."""
        step, parameters = self.settings, self._parameters()
        # Gradients of a mean over many tokens with respect to one code are tiny; Adam's usual eps would damp them.
        optimizer = torch.optim.Adam(self.groups(parameters), betas=(0.9, 0.99), eps=1e-12)
        state = _State.load(self.state_file, parameters, optimizer)
        if state is None:
            self.prepare(0)
            loss = self._held_out(targets)
            state = _State(0, [(0, loss)], 0, {name: value.detach().clone() for name, value in parameters.items()})
        gradients = Gradients(
            functools.partial(self.loss, bfloat16=self.quick),
            list(parameters.values()),
            captured=self.steps_alike and self.keeps_activations,
            say=lambda what: self.say(0, step.steps, f"{self.verb} {what}"),
        )
        looks = {round(look * step.steps / LOOKS) for look in range(1, LOOKS + 1)}
        while state.step < step.steps:
            self.prepare(state.step)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * step.rate(state.step)
            order = step.order(state.step)
            parts = [order[start : start + self.at_once] for start in range(0, len(order), self.at_once)]
            gradients((self.batch(part, targets) for part in parts), len(order))
            optimizer.step()
            state.step += 1
            best = dict(state.kl)[state.kept]
            told = f"held-out {'loss' if step.on_text else 'KL'} {state.kl[0][1]:.4f} before, {best:.4f} now"
            self.say(state.step, step.steps, f"{self.verb}, step {state.step}/{step.steps}, {told}")
            if state.step in looks:
                self.prepare(state.step)
                loss = self._held_out(targets)
                if not math.isfinite(loss):
                    raise ParetoError(
                        f"{step.method}: the loss is not finite after step {state.step}; lower learning_rate"
                    )
                state.kl.append((state.step, loss))
                if self.counts(state.step) and (loss < best or not self.counts(state.kept)):
                    state.kept = state.step
                    state.best = {name: value.detach().clone() for name, value in parameters.items()}
                state.save(self.state_file, parameters, optimizer)
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(state.best[name])
        self.prepare(state.kept)
        return Tuned(tuple(state.kl), state.kept, step.on_text)

    def loss(self, tokens: Tensor, hidden: Tensor | None, *, bfloat16: bool = False) -> Tensor:
        """Return the sum over sequences of their loss, the mean over their tokens, in nats.

        Args:
            tokens: int64 [sequences, length] on the device.
            hidden: what leaves the original's last block for them, float32 [sequences, length, width] on the device;
                None: the text's own loss.
            bfloat16: run the compressed model's matrix products in it.

        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            logits = self.student.model(input_ids=tokens, use_cache=False).logits
        if hidden is None:
            lost = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())
            return lost * len(tokens)
        with torch.no_grad():
            expected = outside.logits(self.teacher, hidden).log_softmax(-1)
        found = logits.float().log_softmax(-1)
        return total_kl(found, expected) / tokens.shape[1]

    @torch.no_grad()
    def _held_out(self, targets: Tensor | None) -> float:
        """Return the mean loss of the held-out sequences, in float32 arithmetic whatever training uses."""
        chosen = list(range(self.settings.num_samples, len(self.tokens)))
        parts = [chosen[i : i + self.at_once] for i in range(0, len(chosen), self.at_once)]
        return sum(self.loss(*self.batch(part, targets)).item() for part in parts) / len(chosen)

    def batch(self, sequences: list[int], targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return sequences' tokens and what the original's last block puts out for them, on the device."""
        hidden = None if targets is None else targets[sequences].to(self.device)
        return self.tokens[sequences].to(self.device), hidden

    @torch.no_grad()
    def _write(self) -> None:
        """Write the trained tensors, block by block."""
        decoder, layers = self.student, self.layers
        for index in range(len(decoder.blocks)):
            path = self.block_file(index)
            tensors, metadata = read_tensors(path) if path.is_file() else ({}, {"relative_error": "{}"})
            prefix = decoder.name(index, "")
            for local, module in decoder.blocks[index].named_modules():
                if (name := decoder.name(index, local)) in layers:
                    tensors |= self.packed(name, module)
            tensors |= {name: value for name, value in self._norms() if name.startswith(prefix)}
            if tensors:
                write_tensors(self.block_result(index), tensors, metadata)
        if rest := {name: value for name, value in self._norms() if not name.startswith(decoder.prefix + ".")}:
            write_tensors(self.outside_result, rest, {})

    def _norms(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (full name of the parameter, its trained value) of norms' weights and of biases."""
        for name, module in self.student.model.named_modules():
            owner, _, local = name.rpartition(".")
            if isinstance(module, Learned) and local.startswith("learned_"):
                yield f"{owner}.{local.removeprefix('learned_')}", module.stored()


@dataclass
class _State:
    """How far training is: what an interrupted run needs to go on as if it had not been."""

    step: int
    kl: list[tuple[int, float]]
    kept: int
    best: dict[str, Tensor]

    def save(self, path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        tensors = {f"best/{name}": value for name, value in self.best.items()}
        for name, value in parameters.items():
            moments = optimizer.state[value]
            tensors |= {f"now/{name}": value.detach(), f"mean/{name}": moments["exp_avg"]}
            tensors[f"square/{name}"] = moments["exp_avg_sq"]
        about = {"step": self.step, "kl": self.kl, "kept": self.kept}
        write_tensors(path, tensors, {"state": json.dumps(about)})

    @classmethod
    def load(cls, path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> _State | None:
        """Return the saved state after giving parameters and optimizer theirs; None if there is none."""
        if not path.is_file():
            return None
        tensors, metadata = read_tensors(path)
        about = json.loads(metadata["state"])
        best = {name: tensors[f"best/{name}"].to(value.device) for name, value in parameters.items()}
        for name, value in parameters.items():
            value.data.copy_(tensors[f"now/{name}"])
            optimizer.state[value] = {
                "step": torch.tensor(float(about["step"])),
                "exp_avg": tensors[f"mean/{name}"].to(value.device),
                "exp_avg_sq": tensors[f"square/{name}"].to(value.device),
            }
        return cls(about["step"], [(step, kl) for step, kl in about["kl"]], about["kept"], best)
