"""The room's one verb: ``compress(model, recipe, out)``. What it refuses is refused here, before any work."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from kv_cache.errors import ParetoError
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.finite import check_weights
from quant_methods.checkpoints.checkpoint import Source, full_disk_explained
from quant_methods.checkpoints.replaceable import check_apart, check_replaceable, check_unfinished
from quant_methods.handlers import SOURCE_STEPS
from quant_methods.model_source import resolve_model
from quant_methods.plan import Plan, make_plan
from quant_methods.recipe import Recipe
from quant_methods.recipe_file import load_recipe
from quant_methods.report import Report
from quant_methods.run import KVBits, Progress, Run
from quant_methods.steps import SourceStep
from quant_methods.trained_first import Origin, finished, folder_of, halves


def compress(
    model: str | os.PathLike[str],
    recipe: Recipe | str,
    out: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = lambda done, total, what: None,
    attachments: Mapping[str, bytes] | None = None,
    kv_bits: KVBits | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Report:
    """Write a compressed checkpoint that vLLM serves.

    Args:
        model: an embedded model's name, a directory, or a hub name.
        recipe: a recipe, a built-in recipe's name, or a YAML file.
        out: directory of the checkpoint.
        text: calibration text (.txt or .jsonl); None lets the model write its own, or, where only KV scales are wanted,
            takes the text that ships with this package.
        device: torch device for the arithmetic.
        overwrite: replace ``out``, and drop an unfinished run of something else.
        progress: told how far the run is.
        attachments: files to put beside the weights, by name.
        kv_bits: chooses bits for each layer's KV cache; None: the checkpoint names none.
        say: told, before any work, what is done otherwise than the recipe says, a line each.

    Raises:
        ParetoError: bad input; see the modules of this room.

    """
    started = time.monotonic()
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    out = Path(out)
    model_dir, decoder, plan = prepare(
        model, recipe, out, device=device, overwrite=overwrite, as_stored=not recipe.steps, text=text
    )
    if kv_bits is not None:
        kv_bits.check(decoder, recipe)
    for line in plan.notes:
        say(line)
    work, origin = work_of(out), None
    with full_disk_explained(work):
        if (split := halves(recipe)) is not None:
            folder = _trained(model, split[0], folder_of(work), text, device, overwrite=overwrite, progress=progress)
            origin = Origin(model_dir, folder, recipe)
            recipe = split[1]
            model_dir, decoder, plan = prepare(folder, recipe, out, device=device, overwrite=overwrite, text=text)
        run = Run(
            model=model,
            model_dir=model_dir,
            recipe=recipe,
            out=out,
            work=work,
            text=text,
            decoder=decoder,
            plan=plan,
            overwrite=overwrite,
            progress=progress,
            attachments=attachments or {},
            kv_bits=kv_bits,
            origin=origin,
        )
        return run.finish(started)


def _trained(
    model: str | os.PathLike[str],
    recipe: Recipe,
    folder: Path,
    text: str | os.PathLike[str] | None,
    device: str,
    *,
    overwrite: bool,
    progress: Progress,
) -> Path:
    """Carry out the first half of a recipe, unless that was done before, and return its checkpoint."""
    model_dir, decoder, plan = prepare(model, recipe, folder, device=device, overwrite=True)
    run = Run(
        model=model,
        model_dir=model_dir,
        recipe=recipe,
        out=folder,
        work=work_of(folder),
        text=text,
        decoder=decoder,
        plan=plan,
        overwrite=overwrite,
        progress=progress,
        attachments={},
    )
    if not finished(run, overwrite=overwrite):
        run.finish(time.monotonic())
    return folder


def work_of(out: Path) -> Path:
    """Return where an unfinished run lies."""
    return out.with_name(out.name + ".partial")


def prepare(
    model: str | os.PathLike[str],
    recipe: Recipe,
    out: Path,
    *,
    device: str,
    overwrite: bool,
    as_stored: bool = False,
    text: str | os.PathLike[str] | None = None,
    inside: bool = False,
) -> tuple[Path, Decoder, Plan]:
    """Check everything that can be checked before any work; return the model's directory, its decoder and the plan.

    Args:
        model: an embedded model's name, a directory, or a hub name.
        recipe: what is to be done.
        out: directory of the result.
        device: torch device for the arithmetic.
        overwrite: replace ``out``.
        as_stored: blocks are only watched, so that the model may be stored in any way, quantized or not.
        text: calibration text, which must not lie in what is replaced.
        inside: results are written beside what lies in ``out``, and replace only files of the same names.

    Raises:
        ParetoError: bad input.

    """
    recipe.check()
    model_dir = resolve_model(model, quantized=as_stored)
    device = check_device(device)
    check_out(out, model_dir, overwrite=overwrite, text=text, inside=inside)
    decoder = Decoder(model_dir, None if as_stored else _source(model_dir, recipe), device)
    decoder.source.check_block(decoder.blocks[0], decoder.config)
    plan = make_plan(decoder, recipe, model_dir)
    check_outside(decoder)
    _check_disk(out, decoder.source, plan)
    return model_dir, decoder, plan


def check_outside(decoder: Decoder) -> None:
    """Refuse a checkpoint with NaN or infinity outside of its blocks, where no step looks and all of it is copied.

    Raises:
        ParetoError: with the tensor's name.

    """
    if isinstance(decoder.source, Source):
        for name in decoder.source.entries:
            # A quantized checkpoint stores tensors that are none of the model's parameters.
            if not name.startswith(f"{decoder.prefix}.") and name in decoder.source:
                check_weights({name: decoder.source.read(name)})


def _source(model_dir: Path, recipe: Recipe) -> Source:
    """Return the checkpoint as the recipe's other steps are to see it."""
    source = Source(model_dir)
    for step in recipe.steps:
        if isinstance(step, SourceStep):
            source = SOURCE_STEPS[type(step)](step, source)
    return source


