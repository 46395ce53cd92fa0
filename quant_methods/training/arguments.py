"""What fine-tuning and distillation ask of transformers' Trainer alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from kv_cache.errors import ParetoError
from quant_methods.calibration.calibrator import quick_dtype


class TrainerSettings(Protocol):
    """The settings of a training that the Trainer is told; see the rooms' own for what each means."""

    @property
    def batch(self) -> int: ...  # noqa: D102
    @property
    def micro_batch(self) -> int: ...  # noqa: D102
    @property
    def learning_rate(self) -> float: ...  # noqa: D102
    @property
    def checkpointing(self) -> bool: ...  # noqa: D102
    @property
    def bfloat16(self) -> bool: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102


def products_dtype(settings: TrainerSettings, device: str) -> torch.dtype:
    """Return what a training multiplies in: bfloat16 where its settings allow it and the device is quick at it."""
    return quick_dtype(torch.device(device)) if settings.bfloat16 else torch.float32


Told = TypeVar("Told")


def on_one_device(arguments: Told) -> Told:
    """Return arguments of the Trainer that let a process use its own device alone.

    A process that sees several GPUs would share its parts among them (``nn.DataParallel``): slower than a process for
    each, with another batch, and nothing that trl or codes could stand.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)  # type: ignore[attr-defined]
    return arguments


def process_share(settings: TrainerSettings) -> tuple[int, int]:
    """Return what each process of a launcher does of a step: sequences in memory at once, and how often so many.

    The processes share a step's batch, so that several devices learn what one would, and sooner.

    Raises:
        ParetoError: the batch cannot be shared evenly.

    """
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    each, over = divmod(settings.batch, processes)
    if over:
        raise ParetoError(
            f"--batch {settings.batch} is shared by {processes} processes; give a multiple of {processes}, or start "
            "fewer"
        )
    at_once = max(size for size in range(1, settings.micro_batch + 1) if each % size == 0)
    return at_once, each // at_once


def shared_arguments(settings: TrainerSettings, work: Path, *, steps: int, look: int, device: str) -> dict[str, Any]:
    """Return arguments of ``TrainingArguments``: looks at held-out data with a checkpoint each, the best one kept.

    Args:
        settings: of the training.
        work: folder of the checkpoints.
        steps: in all.
        look: steps between two looks.
        device: torch device.

    Raises:
        ParetoError: the processes of a launcher cannot share a batch evenly.

    """
    at_once, times = process_share(settings)
    cpu = torch.device(device).type == "cpu"
    return {
        "output_dir": str(work),
        "max_steps": steps,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": times,
        "gradient_checkpointing": settings.checkpointing,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "bf16": products_dtype(settings, device) == torch.bfloat16,
        "use_cpu": cpu,
        "eval_strategy": "steps",
        "eval_steps": look,
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": look,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "greater_is_better": False,
        "logging_steps": max(1, min(10, look)),
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": not cpu,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": settings.seed,
        "data_seed": settings.seed,
    }
