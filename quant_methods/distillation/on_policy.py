"""What a student writes itself, for its teacher to judge: it learns where its own words lead, as when it serves.

Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD, 2023),
https://arxiv.org/abs/2306.13649, section 3.1 (algorithm 1). trl's DistillationTrainer trains on a student's own words
alone; here they are a share of the training, beside text, and whatever the student lives with (codes of weights, of the
KV cache) it writes with too.

Which parts of the training are written, and the numbers that words are drawn with, follow from the seed and the step:
a run that goes on writes the same.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_methods.distillation.codes import rounded_once
from quant_methods.distillation.data import Data
from quant_methods.distillation.settings import Settings
from quant_methods.training.arguments import process_share

PADDING = 0
"""Behind what is shorter than others: nothing before it sees it."""


def stop_tokens(folder: Path) -> list[int]:
    """Return the tokens that end an answer, as a checkpoint says; none if it does not."""
    from transformers import AutoConfig, GenerationConfig

    said = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
    found = None if said is None else said.eos_token_id
    if found is None:
        found = AutoConfig.from_pretrained(folder).eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


class Writer:
    """Lets a student write on from prompts: a chat up to its first answer, or the beginning of a window of text.

    Args:
        data: what prompts come from.
        settings: how much is written.
        stop: tokens that end an answer.

    """

    def __init__(self, data: Data, settings: Settings, stop: list[int]) -> None:
        self.data, self.settings, self.stop = data, settings, stop
        self.parts = process_share(settings)[1]

    def due(self, step: int, part: int) -> bool:
        """Return whether a part of a step's batch is written by the student; spread evenly over the training."""
        place, share = step * self.parts + part, self.settings.on_policy
        return math.floor((place + 1) * share) > math.floor(place * share)

    def prompt(self, number: int) -> list[int]:
        """Return the tokens that a sequence's writing starts from."""
        if self.data.prompts:
            return self.data.prompts[number]
        found: list[int] = self.data.tokens[number, : self.settings.length - self.settings.new_tokens].tolist()
        return found

    @torch.no_grad()
    def write(self, model: Any, sequences: list[int], seed: int) -> dict[str, Tensor]:
        """Return what the student makes of some sequences' prompts, as inputs of a training step.

        Args:
            model: the student, not wrapped.
            sequences: numbers in the data.
            seed: of what is drawn.

        Returns:
            ``sequence``, -1 for each; ``input_ids`` [n, at most the length] on the student's device; ``counted``
            [n, that less 1], where what follows was written, the token that ends it included.

        """
        prompts = [self.prompt(number) for number in sequences]
        device = next(model.parameters()).device
        longest = max(map(len, prompts))
        # Written on at the same place in all rows, so padding stands in front.
        rows = torch.tensor([[PADDING] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        new = min(self.settings.new_tokens, self.settings.length - longest)
        written = self._generate(model, rows, seen, new, seed)[:, longest:].tolist()
        answers = [self._until_stop(answer) for answer in written]
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        tokens = torch.full((len(prompts), length), PADDING)
        counted = torch.zeros(len(prompts), length - 1, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            tokens[row, :end] = torch.tensor(prompt + answer)
            counted[row, len(prompt) - 1 : end - 1] = True
        sequence = torch.full((len(prompts),), -1)
        return {"sequence": sequence, "input_ids": tokens.to(device), "counted": counted.to(device)}

    def _until_stop(self, answer: list[int]) -> list[int]:
        end = next((place + 1 for place, token in enumerate(answer) if token in self.stop), len(answer))
        return answer[:end]

    def _generate(self, model: Any, rows: Tensor, seen: Tensor, new: int, seed: int) -> Tensor:
        """Draw from the student's own distribution, whatever its checkpoint says of sampling."""
        from transformers import GenerationConfig

        drawn = GenerationConfig(
            max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
            eos_token_id=self.stop or None, pad_token_id=PADDING,
        )  # fmt: skip
        own, was_training = model.generation_config, model.training
        devices = [rows.device.index or 0] if rows.device.type == "cuda" else []
        model.eval()  # A model in training that runs its blocks again keeps no cache.
        model.generation_config = GenerationConfig()
        try:
            with torch.random.fork_rng(devices), rounded_once(model):
                torch.manual_seed(seed)
                found: Tensor = model.generate(rows, attention_mask=seen, generation_config=drawn)
                return found
        finally:
            model.generation_config = own
            model.train(was_training)
