"""Tuning: the last step of a recipe trains what is continuous in a quantized model, end to end.

Codes are frozen; scales (look-up tables, outlier channels, low-rank factors, where a layer has them) and norms, which
stay in 16 bits anyway, move by gradient: Chen et al., "EfficientQAT" (2024), https://arxiv.org/abs/2407.11062, section
3.3 (E2E-QP). The loss is not the text's but ``KL(original || quantized)`` of the two models' next-token distributions,
as in Liu et al., "LLM-QAT" (2023), https://arxiv.org/abs/2305.17888, section 3.2: what a quantized model should put out
is what the original does, and its whole distribution says more than one token of text.

``code_learning_rate`` lets the codes move too, by the straight-through estimator, as EfficientQAT's Block-AP (section
3.2) does block by block, but end to end and from what the step before made of them. AdaRound (Nagel et al., 2020,
https://arxiv.org/abs/2004.10568) and BRECQ (Li et al., 2021, https://arxiv.org/abs/2102.05426) learn the rounding of a
layer and of a block; here it is for the whole model's loss.

Sequences that training never sees decide which state is kept, the first one included, so that a run never ends worse
than it began, on these.
"""

from __future__ import annotations

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
from quant_methods.calibration.calibrator import Decoder, batch_size
from quant_methods.checkpoints.checkpoint import Source, read_tensors, write_json, write_tensors
from quant_methods.formats.form import ACTIVATION_BITS
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.handlers import Tuned, completes, register
from quant_methods.methods.tuned_model import Learned, LearnedCodes, TunedLinear, learn_parameter, recompute_blocks
from quant_methods.steps import ModelStep, RoundStep

if TYPE_CHECKING:
    from quant_methods.checkpoints.storage import Storage

# Times that the held-out sequences are looked at, and the state saved; changes what can be kept, so part of the result.
LOOKS = 8
WARM_UP = 0.05
# Logits that exist at once bound the memory of a model with a large vocabulary: in numbers, of one float32 tensor of
# which some six exist at a time. Sequences that do not go together cost a pass over all weights each, so a GPU takes
# what a share of its memory holds.
LOGITS = 1 << 26
LOGITS_SHARE = 1 / 64

