"""``compress_to_budget``: measures sensitivities, assigns widths, compresses, keeps the measures with the result."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.checkpoint import full_disk_explained
from quant_methods.compress import compress, prepare, work_of
from quant_methods.fused import is_expert
from quant_methods.mixed_precision.budget import Assignment, Budget, Loss, assign, mixed_recipe
from quant_methods.mixed_precision.owl import by_outliers, check_owl
from quant_methods.mixed_precision.sensitivity import Sensitivity, Settings, read_units
from quant_methods.mixed_precision.sensitivity_plot import plot
from quant_methods.mixed_precision.units import PERCENTS, WIDTHS, Unit, Width, unmeasured
from quant_methods.model_source import digest, fingerprint
from quant_methods.plan import Plan
from quant_methods.recipe import Recipe
from quant_methods.report import Report
from quant_methods.run import MEASURES, KVBits, Progress
from quant_methods.steps import PruneStep, TransformStep
from quant_methods.stock_vllm import Serving
from quant_methods.work_folder import locked

SCHEMA = "vllm-pareto/sensitivity/1"
JSON_FILE, PLOT_FILE = "pareto_sensitivity.json", "pareto_sensitivity.png"


def compress_to_budget(
    model: str | os.PathLike[str],
    recipe: Recipe,
    budget: Budget,
    out: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    loss: Loss = "kl",
    measured: Path | None = None,
    text: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = lambda done, total, what: None,
    chosen: Callable[[Assignment], None] = lambda assignment: None,
    kv_bits: KVBits | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[Report, Recipe]:
    """Compress a model to a budget.

    Args:
        model: an embedded model's name, a directory, or a hub name.
        recipe: how; its steps' bits are replaced by the widths that are chosen.
        budget: the limit.
        out: directory of the checkpoint.
        settings: how sensitivity is measured; None for the defaults.
        loss: which measure is added up.
        measured: ``pareto_sensitivity.json`` of an earlier checkpoint, to be used instead of measuring again.
        text: calibration text (.txt or .jsonl); None lets the model write its own.
        device: torch device for the arithmetic.
        overwrite: replace ``out``, and drop an unfinished run of something else.
        progress: told how far the measuring and then the compression is.
        chosen: told the assignment, before the compression starts.
        kv_bits: chooses bits for each layer's KV cache; None: the checkpoint names none.
        say: told what is done otherwise than the recipe says, a line each.

    Returns:
        The compression's report, and the recipe that was carried out.

    Raises:
        ParetoError: bad input, or a budget that cannot be met.

    """
    out = Path(out)
    model_dir, decoder, plan, settings = check_budget(
        model, recipe, budget, out, settings=settings or Settings(), loss=loss, device=device, overwrite=overwrite
    )
    if kv_bits is not None:
        kv_bits.check(decoder, recipe)
    for line in plan.notes:
        say(line)
    sequences = functools.partial(_sequences, model_dir, decoder, recipe, settings, text, progress)
    if loss == "owl":
        key, assignment = "", by_outliers(decoder, plan, sequences(), budget, progress)
    else:
        units, key = _measures(
            model_dir, decoder, plan, recipe, settings, measured=measured, tokens=sequences(), out=out,
            progress=progress,
        )  # fmt: skip
        assignment = assign(units, plan, decoder.source, budget, loss)
    chosen(assignment)
    mixed = mixed_recipe(recipe, plan, assignment, budget)
    document = {
        "schema": SCHEMA,
        "key": key,
        "model": model_dir.name,
        "recipe": recipe.name,
        "budget": budget.text,
        "settings": {**dataclasses.asdict(settings), "widths": list(map(str, settings.widths))},
        **assignment.to_dict(),
    }
    attachments = {
        JSON_FILE: (json.dumps(document, indent=2) + "\n").encode(),
    }
    if loss != "owl":
        attachments[PLOT_FILE] = plot(assignment, f"{model_dir.name}, {recipe.name}, budget {budget.text}")
    report = compress(
        model,
        mixed,
        out,
        text=text,
        device=device,
        overwrite=overwrite,
        progress=progress,
        attachments=attachments,
        kv_bits=kv_bits,
        say=say,
    )
    return report, mixed


def check_budget(
    model: str | os.PathLike[str],
    recipe: Recipe,
    budget: Budget,
    out: Path,
    *,
    settings: Settings,
    loss: Loss,
    device: str,
    overwrite: bool,
) -> tuple[Path, Decoder, Plan, Settings]:
    """Check everything that can be checked before any measuring, a budget too small or too large included.

    Returns:
        What ``prepare`` does, and the settings as they apply.

    Raises:
        ParetoError: bad input.

    """
    model_dir, decoder, plan = prepare(model, recipe, out, device=device, overwrite=overwrite)
    if not plan.changed:
        raise ParetoError(
            f"recipe {recipe.name} has no step that rounds or prunes weights, so a budget has nothing to choose"
        )
    if plan.prunes and plan.steps and set(plan.prunes) != set(plan.steps):
        odd = min(set(plan.prunes) ^ set(plan.steps))
        raise ParetoError(
            f"recipe {recipe.name}: {odd} is pruned or rounded and not both, and a budget chooses for layers that are "
            "changed alike; give the steps the same targets, and ignore layers that no group size fits"
        )
    if isinstance(plan.training, PruneStep):
        raise ParetoError(
            f"recipe {recipe.name}: {plan.training.method} chooses zeros while it trains, and a budget before; take a "
            "prune step and recover, e.g. sparsegpt-50-recovered"
        )
    if not plan.prunes and (budget.sparsity is not None or loss == "owl"):
        what = "owl" if loss == "owl" else f"budget {budget.text}"
        raise ParetoError(
            f"recipe {recipe.name} prunes nothing, and {what} says where "
            "zeros go; add a prune step, e.g. {method: sparsegpt}, or give bits such as 4.25bits"
        )
    if (step := next((step for step in plan.steps.values() if step.store != "dense"), None)) is not None:
        raise ParetoError(
            f"recipe {recipe.name}: {step.method} with store: {step.store} has 4 bits alone, and a budget chooses "
            "bits; give store: dense with it"
        )
    if (step := next((step for step in plan.steps.values() if not step.plain), None)) is not None:
        raise ParetoError(
            f"recipe {recipe.name}: {step.method} keeps parts beside its codes, and a budget counts codes and scales "
            "alone; use a recipe that rounds to a grid and nothing else"
        )
    settings = dataclasses.replace(settings, kl=settings.kl and loss == "kl", widths=usable(settings, plan))
    if loss == "owl":
        check_owl(plan, budget)
        return model_dir, decoder, plan, settings
    blank = [unit for index in range(len(decoder.blocks)) for unit in unmeasured(decoder, plan, index, settings.widths)]
    assign(blank, plan, decoder.source, budget, loss)
    return model_dir, decoder, plan, settings


def usable(settings: Settings, plan: Plan) -> tuple[Width, ...]:
    """Return the widths in rising order; of the default ones those that the plan's steps can have.

    Raises:
        ParetoError: a step cannot have a width that was asked for.

    """
    widths = set()
    experts = any(map(is_expert, plan.steps))
    asked = settings.widths
    if plan.prunes and asked == WIDTHS:
        bits = {step.bits for step in plan.steps.values()} or {16}
        asked = tuple(Width(each, None, percent) for each in bits for percent in PERCENTS)
    if plan.prunes and not any(width.percent for width in asked):
        method = next(iter(plan.prunes.values())).method
        raise ParetoError(f"{method} prunes weights, and no width of --widths has zeros, such as 4s50; add some")
    for width in asked:
        try:
            if width.percent:
                pruning: list[PruneStep | None] = [*plan.prunes.values()]
                for prune in pruning or [None]:
                    width.prune(prune)
            if width.bits != 16 and not plan.steps:
                raise ParetoError("the recipe has no step that rounds; use 16 bits, such as 16s50, or add one")
            steps = [width.step(step) for step in set(plan.steps.values())] if width.bits != 16 else []
            if experts and Serving.of(steps).plugin:
                raise ParetoError(
                    "the recipe rounds experts, and stock vLLM, which serves these, has 4 and 8 bits; leave experts "
                    "out with --ignore '*.experts.*'"
                )
            widths.add(width)
        except ParetoError as error:
            if asked != WIDTHS:
                raise ParetoError(f"width {width}: {error}") from error
    return tuple(sorted(widths, key=lambda width: width.rank))


def _sequences(
    model_dir: Path,
    decoder: Decoder,
    recipe: Recipe,
    settings: Settings,
    text: str | os.PathLike[str] | None,
    progress: Progress,
) -> Tensor:
    """Return the sequences [number, length] that measuring takes of those that the compression will use."""
    data = recipe.calibration
    needed = min(data.num_samples, settings.hessian_sequences + settings.kl_sequences)
    return load_sequences(
        model_dir,
        None if text is None else Path(text),
        # Samples depend on how many there are.
        data.num_samples if text is None else needed,
        data.length,
        data.seed,
        device=str(decoder.device),
        progress=lambda done, steps: progress(0, len(decoder.blocks), f"sampling text, {100 * done // steps}%"),
    )[:needed]


def _measures(
    model_dir: Path,
    decoder: Decoder,
    plan: Plan,
    recipe: Recipe,
    settings: Settings,
    *,
    measured: Path | None,
    tokens: Tensor,
    out: Path,
    progress: Progress,
) -> tuple[list[Unit], str]:
    """Return every unit's measures, taken from a file, from the state directory or now; and their key."""
    pruning: dict[str, dict[str, object]] = {
        name: {"method": step.method, **dataclasses.asdict(step)} for name, step in plan.prunes.items()
    }
    for values in pruning.values():
        del values["targets"], values["sparsity"]
    steps = {name: {"method": step.method, **dataclasses.asdict(step)} for name, step in plan.steps.items()}
    for values in steps.values():
        del values["targets"], values["bits"]
    key = digest(
        {
            "model": fingerprint(model_dir),
            "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "steps": steps,
            **({"pruning": pruning} if pruning else {}),
            # What happens to the rounded model later changes no measure.
            "before": [
                data
                for step, data in zip(recipe.steps, recipe.to_dict()["steps"], strict=True)
                if isinstance(step, TransformStep)
            ],
            "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "widths"},
            "device": decoder.device.type,
            "torch": torch.__version__,
        }
    )
    if measured is not None:
        if not measured.is_file():
            raise ParetoError(f"{measured}: no such file; give the {JSON_FILE} of an earlier checkpoint")
        try:
            units = read_units(measured, key, settings)
        except (ValueError, KeyError, TypeError) as error:
            raise ParetoError(f"{measured} is not a {JSON_FILE}") from error
        if units is None:
            raise ParetoError(
                f"{measured} was measured with another model, recipe, text, device, library version or other widths; "
                "leave it out to measure again"
            )
        return units, key
    work = work_of(out)
    with full_disk_explained(work), locked(work):
        run = Sensitivity(decoder, plan, tokens, settings=settings, folder=work / MEASURES, key=key, progress=progress)
        return run.measure(), key
