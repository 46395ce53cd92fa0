"""One fine-tuning from a model's name to an adapter: what is read, what goes on where it was stopped.

Everything that is not finished lies in a folder beside the output, which appears in one piece at the end.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import quiet_transformers
from quant_methods.checkpoints.checkpoint import full_disk_explained, write_json
from quant_methods.checkpoints.replaceable import check_apart
from quant_methods.finetuning.card import write_card
from quant_methods.finetuning.examples import Examples, read_examples
from quant_methods.finetuning.merge import merge
from quant_methods.finetuning.settings import Settings
from quant_methods.model_source import fingerprint, name_of, read_config
from quant_methods.work_folder import locked

RESULT = "pareto_finetuning.json"
"""What a result says of how it came about."""
MEMORY_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")

Say = Callable[[str], object]


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        model: folder of the checkpoint.
        data: the file of examples.
        out: folder of the result.
        settings: how the adapter learns.
        start_from: folder of the model that was quantized, whose error the adapter starts as; None: from nothing.
        merged: the result is a checkpoint with the adapter merged into it, not the adapter.
        device: torch device.

    """

    model: Path
    data: Path
    out: Path
    settings: Settings
    start_from: Path | None = None
    merged: bool = False
    device: str = "cpu"

    @property
    def work(self) -> Path:
        """The folder of what is not finished."""
        return self.out.with_name(f".{self.out.name}.finetune")

    def check(self) -> None:
        """Refuse what cannot be done, before anything is loaded.

        Raises:
            ParetoError: with the first such thing.

        """
        self.settings.check()
        check_new(self.out)
        check_apart(self.out, {"the model": self.model, "the data": self.data})
        context = read_config(self.model).get("max_position_embeddings")
        if isinstance(context, int) and self.settings.length > context:
            raise ParetoError(
                f"--length {self.settings.length} exceeds the model's context of {context}; give {context} or less"
            )

    def describe(self, examples: Examples) -> dict[str, Any]:
        """Return what determines the result, as JSON values."""
        start = self.start_from
        return {
            "model": {"name": name_of(self.model), "sha256": fingerprint(self.model)},
            "data": examples.describe(),
            "settings": self.settings.as_json(),
            "start_from": None if start is None else {"name": name_of(start), "sha256": fingerprint(start)},
        }