Say = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what happens now)."""


@register("tune")
@dataclass(frozen=True)
class Tune(ModelStep):
    """Tuning by gradient; comes last.

    Attributes:
        num_samples: sequences to train on, from the start of the text, as calibration's.
        length: tokens in each.
        held_out: sequences after these that decide which state is kept.
        epochs: passes over the sequences.
        batch: sequences a step.
        learning_rate: Adam's, relative to the mean size of what is stored; warmed up, then down to 0 as a cosine.
        code_learning_rate: the same for codes, in steps of their grid; 0 freezes them.
        norms: train norms' weights and biases too.
        bfloat16: run the quantized model's matrix products in bfloat16, for speed.
        seed: of the order of the sequences.

    """

    num_samples: int = 256
    length: int = 1024
    held_out: int = 16
    epochs: float = 4.0
    batch: int = 8
    learning_rate: float = 2e-3
    code_learning_rate: float = 0.0
    norms: bool = True
    bfloat16: bool = False
    seed: int = 0

    def check(self) -> None:
        """Refuse settings without data or steps."""
        if self.num_samples < 1 or self.held_out < 1 or self.length < 2:
            raise ParetoError(
                f"tune needs at least 1 sequence and 1 held out, of at least 2 tokens, got {self.num_samples} and "
                f"{self.held_out} of {self.length}"
            )
        if not 1 <= self.batch <= self.num_samples:
            raise ParetoError(f"tune: batch {self.batch} is not between 1 and num_samples ({self.num_samples})")
        if self.learning_rate <= 0 or self.code_learning_rate < 0 or self.epochs <= 0:
            raise ParetoError("tune: learning_rate and epochs are positive, code_learning_rate is not negative")

    @property
    def text(self) -> tuple[int, int]:
        """How many sequences it runs on, those held out included, and the tokens of each."""
        return self.num_samples + self.held_out, self.length

    @property
    def steps(self) -> int:
        """Steps in all."""
        return max(1, int(self.epochs * self.num_samples / self.batch))

    def rate(self, step: int) -> float:
        """Return the learning rate of a step as a fraction of the given one."""
        warm = max(1, round(WARM_UP * self.steps))
        return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def order(self, step: int) -> list[int]:
        """Return the sequences of a step: every epoch its own permutation, whatever was done before."""
        found: list[int] = []
        for at in range(step * self.batch, (step + 1) * self.batch):
            epoch, position = divmod(at, self.num_samples)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            found.append(int(torch.randperm(self.num_samples, generator=generator)[position]))
        return found


def at_once(length: int, vocabulary: int, device: torch.device) -> int:
    """Return how many sequences of ``length`` tokens go through a model and its head at once on a device."""
    numbers = LOGITS
    if device.type == "cuda":
        numbers = max(LOGITS, int(torch.cuda.get_device_properties(device).total_memory * LOGITS_SHARE) // 4)
    return max(1, min(batch_size(length, device), numbers // (length * vocabulary)))


@completes(Tune)
class Tuner:
    """Tunes the quantized blocks of an unfinished run.

    Args:
        step: the settings.
        model_dir: the original's directory.
        source: its weights, as the recipe's other steps saw them.
        device: where everything runs.
        steps: full module name to the step that quantized it.
        storage: the format of the blocks' files.
        block_file: the file of a block's quantized tensors (absent for a block without).
        tokens: int64 [num_samples + held_out, length].
        work: directory of the state and the results.
        say: told how far it is.

    """

    def __init__(
        self,
        step: Tune,
        *,
        model_dir: Path,
        source: Source,
        device: torch.device,
        steps: dict[str, RoundStep],
        storage: Storage,
        block_file: Callable[[int], Path],
        tokens: Tensor,
        work: Path,
        say: Say = lambda done, total, what: None,
    ) -> None:
        self.step, self.steps, self.storage, self.block_file = step, steps, storage, block_file
        self.tokens, self.device, self.work, self.say = tokens, device, work, say
        self.teacher = Decoder(model_dir, source, str(device))
        self.student = Decoder(model_dir, source, str(device))
        self.state_file, self.result_file = work / "tuning.safetensors", work / "tuned.json"
        self.at_once = at_once(step.length, self.teacher.config.vocab_size, self.device)

    def block_result(self, index: int) -> Path:
        """Return the file that a block's tuned tensors are written to."""
        return self.work / f"tuned-{index:05d}.safetensors"

    @property
    def outside_result(self) -> Path:
        """The file of tuned tensors outside of the blocks."""
        return self.work / "tuned-outside.safetensors"

    def run(self) -> Tuned:
        """Tune, or take up an interrupted tuning; write the results and return what was done.

        Raises:
            ParetoError: the loss is not finite.

        """
        if not self.result_file.is_file():
            common = outside.weights(self.teacher)
            targets = self._targets(common)
            self._load_student(common)
            tuned = self._train(targets)
            self._write()
            del self.teacher, self.student  # Their memory is wanted for what comes after.
            write_json(self.result_file, {"kl": tuned.kl, "kept": tuned.kept})
        found = json.loads(self.result_file.read_text())
        return Tuned(tuple((step, kl) for step, kl in found["kl"]), found["kept"])

    def _targets(self, common: dict[str, Tensor]) -> Tensor:
        """Return what leaves the original's last block, float32 [sequences, length, width] on the CPU."""
        hidden = self.teacher.embed(self.tokens)
        total = len(self.teacher.blocks)
        for index in range(total):
            self.say(index, total, f"text to tune on through the original, block {index + 1}/{total}")
            with self.teacher.loaded(index) as block:
                self.teacher.advance(index, block, hidden)
        outside.load(self.teacher, common)
        return hidden

    def _load_student(self, common: dict[str, Tensor]) -> None:
        """Give the student its weights, and make what learns a parameter with a gradient."""
        decoder = self.student
        outside.load(decoder, common)
        changed: dict[str, Tensor] = {}
        for index, block in enumerate(decoder.blocks):
            path = self.block_file(index)
            tensors = read_tensors(path)[0] if path.is_file() else {}
            changed |= {name: tensor for name, tensor in tensors.items() if name in decoder.source}
            for local, module in list(block.named_modules()):
                name = decoder.name(index, local)
                for parameter in list(module._parameters):
                    if module._parameters[parameter] is None or (parameter == "weight" and name in self.steps):
                        continue
                    full = f"{name}.{parameter}"
                    value = tensors[full] if full in tensors else decoder.source.read(full)
                    value = value.to(self.device, torch.float32)
                    module._parameters[parameter] = nn.Parameter(value, requires_grad=False)
                if name in self.steps:
                    block.set_submodule(local, self._tuned_linear(name, module, tensors))
        if self.step.norms:
            for name, module in list(decoder.model.named_modules()):
                for parameter, value in list(module._parameters.items()):
                    full = f"{name}.{parameter}"
                    if value is not None and value.dim() == 1 and full in decoder.source:
                        dtype = changed[full].dtype if full in changed else decoder.source.dtype(full)
                        learn_parameter(module, parameter, dtype)
        recompute_blocks(decoder.blocks)

    def _tuned_linear(self, name: str, module: nn.Module, tensors: dict[str, Tensor]) -> TunedLinear:
        step = self.steps[name]
        linear = self.storage.unpack(name, tensors, step).to(self.device)
        bits = ACTIVATION_BITS[step.activations]
        codes = None
        # Indices into a table have no order that a gradient could follow.
        grid = linear.get(GridCodes)
        if self.step.code_learning_rate and grid is not None:
            weight = self.student.source.read(f"{name}.weight").to(self.device, torch.float32)
            codes = LearnedCodes(grid, step.grid, weight)
        return TunedLinear(linear, module._parameters["bias"], bits, codes)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.student.model.named_parameters() if value.requires_grad}

    def _train(self, targets: Tensor) -> Tuned:
        """Train, and leave the student in the best state seen."""
        step, parameters = self.step, self._parameters()
        codes = [value for name, value in parameters.items() if name.endswith(".codes.offset")]
        rest = [value for name, value in parameters.items() if not name.endswith(".codes.offset")]
        groups = [{"params": rest, "rate": step.learning_rate}]
        if codes:
            groups.append({"params": codes, "rate": step.code_learning_rate})
        # Gradients of a mean over many tokens with respect to one code are tiny; Adam's usual eps would damp them.
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12)
        state = _State.load(self.state_file, parameters, optimizer)
        if state is None:
            kl = self._held_out(targets)
            state = _State(0, [(0, kl)], 0, {name: value.detach().clone() for name, value in parameters.items()})
        looks = {round(look * step.steps / LOOKS) for look in range(1, LOOKS + 1)}
        while state.step < step.steps:
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * step.rate(state.step)
            order = step.order(state.step)
            optimizer.zero_grad()
            for start in range(0, len(order), self.at_once):
                chosen = order[start : start + self.at_once]
                self._divergence(chosen, targets, bfloat16=step.bfloat16).div(len(order)).backward()
            optimizer.step()
            state.step += 1
            best = dict(state.kl)[state.kept]
            self.say(state.step, step.steps, f"tuning, held-out KL {state.kl[0][1]:.4f} before, {best:.4f} now")
            if state.step in looks:
                kl = self._held_out(targets)
                if not math.isfinite(kl):
                    raise ParetoError(f"tune: the loss is not finite after step {state.step}; lower learning_rate")
                state.kl.append((state.step, kl))
                if kl < best:
                    state.kept = state.step
                    state.best = {name: value.detach().clone() for name, value in parameters.items()}
                state.save(self.state_file, parameters, optimizer)
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(state.best[name])
        return Tuned(tuple(state.kl), state.kept)

    def _divergence(self, sequences: list[int], targets: Tensor, *, bfloat16: bool = False) -> Tensor:
        """Return the sum over sequences of their mean KL(original || quantized) in nats a token."""
        tokens = self.tokens[sequences].to(self.device)
        expected = outside.logits(self.teacher, targets[sequences].to(self.device)).log_softmax(-1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            logits = self.student.model(input_ids=tokens, use_cache=False).logits
        found = logits.float().log_softmax(-1)
        return functional.kl_div(found, expected, log_target=True, reduction="sum") / tokens.shape[1]

    @torch.no_grad()
    def _held_out(self, targets: Tensor) -> float:
        """Return the mean KL of the held-out sequences, in float32 arithmetic whatever training uses."""
        chosen = list(range(self.step.num_samples, len(self.tokens)))
        parts = [chosen[i : i + self.at_once] for i in range(0, len(chosen), self.at_once)]
        return sum(self._divergence(part, targets).item() for part in parts) / len(chosen)

    @torch.no_grad()
    def _write(self) -> None:
        """Write the tuned tensors, block by block."""
        decoder = self.student
        for index in range(len(decoder.blocks)):
            path = self.block_file(index)
            tensors, metadata = read_tensors(path) if path.is_file() else ({}, {"relative_error": "{}"})
            prefix = decoder.name(index, "")
            for name, module in self._tuned(TunedLinear):
                if name.startswith(prefix):
                    tensors |= self.storage.pack(name, module.stored().cpu(), self.steps[name])
            tensors |= {name: value for name, value in self._norms() if name.startswith(prefix)}
            if tensors:
                write_tensors(self.block_result(index), tensors, metadata)
        if rest := {name: value for name, value in self._norms() if not name.startswith(decoder.prefix + ".")}:
            write_tensors(self.outside_result, rest, {})

    def _tuned(self, kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
        for name, module in self.student.model.named_modules():
            if isinstance(module, kind):
                yield name, module

    def _norms(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (full name of the parameter, its tuned value) of norms' weights and of biases."""
        for name, module in self._tuned(Learned):
            owner, _, local = name.rpartition(".")
            if local.startswith("learned_"):
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
