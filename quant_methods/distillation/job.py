"""One distillation from its teacher's name to a checkpoint: what is read, what goes on where it was stopped.

Everything that is not finished lies in a folder beside the output, which appears in one piece at the end.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import describe, quiet_transformers
from quant_methods.checkpoints.checkpoint import full_disk_explained
from quant_methods.checkpoints.replaceable import check_apart
from quant_methods.distillation.cut import Sizes
from quant_methods.distillation.data import Data, load
from quant_methods.distillation.settings import Settings
from quant_methods.model_source import fingerprint, read_config
from quant_methods.training.arguments import products_dtype
from quant_methods.training.card import table, write_card
from quant_methods.training.memory import memory_explained
from quant_methods.training.unfinished import CHECKPOINTS, LOG, alone, check_new, finish, same_job, versions

if TYPE_CHECKING:
    from quant_methods.distillation.codes import CodedCache
    from quant_methods.distillation.teacher import Teacher

RESULT = "pareto_distillation.json"
"""What a distilled checkpoint says of how it came about."""
CALIBRATION = 16
"""Sequences, from the first on, that parts' importance and KV scales are measured on."""

Say = Callable[[str], object]


def check_one_student(given: object, shape: object, sizes: Sizes) -> None:
    """Refuse a job without a student, or with several.

    Args:
        given: a student that is given, or None.
        shape: the shape of one, or None.
        sizes: of one that is cut out of its teacher.

    Raises:
        ParetoError: not one of the three.

    """
    if sum([given is not None, shape is not None, sizes != Sizes()]) != 1:
        raise ParetoError(
            "give one student: --student MODEL, --student-config FILE, or --keep-layers (and other --keep-...) to cut "
            "it out of its teacher"
        )


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        teacher: folder of its checkpoint; of a served teacher one with its tokenizer and configuration.
        text: the data's file.
        out: folder of the student.
        settings: how it learns.
        student: folder of a student that is given.
        shape: file of a student's shape.
        sizes: of a student that is cut out of its teacher.
        url: of a server that runs the teacher.
        cache: folder of the teacher's top tokens; None: beside the output, if there are any.
        top_k: how many of them; 0: the teacher runs in memory.
        weight_bits: bits of the student's weights while it learns, and their group size; None: as they are.
        kv_bits: of its keys and values.
        device: torch device.

    """

    teacher: Path
    text: Path
    out: Path
    settings: Settings
    student: Path | None = None
    shape: Path | None = None
    sizes: Sizes = field(default_factory=Sizes)
    url: str | None = None
    cache: Path | None = None
    top_k: int = 0
    weight_bits: tuple[int, int] | None = None
    kv_bits: tuple[int, int] | None = None
    device: str = "cpu"

    @property
    def work(self) -> Path:
        """The folder of what is not finished."""
        return self.out.with_name(f".{self.out.name}.distill")

    def check(self) -> None:
        """Refuse what cannot be done, before anything is loaded.

        Raises:
            ParetoError: with the first such thing.

        """
        self.settings.check()
        check_one_student(self.student, self.shape, self.sizes)
        if self.url and self.sizes != Sizes():
            raise ParetoError("a student cannot be cut out of a teacher that a server runs; give the teacher's folder")
        if self.settings.on_policy and (self.url or self.top_k):
            raise ParetoError(
                "--on-policy: what a student will write nobody can ask a teacher before; leave out --top-k and --url, "
                "so that it is in memory"
            )
        check_new(self.out)
        check_apart(self.out, {"the teacher": self.teacher, "the data": self.text})

    def describe(self, data: Data) -> dict[str, Any]:
        """Return what determines the result, as JSON values."""
        made = "cut" if self.student is None and self.shape is None else "fresh" if self.student is None else "given"
        student: Any = self.sizes.__dict__
        if self.student is not None:
            student = fingerprint(self.student)
        elif self.shape is not None:
            student = self.shape.read_text(encoding="utf-8")
        return {
            "teacher": self.url or fingerprint(self.teacher),
            "student": {"how": made, "what": student},
            "data": describe(data.tokens, self.text.name, self.settings.seed) | {"held_out": data.held_out},
            "settings": self.settings.as_json(),
            "top_k": self.top_k,
            "weight_bits": None if self.weight_bits is None else list(self.weight_bits),
            "kv_bits": None if self.kv_bits is None else list(self.kv_bits),
        }


@dataclass(frozen=True)
class Outcome:
    """What a distillation made.

    Attributes:
        out: the student's folder.
        best: figures of the held-out sequences in the state that was kept, by name.
        start: the same before the first step.
        step: of the state that was kept.
        resumed: the step that this run went on from.

    """

    out: Path
    best: dict[str, float]
    start: dict[str, float]
    step: int
    resumed: int


def distill(job: Job, say: Say = lambda line: None) -> Outcome:
    """Do a job, or what is left of it.

    Args:
        job: what is to be done.
        say: takes lines to read.

    Raises:
        ParetoError: bad input, a full disk or memory, or a folder of another job.

    """
    job.check()
    with full_disk_explained(job.work):
        data = load(
            job.teacher, job.text, job.settings.samples, job.settings.held_out, job.settings.length, job.settings.seed
        )
        from accelerate import PartialState

        # One process of several writes; the others find what it wrote.
        processes = PartialState(cpu=torch.device(job.device).type == "cpu")
        first = processes.is_main_process
        own = alone(job.work, (CHECKPOINTS, "start", "teacher")) if first else contextlib.nullcontext()
        less = [] if job.top_k or job.url else ["--top-k 64 (the teacher is not in memory then)"]
        with own, memory_explained(job.device, job.settings, less):
            return _distill(job, data, processes, say if first else lambda line: None)


def _distill(job: Job, data: Data, processes: Any, say: Say) -> Outcome:
    from quant_methods.distillation.distiller import Distiller
    from quant_methods.distillation.student import let_learn, save
    from quant_methods.training.checkpoints import last_whole, step_of
    from quant_methods.training.log import Log, read_looks

    device = str(processes.device)
    first = processes.is_main_process
    with processes.main_process_first():
        if first:
            same_job(job.work, job.describe(data), drop=("start",))
        start = _start(job, data, device, say) if first or not (job.work / "start").is_dir() else job.work / "start"
        teacher = _teacher(job, data, device, say)
    teacher.check(job.settings.temperatures, hidden=bool(job.settings.hidden))
    from quant_methods.distillation.codes import observe_attention, round_weights
    from quant_methods.distillation.in_memory import load_model
    from quant_methods.distillation.on_policy import Writer, stop_tokens

    student = load_model(start, device).train()
    let_learn(student, job.settings.targets)
    cache = _cache(job, data, start, device)
    if cache is not None:
        observe_attention(student)
    tokens = job.settings.batch * job.settings.length
    log = Log(job.work / LOG, say, tokens)
    writer = Writer(data, job.settings, stop_tokens(job.teacher)) if job.settings.on_policy else None
    trainer = Distiller(
        student, teacher, data, job.settings, work=job.work, device=device, cache=cache, writer=writer, callbacks=[log]
    )
    if job.weight_bits is not None:
        round_weights(student, *job.weight_bits)
    trainer.remove_callback(_printer())
    before = last_whole(job.work, delete=first)
    processes.wait_for_everyone()
    resumed = step_of(before)
    if resumed:
        say(f"goes on from step {resumed}")
    with quiet_transformers():
        trainer.train(resume_from_checkpoint=None if before is None else str(before))
    looks = read_looks(log.path)
    processes.wait_for_everyone()  # What all read here goes with the work folder when the first one ends.
    kept = _best_step(looks, trainer)
    outcome = Outcome(job.out, _figures(looks[kept]), _figures(looks[min(looks)]), kept, resumed)
    if first:
        made = job.work / "made"
        shutil.rmtree(made, ignore_errors=True)
        result = trainer.result()
        if not kept:
            result.load_state_dict(load_model(start, "cpu").state_dict())
        save(result, job.teacher, made, _stored_dtype(job))
        if cache is not None:
            cache.follow(result)
            cache.scales.save(made)
        about = {
            **job.describe(data),
            "teacher": teacher.description,
            "kept_step": kept,
            "steps": trainer.state.max_steps,
            "before": outcome.start,
            "after": outcome.best,
            "products": str(products_dtype(job.settings, job.device)).removeprefix("torch."),
            "versions": versions(),
        }
        _write_card(made, about)
        finish(made, job.out, job.work, RESULT, about)
    processes.wait_for_everyone()
    return outcome


def _best_step(looks: dict[int, dict[str, Any]], trainer: Any) -> int:
    """Return the step whose state does best on held-out sequences; 0 where no step improved on the start.

    The Trainer compares checkpoints only, and there is none of the start.
    """
    kept, figure = trainer.state.best_global_step or trainer.state.global_step, trainer.args.metric_for_best_model
    return kept if 0 not in looks or looks[kept][figure] < looks[0][figure] else 0


def _start(job: Job, data: Data, device: str, say: Say) -> Path:
    """Return the folder of the student before the first step; what is fresh or cut is written there once."""
    from quant_methods.distillation import student
    from quant_methods.distillation.cut import cut
    from quant_methods.distillation.in_memory import load_model

    if job.student is not None:
        student.check_tokenizer(job.teacher, job.student)
        if "quantization_config" in read_config(job.student):
            raise ParetoError(f"{job.student} is quantized already; give a student in 16 or 32 bits")
        return job.student
    folder = job.work / "start"
    if folder.is_dir():
        return folder
    if job.shape is not None:
        model = student.fresh(job.teacher, job.shape, job.settings.seed)
    else:
        say("measuring what the teacher's parts do")
        model = cut(load_model(job.teacher, device), job.sizes, data.tokens[: min(CALIBRATION, len(data))])
    partial = job.work / "start.partial"
    shutil.rmtree(partial, ignore_errors=True)
    student.save(model, job.teacher, partial, torch.float32)
    partial.rename(folder)
    return folder


def _teacher(job: Job, data: Data, device: str, say: Say) -> Teacher:
    """Return the teacher; one whose top tokens are kept has said all of them by then."""
    from quant_methods.distillation.cached import Cached, FromModel, Producer
    from quant_methods.distillation.in_memory import InMemory

    producer: Producer
    if job.url is not None:
        from quant_methods.distillation.served import Served

        served = Served(job.url)
        producer, described = served, served.description
    else:
        dtype = products_dtype(job.settings, device)
        memory = InMemory(job.teacher, device, dtype, hidden=bool(job.settings.hidden))
        if not job.top_k:
            return memory
        producer, described = FromModel(memory, fingerprint(job.teacher)), memory.description
    cached = Cached(
        job.cache or job.work / "teacher",
        producer,
        data.tokens,
        k=job.top_k or 20,
        temperatures=job.settings.temperatures,
        vocabulary=int(read_config(job.teacher)["vocab_size"]),
        description=described,
    )
    missing = cached.missing
    if missing:
        say(f"asking the teacher about {len(missing):,} sequences; top tokens take {cached.shape.size / 1e6:,.1f} MB")
        cached.fill(
            missing, lambda done, total: say(f"teacher: {done} of {total} sequences") if done % 100 == 0 else None
        )
    cached.producer = _Silent()  # A model in memory is not needed any more.
    return cached


class _Silent:
    """Takes the place of a cache's producer when everything is said."""

    identity = ""

    def top(self, tokens: Any, k: int, temperatures: tuple[float, ...]) -> Any:
        """Refuse: nothing is missing."""
        raise AssertionError("a filled cache asked its teacher")


