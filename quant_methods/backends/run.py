"""One compression by another tool: our recipe in its words, its process, and a look at what it wrote.

The tool works in ``OUT.partial/``, in a process of its own under the Python of its own environment, on the same
calibration tokens as this package would use. Its checkpoint must then read back as a model that differs from the
original, and no more than rounding to nearest would make it: tools are known to have written weights that were
corrupt, or not quantized at all, without a word.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from kv_cache.atomic import write_bytes
from kv_cache.errors import ParetoError
from quant_methods.backends import check
from quant_methods.backends.environment import RUNNERS, Backend, Progress, clean_environment, environment_python
from quant_methods.backends.settings import tool_settings
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.text_source import SAMPLED, describe, load_sequences
from quant_methods.checkpoints import checkpoint
from quant_methods.checkpoints.checkpoint import Source, write_json
from quant_methods.checkpoints.replaceable import RECIPE_FILE
from quant_methods.compress import check_device, check_out, work_of
from quant_methods.model_source import (
    INDEX,
    SINGLE,
    digest,
    fingerprint,
    name_of,
    quantization_settings,
    read_config,
    resolve_model,
    validate_checkpoint,
    weight_files,
)
from quant_methods.plan import make_plan
from quant_methods.recipe import Recipe
from quant_methods.work_folder import empty, locked, put_in_place


@dataclass
class BackendReport:
    """What another tool did.

    Attributes:
        out: the checkpoint.
        tool: name and version.
        layers: number of changed layers.
        bits_per_weight: of these, scales included, as stored.
        sparsity: fraction of their weights that are zero, where the recipe prunes.
        bytes_before: bytes of the original's tensors.
        bytes_after: bytes of the checkpoint's tensors.
        seconds: wall time of the tool, from loading the model to the written checkpoint.
        peak_memory: the tool's peak resident memory in bytes.
        peak_device_memory: the tool's peak memory on a CUDA device in bytes, None elsewhere.
        divergence: KL to the original on a few calibration tokens, nats a token.
        divergence_plain: the same without any method: rounded to nearest, after the smallest weights were dropped.
        shims: what of the tool had to be changed to run here.

    """

    out: Path
    tool: str
    layers: int
    bits_per_weight: float
    sparsity: float | None
    bytes_before: int
    bytes_after: int
    seconds: float
    peak_memory: int
    peak_device_memory: int | None
    divergence: float
    divergence_plain: float
    shims: list[str]


def compress_with(
    backend: Backend,
    model: str | os.PathLike[str],
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    python: Path | None = None,
    create_environment: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> BackendReport:
    """Let another tool write a compressed checkpoint.

    Args:
        backend: the tool.
        model: an embedded model's name, a directory, or a hub name.
        recipe: what to do; ``search``, ``upstream``, ``refit`` and ``kv_scales`` are ours alone and are left out.
        out: directory of the checkpoint.
        text: calibration text (.txt or .jsonl); None lets the model write its own.
        device: torch device for the arithmetic.
        python: the Python of an environment that has the tool; None for the one that this package made.
        create_environment: make that one first.
        overwrite: replace ``out``, and drop an unfinished run.
        progress: told how far the run is.

    Raises:
        ParetoError: bad input, or the tool failed, or what it wrote is not a quantized copy of the model.

    """
    settings = tool_settings(backend, recipe)
    out = Path(out)
    model_dir = resolve_model(model)
    check_device(device)
    check_out(out, model_dir, overwrite=overwrite, text=text)
    decoder = Decoder(model_dir, Source(model_dir), "cpu")
    plan = make_plan(decoder, dataclasses.replace(recipe, kv_scales=False), model_dir)
    lowered = next((n for n, step in plan.steps.items() if step.group_size != settings["group_size"]), None)
    if lowered is not None:
        raise ParetoError(
            f"recipe {recipe.name}: group size {settings['group_size']} does not divide the input channels of {lowered}"
            f", and {backend.name} gives all layers the same; choose another --group-size, e.g. "
            f"{min(step.group_size for step in plan.steps.values())}"
        )
    ignored = [name for name in plan.ignored if name not in plan.changed]
    inside = [name for name in ignored if name.startswith(decoder.prefix + ".")]
    if inside and not backend.ignores:
        raise ParetoError(
            f"recipe {recipe.name}: {backend.name} quantizes all layers alike and cannot ignore {inside[0]}"
        )
    kind = torch.device(device).type
    tool_python = environment_python(backend, kind, python, create=create_environment, progress=progress)
    calibration = recipe.calibration
    needs_data = settings["rounding"] != "rtn" or bool(settings["transform"] or settings["prune"])
    # Without a method that needs data, there must be enough to check with.
    most = min(check.TOKENS, getattr(decoder.config, "max_position_embeddings", None) or check.TOKENS)
    shape = (calibration.num_samples, calibration.length) if needs_data else (check.SEQUENCES, most)
    progress(0, 0, "calibration data")
    tokens = load_sequences(
        model_dir, Path(text) if text else None, *shape, calibration.seed,
        device=device, progress=lambda done, total: progress(done, total, "sampling text"),
    )  # fmt: skip
    provenance = {
        "model": name_of(model),
        "model_sha256": fingerprint(model_dir),
        "recipe": dataclasses.replace(recipe, kv_scales=False).to_dict(),
        "calibration": describe(tokens, Path(text).name if text else SAMPLED, calibration.seed) if needs_data else None,
        "device": kind,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "backend": {"name": backend.name, "python": str(tool_python), "settings": settings},
    }
    work = work_of(out)
    with checkpoint.full_disk_explained(work), _work_directory(work, provenance, overwrite=overwrite):
        dtype = str(decoder.source.dtype(f"{next(iter(plan.changed))}.weight")).removeprefix("torch.")
        job = settings | {"device": device, "ignore": ignored, "dtype": dtype}
        if not (work / "result.json").is_file():
            _prepare(work, model_dir, backend, tokens if needs_data else None, job)
            _run_tool(backend, tool_python, work, progress)
        result = json.loads((work / "result.json").read_text())
        progress(0, 0, "checking what it wrote")
        try:
            target = _collect(work, model_dir, backend, quantized=settings["rounding"] is not None)
            layers, bits, sparsity = check.check_layers(target, decoder, plan, backend)
            found, bar = check.check_model(target, model_dir, plan, tokens, device, backend)
        except ParetoError:
            # The same command runs the tool again, not into the same error.
            (work / "result.json").unlink()
            raise
        provenance["backend"] = {"name": backend.name, "settings": settings, **result}
        provenance["backend"]["check"] = {"kl": found, "kl_plain": bar}
        write_json(target / RECIPE_FILE, provenance)
        size = Source(target).size()
        put_in_place(target, out, work)
    shutil.rmtree(work)
    version = result["versions"][backend.package]
    return BackendReport(
        out, f"{backend.name} {version}", layers, bits, sparsity, decoder.source.size(), size, result["seconds"],
        result["peak_memory"], result["peak_device_memory"], found, bar, result["shims"],
    )  # fmt: skip


@contextlib.contextmanager
def _work_directory(work: Path, provenance: dict[str, Any], *, overwrite: bool) -> Iterator[None]:
    """Create the work directory, or take up one whose tool had finished, and keep other runs out of it."""
    key = digest(provenance)
    with locked(work):
        state = work / "state.json"
        found = json.loads(state.read_text()) if state.is_file() else None
        if found is not None and found["key"] != key and not overwrite:
            raise ParetoError(
                f"{work} holds an unfinished run of something else (recipe {found['recipe']['name']}); repeat that "
                "command to finish it, or give --overwrite to start anew"
            )
        if found is None or found["key"] != key or not (work / "result.json").is_file():
            empty(work)
            write_json(state, {"key": key, **provenance})
        yield


def _prepare(work: Path, model_dir: Path, backend: Backend, tokens: Tensor | None, job: dict[str, Any]) -> None:
    """Write the job: settings, tokens, and the model under a config.json that the tool understands."""
    view = work / "model"
    view.mkdir()
    for path in [*weight_files(model_dir), model_dir / INDEX]:
        if path.is_file():
            (view / path.name).symlink_to(path.resolve())
    checkpoint.copy_companions(model_dir, view)
    config = read_config(model_dir)
    write_json(view / "config.json", older_config(config, model_dir) if backend.old_config else config)
    if tokens is not None:
        write_bytes(work / "tokens.safetensors", save({"tokens": tokens}))
    job |= {
        "model": str(view.absolute()),
        "tokens": None if tokens is None else str((work / "tokens.safetensors").absolute()),
        "out": str((work / "tool").absolute()),
        "result": str((work / "result.json").absolute()),
    }
    write_json(work / "job.json", job)


def older_config(config: dict[str, Any], model_dir: Path) -> dict[str, Any]:
    """Return a config.json as transformers before version 5 reads it.

    It would not see ``rope_parameters`` and silently take a rotary base of 10,000.

    Raises:
        ParetoError: rotary embeddings that differ between layers, for which there was no form.

    """
    old = dict(config)
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    if (rope := old.pop("rope_parameters", None)) is None:
        return old
    if "rope_theta" not in rope:
        raise ParetoError(
            f"{model_dir}: rotary embeddings that differ between layers are newer than this tool; use llm-compressor"
        )
    old["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        old["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return old


def _run_tool(backend: Backend, python: Path, work: Path, progress: Progress) -> None:
    """Run the tool to its end, its progress shown.

    Raises:
        ParetoError: it failed; with the last line of its log.

    """
    reading, writing = os.pipe()
    job = json.loads((work / "job.json").read_text()) | {"progress_fd": writing}
    write_json(work / "job.json", job)
    log = work / "backend.log"
    command = [str(python), str(RUNNERS / backend.runner), str(work / "job.json")]
    with log.open("wb") as output, os.fdopen(reading, encoding="utf-8") as pipe:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, pass_fds=(writing,),
            env=clean_environment(),
        )  # fmt: skip
        os.close(writing)
        try:
            # The pipe ends when the last process that holds it does.
            for line in pipe:
                # A tool that dies may leave half a line.
                with contextlib.suppress(ValueError):
                    said = json.loads(line)
                    progress(said["done"], said["total"], f"{backend.name}: {said['what']}")
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    if status or not (work / "result.json").is_file():
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else f"exit status {status}"
        raise ParetoError(f"{backend.name} failed: {reason} (its log: {log})")


def _collect(work: Path, model_dir: Path, backend: Backend, *, quantized: bool) -> Path:
    """Put the checkpoint together: the tool's weights and quantization settings, the original's everything else.

    Raises:
        ParetoError: the tool wrote no checkpoint, or not a quantized one where it should have.

    """
    tool, target = work / "tool", work / "checkpoint"
    if target.exists():
        shutil.rmtree(target)
    target.mkdir()
    try:
        written = read_config(tool)
        settings, files = quantization_settings(tool), weight_files(tool)
    except ParetoError as error:
        raise ParetoError(f"{backend.name} wrote no usable checkpoint: {error}") from error
    if quantized and not settings:
        raise ParetoError(
            f"{backend.name} wrote an unquantized checkpoint (its config.json has no quantization_config)"
        )
    checkpoint.copy_companions(model_dir, target)
    for path in files:
        checkpoint.link_or_copy(path, target / (SINGLE if len(files) == 1 else path.name))
    if len(files) > 1:
        shutil.copyfile(tool / INDEX, target / INDEX)
    config = read_config(model_dir) | ({"quantization_config": settings} if quantized else {})
    # Moving scales into the final norm takes the head and the embedding apart.
    config["tie_word_embeddings"] = written.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    write_json(target / "config.json", config)
    validate_checkpoint(target, quantized=quantized)
    return target