def check_new(out: Path) -> None:
    """Refuse a place where something lies.

    Raises:
        ParetoError: it does.

    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ParetoError(f"{out} exists; give another --out, or delete it")


@dataclass(frozen=True)
class Outcome:
    """What a fine-tuning made.

    Attributes:
        out: the result's folder.
        before: loss of the held-out examples at the start, in nats a token.
        after: and of the state that was kept.
        step: of that state.
        resumed: the step that this run went on from.
        peak_bytes: of GPU memory; 0 on the CPU.

    """

    out: Path
    before: float
    after: float
    step: int
    resumed: int
    peak_bytes: int


def finetune(job: Job, say: Say = lambda line: None) -> Outcome:
    """Do a job, or what is left of it.

    Args:
        job: what is to be done.
        say: takes lines to read.

    Raises:
        ParetoError: bad input, a full disk or memory, or a folder of another job.

    """
    job.check()
    examples = read_examples(job.model, job.data, job.settings.held_out, job.settings.seed)
    with full_disk_explained(job.work):
        from accelerate import PartialState

        # One process of several writes; the others find what it wrote.
        processes = PartialState(cpu=torch.device(job.device).type == "cpu")
        first = processes.is_main_process
        lock = locked(job.work) if first else contextlib.nullcontext()
        with lock, _memory_explained(job):
            try:
                return _finetune(job, examples, processes, say if first else lambda line: None)
            except BaseException:
                if first and (job.work / "job.json").is_file() and not _begun(job):
                    shutil.rmtree(job.work)  # Nothing to go on from, so that a corrected command can start.
                raise


def _finetune(job: Job, examples: Examples, processes: Any, say: Say) -> Outcome:
    from quant_methods.finetuning.load import load_coded
    from quant_methods.finetuning.log import Log
    from quant_methods.finetuning.tuner import last_whole, start_from_error, tuner, with_adapter

    first, device = processes.is_main_process, job.device
    with processes.main_process_first():
        if first:
            _same_job(job, examples)
        before = last_whole(job.work)
    if device.startswith("cuda"):
        device = str(processes.device)
        torch.cuda.reset_peak_memory_stats()
    log = job.work / "log.jsonl"
    model = with_adapter(load_coded(job.model, device), job.settings)
    if job.start_from is not None:
        share = start_from_error(model, job.start_from)
        say(f"the adapter starts as {share:.1%} of what quantization took away")
    trainer = tuner(model, job.model, examples, job.settings, job.work, device, Log(log, say))
    resumed = 0 if before is None else int(before.name.rpartition("-")[2])
    if resumed:
        say(f"goes on from step {resumed}")
    with quiet_transformers():
        trainer.train(resume_from_checkpoint=None if before is None else str(before))
    looks = [entry for entry in _lines(log) if "eval_loss" in entry]
    # A start that no step improved on is not kept: the Trainer has no checkpoint of it.
    kept = trainer.state.best_global_step or trainer.state.global_step
    best = next(entry for entry in reversed(looks) if entry["step"] == kept)
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0
    outcome = Outcome(job.out, looks[0]["eval_loss"], best["eval_loss"], kept, resumed, peak)
    if first:
        _finish(job, examples, trainer, outcome, log)
    processes.wait_for_everyone()
    return outcome


def _finish(job: Job, examples: Examples, trainer: Any, outcome: Outcome, log: Path) -> None:
    adapter, made = job.work / "adapter", job.work / "made"
    shutil.rmtree(adapter, ignore_errors=True)
    shutil.rmtree(made, ignore_errors=True)
    # Without its embeddings, which did not learn and which peft would otherwise look for on the hub.
    trainer.model.save_pretrained(adapter, save_embedding_layers=False)
    (adapter / "README.md").unlink(missing_ok=True)
    if job.merged:
        merge(job.model, adapter, made)
    else:
        adapter.rename(made)
    about = {
        **job.describe(examples),
        "merged": job.merged,
        "steps": trainer.state.max_steps,
        "kept_step": outcome.step,
        "before": outcome.before,
        "after": outcome.after,
        "peak_gpu_bytes": outcome.peak_bytes,
        "versions": versions(),
    }
    shutil.copyfile(log, made / "training_log.jsonl")
    write_json(made / RESULT, about)
    write_card(made, about)
    if job.out.exists():
        job.out.rmdir()  # An empty folder, as ``check`` saw.
    made.rename(job.out)
    shutil.rmtree(job.work)


def _same_job(job: Job, examples: Examples) -> None:
    """Refuse to go on with what another job left; note what this one is. Without a checkpoint nothing is lost."""
    path, about = job.work / "job.json", json.loads(json.dumps(job.describe(examples)))
    found = json.loads(path.read_text()) if path.is_file() else None
    if found is not None and _begun(job):
        if wrong := [name for name, value in about["settings"].items() if found["settings"].get(name) != value]:
            was, now = found["settings"].get(wrong[0]), about["settings"][wrong[0]]
            what = f"another {wrong[0].replace('_', ' ')} ({was}, not {now})"
        elif others := [name for name, value in about.items() if found.get(name) != value]:
            what = {"data": "other data", "model": "another model"}.get(others[0], "another --start-from")
        else:
            return
        raise ParetoError(
            f"{job.work} is an unfinished run with {what}; give the same as then, another --out, or delete that folder"
        )
    strange = [path for path in job.work.iterdir() if path.name not in ("lock", "job.json", "log.jsonl", "adapter")]
    if strange and found is None:
        raise ParetoError(f"{job.work} holds {strange[0].name}, which pareto did not write; give another --out")
    write_json(path, about)


def _begun(job: Job) -> bool:
    """Return whether a run left checkpoints."""
    return any(job.work.glob("checkpoint-*"))


@contextlib.contextmanager
def _memory_explained(job: Job) -> Iterator[None]:
    """Answer memory that runs out by what would take less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(sign in str(error).lower() for sign in MEMORY_SIGNS):
            raise
        settings, less = job.settings, []
        if settings.micro_batch > 1:
            less.append(f"--micro-batch {settings.micro_batch // 2} (the same result, slower)")
        if not settings.checkpointing:
            less.append("--checkpointing (the same result, slower)")
        less.append(f"--length {max(2, settings.length // 2)}")
        if settings.rank > 1:
            less.append(f"--lora-rank {settings.rank // 2}")
        raise ParetoError(f"out of memory on {job.device}; give {', or '.join(less)}") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a result depends on."""
    import importlib.metadata

    names = ("torch", "transformers", "peft", "trl", "accelerate", "vllm-pareto")
    return {name: importlib.metadata.version(name) for name in names}
