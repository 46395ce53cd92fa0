"""The loop: transformers' Trainer, with the teacher's distributions as what is learnt.

The Trainer brings optimizer, schedule, accumulation, several devices (started by accelerate's or PyTorch's launcher)
and checkpoints; from the last whole one a run goes on to the same loss. What is here is the loss, which exists a chunk
of tokens at a time, and the look at held-out sequences, which decides what is kept.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from kv_cache.errors import ParetoError
from quant_methods.distillation.codes import CodedCache
from quant_methods.distillation.data import Data
from quant_methods.distillation.heads import Head
from quant_methods.distillation.on_policy import Writer
from quant_methods.distillation.settings import Settings
from quant_methods.distillation.teacher import Targets, Teacher
from quant_methods.training.arguments import on_one_device, products_dtype, shared_arguments
from quant_methods.training.checkpoints import MarkWhole
from quant_methods.training.losses import divergence, forward_kl, hidden_loss, over_chunks, text_loss

NUMBERS = 1 << 25
"""Logits of one model that exist at once, in float32 numbers; some six tensors of that size do."""
WARM_UP = 0.05
PROJECTION = "distill_projection"
"""The student's module that brings its hidden states to the teacher's width; it is no part of the result."""


class Distiller(Trainer):
    """Trains a student.

    Args:
        student: a model of transformers, float32.
        teacher: what it learns from.
        data: what on.
        settings: how.
        work: folder of the checkpoints.
        device: torch device of a run that no launcher started.
        cache: the codes of its KV cache, or None.
        writer: lets it write what it learns from, for a share of the training; None: all is text.
        callbacks: of transformers, which show progress.

    Raises:
        ParetoError: a student whose parameters are spread over devices shall write.

    """

    def __init__(
        self,
        student: Any,
        teacher: Teacher,
        data: Data,
        settings: Settings,
        *,
        work: Path,
        device: str,
        cache: CodedCache | None = None,
        writer: Writer | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        steps = settings.total_steps
        look = max(1, math.ceil(steps / settings.looks))
        arguments = on_one_device(
            TrainingArguments(
                **shared_arguments(settings, work, steps=steps, look=look, device=device),
                weight_decay=settings.weight_decay,
                adam_beta2=0.95,
                warmup_steps=math.ceil(WARM_UP * steps),
                metric_for_best_model="eval_kl" if settings.kl_share else "eval_loss",
                dataloader_drop_last=True,
                remove_unused_columns=False,
            )
        )
        self.teacher, self.data, self.settings, self.cache = teacher, data, settings, cache
        self.writer, self.place = writer, (-1, 0)
        self.measure = divergence(settings.loss, settings.skew)
        if settings.hidden:
            _project(student, teacher, data)
        parts = _Part(data, 0, len(data)), _Part(data, len(data), len(data.tokens))
        super().__init__(
            student, arguments, train_dataset=parts[0], eval_dataset=parts[1], callbacks=[*callbacks, MarkWhole()]
        )
        # Our loss is a mean over the tokens of a part of a batch; the Trainer divides by the number of parts.
        self.model_accepts_loss_kwargs = False
        spread = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if writer is not None and spread:
            raise ParetoError("--on-policy: a student whose parameters are spread over devices does not write yet")
        self.head = Head(student, bfloat16=products_dtype(settings, device) == torch.bfloat16, whole=spread)
        self.chunk = max(16, NUMBERS // student.config.vocab_size)

    def coded(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the student reads its cache from codes, if it shall."""
        return contextlib.nullcontext() if self.cache is None else self.cache.on()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Do one step on a part of a batch; blocks that run again on the way back see codes too.

        Raises:
            ParetoError: the loss is not finite.

        """
        step, before = self.state.global_step, self.place
        self.place = step, before[1] + 1 if before[0] == step else 0
        with self.coded():
            if self.writer is not None and self.writer.due(*self.place):
                inputs = self._written(self.writer, inputs["sequence"].tolist())
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            raise ParetoError(
                f"the loss is not finite after step {self.state.global_step}; give a lower --learning-rate than "
                f"{self.settings.learning_rate:g}"
            )
        return loss

    def _written(self, writer: Writer, sequences: list[int]) -> dict[str, Tensor]:
        """Return what the student writes in the place of some sequences; the same in a run that goes on."""
        place = self.place[0] * writer.parts + self.place[1]
        seed = (
            self.settings.seed * 1_000_003 + place
        ) * self.accelerator.num_processes + self.accelerator.process_index
        with self.autocast_smart_context_manager():
            return writer.write(self.accelerator.unwrap_model(self.model), sequences, seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of sequences, nats a token; of what the student wrote itself, the teacher's alone."""
        settings, tokens, counted = self.settings, inputs["input_ids"], inputs["counted"]
        targets = self._targets(inputs["sequence"], tokens) if settings.kl_share or settings.hidden else None
        with self.head.removed():
            out = model(input_ids=tokens, use_cache=False, output_hidden_states=bool(settings.hidden))
        kl, text = self._sums(out.logits, tokens, counted, targets, settings.temperature, train=True)
        count = counted.sum().clamp_min(1)
        share = 1.0 if (inputs["sequence"] < 0).all() else settings.kl_share
        loss = (share * settings.temperature**2 * kl + (1 - share) * text) / count
        if settings.hidden and targets is not None:
            loss = loss + settings.hidden * self._hidden(targets, out.hidden_states, counted)
        return (loss, out) if return_outputs else loss

    def _targets(self, sequences: Tensor, tokens: Tensor) -> Targets:
        # The teacher reads its cache as it is, whatever the student does.
        return self.teacher.targets(sequences, tokens)

    def _sums(
        self,
        states: Tensor,
        tokens: Tensor,
        counted: Tensor,
        targets: Targets | None,
        temperature: float,
        *,
        train: bool,
    ) -> Tensor:
        """Return the sums over counted tokens of the divergence and of the text's loss, float32 [2].

        Args:
            states: what the student returned, [sequences, length, ...].
            tokens: int64 [sequences, length].
            counted: bool [sequences, length - 1].
            targets: of the teacher; None: the divergence is 0.
            temperature: of the divergence.
            train: measure by the divergence that is learnt from; else KL(teacher || student).

        """
        measure = self.measure if train else forward_kl
        mask = counted.flatten()
        if not mask.any():
            return states.sum() * torch.zeros(2, device=states.device)

        def sums(states: Tensor, labels: Tensor, *rows: Tensor) -> Tensor:
            logits = self.head.logits(states)
            kl = logits.new_zeros(())
            if targets is not None:
                kl = measure(*targets.pair(logits, temperature, *rows)).sum()
            return torch.stack([kl, text_loss(logits.log_softmax(-1), labels).sum()])

        rows = (states[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), *(() if targets is None else targets.rows))
        return over_chunks(sums, tuple(x[mask] for x in rows), self.chunk)

    def _hidden(self, targets: Targets, states: tuple[Tensor, ...], counted: Tensor) -> Tensor:
        """Return the mean distance of the blocks' outputs, each held against that of the teacher at the same depth."""
        # The last state has no successor that would be learnt; what a token's state means does not depend on that.
        mask = torch.nn.functional.pad(counted, (0, 1))
        projection = getattr(self.accelerator.unwrap_model(self.model), PROJECTION)
        own, theirs = len(states) - 1, len(targets.hidden) - 1
        found = [
            hidden_loss(targets.hidden[round(layer * theirs / own)][mask], projection(states[layer][mask])).mean()
            for layer in range(1, own + 1)
        ]
        return torch.stack(found).mean()

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Look at the held-out sequences: KL(teacher || student), the text's loss and its perplexity, at temperature 1.

        Each device looks at its share.
        """
        model, data, began = self.accelerator.unwrap_model(self.model), self.data, time.monotonic()
        if self.cache is not None:
            self.cache.follow(model)
        was_training = self.model_wrapped.training
        running = self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else model
        running.eval()
        totals = torch.zeros(3, dtype=torch.float64)
        numbers = list(range(len(data), len(data.tokens)))[
            self.accelerator.process_index :: self.accelerator.num_processes
        ]
        each = self.settings.micro_batch
        for some in (numbers[start : start + each] for start in range(0, len(numbers), each)):
            tokens, counted = data.tokens[some].to(self.args.device), data.counted[some].to(self.args.device)
            targets = self._targets(torch.tensor(some), tokens) if self.settings.kl_share else None
            with self.coded(), self.head.removed(), self.autocast_smart_context_manager():
                out = running(input_ids=tokens, use_cache=False)
            sums = self._sums(out.logits, tokens, counted, targets, 1.0, train=False)
            totals += torch.cat([sums.double().cpu(), counted.sum().double().cpu()[None]])
        running.train(was_training)
        kl, text, count = self.accelerator.reduce(totals.to(self.args.device)).tolist()
        found = {"eval_loss": text / count, "eval_perplexity": math.exp(min(text / count, 700))}
        if self.settings.kl_share:
            found["eval_kl"] = kl / count
        self.log({**found, "eval_runtime": time.monotonic() - began})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)  # type: ignore[has-type]
        return found

    def result(self) -> Any:
        """Return the student in its best state, without what only served training."""
        student = self.accelerator.unwrap_model(self.model)
        if hasattr(student, PROJECTION):
            delattr(student, PROJECTION)
        return student


class _Part(torch.utils.data.Dataset):
    """Some of the data, as the Trainer's loader wants it."""

    def __init__(self, data: Data, start: int, stop: int) -> None:
        self.data, self.start, self.stop = data, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.data[self.start + number]


def _project(student: Any, teacher: Teacher, data: Data) -> None:
    """Give the student a module that brings its hidden states to the teacher's width."""
    width = student.config.hidden_size
    theirs = teacher.targets(torch.tensor([0]), data.tokens[:1].to(student.device)).hidden[-1].shape[-1]
    layer: nn.Module = nn.Identity() if theirs == width else nn.Linear(width, theirs, bias=False)
    student.add_module(PROJECTION, layer.to(student.device))