def _cache(job: Job, data: Data, start: Path, device: str) -> CodedCache | None:
    if job.kv_bits is None:
        return None
    from quant_methods.distillation.codes import CodedCache

    tokens = data.tokens[: min(CALIBRATION, len(data))]
    return CodedCache(job.kv_bits, start, tokens, job.settings.seed, device)


def _stored_dtype(job: Job) -> torch.dtype:
    """Return the dtype of the result: the teacher's, if that is one of 16 bits."""
    config = read_config(job.teacher)
    return torch.float16 if (config.get("dtype") or config.get("torch_dtype")) == "float16" else torch.bfloat16


def _printer() -> type:
    """Return transformers' own callback that prints."""
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def _figures(look: dict[str, float]) -> dict[str, float]:
    names = ("loss", "perplexity", "kl")
    return {name: look[f"eval_{name}"] for name in names if f"eval_{name}" in look}


def _write_card(folder: Path, about: dict[str, Any]) -> None:
    """Write the model card of a student: whom it learnt from, what on, how, and how far it came."""
    teacher, data, before = about["teacher"], about["data"], about["before"]
    codes = []
    if about["weight_bits"]:
        bits, group = about["weight_bits"]
        codes.append(f"weights rounded to {bits} bits in groups of {group}")
    if about["kv_bits"]:
        codes.append("keys and values read from codes of {} and {} bits".format(*about["kv_bits"]))
    lived = f"It learnt with {' and '.join(codes)}.\n\n" if codes else ""
    rows = [(name, f"{before[name]:.4f}", f"{value:.4f}") for name, value in about["after"].items()]
    write_card(
        folder,
        title=f"Distilled from {teacher['teacher']}",
        labels={"library_name": "transformers", "tags": "[distillation, vllm-pareto]"},
        text=f"""The student was {about["student"]["how"]}; the teacher was {teacher["kind"]}. The state after step
{about["kept_step"]} of {about["steps"]} was kept, the best on {data["held_out"]} sequences that it never saw.

{lived}{table(("held out", "before", "after"), rows)}

KL is the teacher's from the student in nats a token; all at temperature 1.""",
        settings=about["settings"],
        data=f"""Data: {data["num_samples"]:,} sequences of {data["length"]:,} tokens of `{data["source"]}`, SHA-256 of
the tokens `{data["tokens_sha256"]}`.""",
        versions=about["versions"],
        result=RESULT,
        learnt_from="the teacher",
    )