def check_out(
    out: Path, model_dir: Path, *, overwrite: bool, text: str | os.PathLike[str] | None = None, inside: bool = False
) -> None:
    """Refuse a place for results that has something else.

    Args:
        out: the place.
        model_dir: the model's directory.
        overwrite: replace what a run of ours left there.
        text: calibration text, which may lie there.
        inside: results are written beside what lies there already, so nothing is replaced.

    Raises:
        ParetoError: ``out`` exists, or is or holds something that has to stay.

    """
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise ParetoError(f"{out} exists; give --overwrite to replace it, or another --out")
    if inside:
        check_apart(out, {"the model": model_dir})
        return
    needed = {"the model": model_dir} | ({} if text is None else {"the calibration text": Path(text)})
    check_apart(out, needed | {"the current folder": Path.cwd(), "the home folder": Path.home()})
    check_replaceable(out)
    check_unfinished(work_of(out))


def default_device(recipe: Recipe) -> str:
    """Return where a recipe runs unless told otherwise: KV scales alone, which any device makes alike, on a GPU."""
    return "cuda" if not recipe.steps and torch.cuda.is_available() else "cpu"


def check_device(device: str) -> str:
    """Return the device.

    Raises:
        ParetoError: it is not available here.

    """
    try:
        kind = torch.device(device).type
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ParetoError(f"--device {device} is not available here; devices: cpu" + _cuda_hint()) from error
    if kind == "meta":
        raise ParetoError("--device meta cannot compute; use cpu or cuda")
    return device


def _cuda_hint() -> str:
    return ", cuda" if torch.cuda.is_available() else ""


def _check_disk(out: Path, source: Source, plan: Plan) -> None:
    """Refuse a run that cannot fit: the finished blocks (and tuned ones) and the checkpoint lie side by side."""
    changed = [f"{name}.weight" for name in plan.changed]
    size = {name: e["data_offsets"][1] - e["data_offsets"][0] for name, (_, e) in source.entries.items()}
    steps = {f"{name}.weight": step for name, step in plan.steps.items()}
    blocks = sum(int(steps[n].bits / 8 * size[n] / 2 * 1.1) if n in steps else size[n] for n in changed if n in size)
    kept = source.size() - sum(size.get(name, 0) for name in changed)
    needed = (2 + (plan.final is not None) + (plan.training is not None)) * blocks + kept
    parent = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ParetoError(f"{parent}: {free / 1e9:.2f} GB free, and about {needed / 1e9:.2f} GB are needed for {out}")
