"""The training itself: trl's SFTTrainer over a model in codes, with checkpoints that a killed run goes on from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import load_tokenizer, quiet_transformers
from quant_methods.finetuning.coded_linear import CodedLinear
from quant_methods.finetuning.examples import Examples
from quant_methods.finetuning.pooled import use_pooled
from quant_methods.finetuning.settings import ALL, Settings
from quant_methods.finetuning.start import EXAMPLES
from quant_methods.training.arguments import on_one_device, shared_arguments
from quant_methods.training.checkpoints import MarkWhole
from quant_methods.training.log import Log

WARM_UP = 0.03


def with_adapter(model: Any, settings: Settings) -> PeftModel:
    """Return a model with an adapter that changes nothing yet.

    Args:
        model: of ``load_coded``.
        settings: rank, targets and so on.

    Raises:
        ParetoError: no layer has one of the names.

    """
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names -= {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    if wrong := [target for target in settings.targets if target != ALL and target not in names]:
        raise ParetoError(f"--targets: no layer is called {wrong[0]!r}; layers: {', '.join(sorted(names))}")
    targets: Any = ALL if ALL in settings.targets else list(settings.targets)
    set_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        use_dora=settings.dora,
        task_type="CAUSAL_LM",
    )
    if settings.pooled:
        if not any(isinstance(module, CodedLinear) for module in model.modules()):
            raise ParetoError("--pooled moves zero-points of codes, and the model is not quantized; leave it out")
        use_pooled(config)
    return get_peft_model(model, config)


def tuner(
    model: PeftModel, model_dir: Path, examples: Examples, settings: Settings, work: Path, device: str, log: Log
) -> SFTTrainer:
    """Return the trainer of a model with an adapter.

    Args:
        model: the model.
        model_dir: whose tokenizer and chat template.
        examples: what it learns from.
        settings: how.
        work: folder of checkpoints.
        device: torch device.
        log: what is told.

    """
    each = max(1, len(examples.training) // settings.batch)
    steps = settings.steps or max(1, math.ceil(settings.epochs * each))
    look = min(steps, settings.save_steps or max(1, steps // 10))
    arguments = on_one_device(
        SFTConfig(
            **shared_arguments(settings, work, steps=steps, look=look, device=device),
            max_length=settings.length,
            per_device_eval_batch_size=settings.micro_batch,
            warmup_steps=math.ceil(WARM_UP * steps),
            metric_for_best_model="eval_loss",
        )
    )
    disable_progress_bars()  # Of preparing the data, which the command's own lines do not need.
    with quiet_transformers():
        made = SFTTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_list(examples.training),
            eval_dataset=Dataset.from_list(examples.held_out),
            processing_class=load_tokenizer(model_dir),
            callbacks=[log, MarkWhole()],
        )
    made.remove_callback(PrinterCallback)
    _check_learnt(made, settings)
    return made


def first_tokens(trainer: SFTTrainer) -> list[list[int]]:
    """Return the tokens of the first examples that will be learnt from, as ``start_from_error`` reads them."""
    rows = trainer.train_dataset[:EXAMPLES]["input_ids"]
    return [row[: trainer.args.max_length] for row in rows]


def _check_learnt(made: SFTTrainer, settings: Settings) -> None:
    """Refuse data whose answers all lie behind the cut."""
    for data, name in ((made.train_dataset, "training"), (made.eval_dataset, "held-out")):
        if not any(label != -100 for labels in data["labels"] for label in labels):
            raise ParetoError(
                f"none of the {name} examples has an answer within --length {settings.length} tokens; give a larger one"
            )
