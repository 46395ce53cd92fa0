"""One fine-tuning from a model's name to an adapter: what is read, what goes on where it was stopped.

Everything that is not finished lies in a folder beside the output, which appears in one piece at the end.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import quiet_transformers
from quant_methods.checkpoints.checkpoint import full_disk_explained
from quant_methods.checkpoints.replaceable import check_apart
from quant_methods.finetuning.examples import Examples, read_examples
from quant_methods.finetuning.merge import merge
from quant_methods.finetuning.settings import Settings
from quant_methods.model_source import fingerprint, name_of, read_config
from quant_methods.training.arguments import products_dtype
from quant_methods.training.card import write_card
from quant_methods.training.memory import memory_explained
from quant_methods.training.unfinished import LOG, alone, check_new, finish, same_job, versions

RESULT = "pareto_finetuning.json"
"""What a result says of how it came about."""

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
        if self.settings.pooled and (not self.merged or self.start_from is not None):
            raise ParetoError(
                "--pooled is for --merge, since no server adds pooled adapters beside a checkpoint, and not for "
                "--start-from, since zero-points hold no errors of single weights"
            )
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
        less = [f"--lora-rank {job.settings.rank // 2}"] if job.settings.rank > 1 else []
        own = alone(job.work) if first else contextlib.nullcontext()
        with own, memory_explained(job.device, job.settings, less):
            return _finetune(job, examples, processes, say if first else lambda line: None)


def _finetune(job: Job, examples: Examples, processes: Any, say: Say) -> Outcome:
    from quant_methods.finetuning.load import load_coded
    from quant_methods.finetuning.start import start_from_error
    from quant_methods.finetuning.tuner import first_tokens, tuner, with_adapter
    from quant_methods.training.checkpoints import last_whole, step_of
    from quant_methods.training.log import Log, read_looks

    first, device = processes.is_main_process, job.device
    with processes.main_process_first():
        if first:
            same_job(job.work, job.describe(examples))
        before = last_whole(job.work, delete=first)
    if device.startswith("cuda"):
        device = str(processes.device)
        torch.cuda.reset_peak_memory_stats()
    log = job.work / LOG
    model = with_adapter(load_coded(job.model, device, products_dtype(job.settings, device)), job.settings)
    trainer = tuner(model, job.model, examples, job.settings, job.work, device, Log(log, say))
    if job.start_from is not None and before is None:
        share = start_from_error(model, job.start_from, first_tokens(trainer))
        say(f"the adapter takes back {share:.1%} of the error of layers' outputs at its start")
    resumed = step_of(before)
    if resumed:
        say(f"goes on from step {resumed}")
    with quiet_transformers():
        trainer.train(resume_from_checkpoint=None if before is None else str(before))
    looks = read_looks(log)
    processes.wait_for_everyone()  # What all read here goes with the work folder when the first one ends.
    # A start that no step improved on is not kept: an adapter that does nothing is of no use.
    kept = trainer.state.best_global_step or trainer.state.global_step
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0
    start = looks[min(looks)]
    outcome = Outcome(job.out, start["eval_loss"], looks[kept]["eval_loss"], kept, resumed, peak)
    if first:
        _finish(job, examples, trainer, outcome)
    processes.wait_for_everyone()
    return outcome


def _finish(job: Job, examples: Examples, trainer: Any, outcome: Outcome) -> None:
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
        "products": str(products_dtype(job.settings, job.device)).removeprefix("torch."),
        "versions": versions("peft", "trl"),
    }
    _write_card(made, about)
    finish(made, job.out, job.work, RESULT, about)


def _write_card(folder: Path, about: dict[str, Any]) -> None:
    """Write the model card of an adapter, or of a checkpoint that it was merged into."""
    data, model, start = about["data"], about["model"], about["start_from"]
    merged = "The adapter is merged, and kept in `adapter/`." if about["merged"] else "This is an adapter of peft's."
    began = "" if start is None else f"It began as what quantization took from `{start['name']}`. "
    write_card(
        folder,
        title=f"{model['name']}, fine-tuned",
        labels={
            "library_name": "transformers" if about["merged"] else "peft",
            "base_model": model["name"],
            "tags": "[lora, vllm-pareto]",
        },
        text=f"""{merged} {began}The state after step {about["kept_step"]} of {about["steps"]} was kept, the best on
{data["held_out"]} examples that it never saw: a loss of {about["before"]:.4f} before, {about["after"]:.4f} after.""",
        settings=about["settings"],
        data=f"""Data: {data["training"]:,} examples of `{data["source"]}`, SHA-256 `{data["sha256"]}`. Base
model: SHA-256 `{model["sha256"]}`.""",
        versions=about["versions"],
        result=RESULT,
        learnt_from="the base model",
    )
