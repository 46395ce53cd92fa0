"""Scales for a checkpoint that has none: calibrated once when its server starts, kept for the next start.

The work is done by a process of its own (quant_methods/kv_scales.py), on the engine's device, before the engine takes
its memory.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_cache.errors import ParetoError
from kv_cache.scales import SCALES_FILE, SCHEMA
from kv_cache.user_cache import cache_dir, making
from quant_methods.model_source import resolve_model, resolve_tokenizer, sampled_fingerprint

if TYPE_CHECKING:
    from vllm_ext.compat import LoadConfig, ModelConfig

REVISION = 8
"""Of the calibration's method: raised when scales made before are worse than those made now, which sets those aside."""
INSTEAD = "use --kv-cache-dtype auto or another of vLLM's own, which need no scales"


@dataclass(frozen=True)
class Origin:
    """A served model, by all the flags of vLLM that say which files it is made of.

    Attributes:
        model: a local folder or a hub name.
        revision: branch, tag or commit of a hub model.
        tokenizer: folder or hub name of its tokenizer; None for its own.
        tokenizer_revision: of a tokenizer from the hub.
        download_dir: where vLLM keeps models from the hub, if not in the hub's own cache.
        token: the hub's, as ``--hf-token`` gives it.
        config: folder or hub name of its config.json; None for its own.

    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    download_dir: str | None = None
    token: str | bool | None = None
    config: str | None = None

    @classmethod
    def of(cls, model: ModelConfig, load: LoadConfig) -> Origin:
        """Return where a model of an engine's configuration comes from."""
        found = cls(
            model.model,
            model.revision,
            getattr(model, "tokenizer", None),
            getattr(model, "tokenizer_revision", None),
            load.download_dir,
            getattr(model, "hf_token", None),
            getattr(model, "hf_config_path", None),
        )
        if found.config == found.model:
            found = replace(found, config=None)
        if found.tokenizer == found.model and found.tokenizer_revision in (None, found.revision):
            return replace(found, tokenizer=None, tokenizer_revision=None)
        return found


def calibrate(origin: Origin, *, device: str) -> Path:
    """Return the folder whose ``kv_scales/`` was calibrated for a model, now or at an earlier start.

    Args:
        origin: the model.
        device: where to calibrate, a torch device.

    Raises:
        ParetoError: the model cannot be found or calibrated.

    """
    if origin.config is not None:
        raise ParetoError(
            f"{origin.model} has no calibrated KV scales, and none can be made at start-up for a model whose "
            f"config.json lies elsewhere (--hf-config-path {origin.config}): put both into one folder, or {INSTEAD}"
        )
    where: dict[str, Any] = {"download_dir": origin.download_dir, "token": origin.token}
    tokenizer = None
    try:
        source = resolve_model(origin.model, quantized=True, revision=origin.revision, **where)
        if origin.tokenizer:
            tokenizer = resolve_tokenizer(origin.tokenizer, revision=origin.tokenizer_revision, **where)
    except ParetoError as error:
        raise ParetoError(
            f"{origin.model} has no calibrated KV scales, and none can be made at start-up ({error}): {INSTEAD}"
        ) from error
    # Scales of another schema could not be read.
    key = f"{sampled_fingerprint(source)}-{SCHEMA.rpartition('/')[-1]}-{REVISION}"
    if tokenizer is not None:
        # Other tokens start a text, and others are in it.
        key = f"{key}-{_fingerprint(tokenizer)}"
    folder = cache_dir() / "kv-scales" / key
    folder.mkdir(parents=True, exist_ok=True)
    with making(folder):
        if not (folder / SCALES_FILE).is_file():
            _run(source, folder, device, tokenizer)
        os.utime(folder)
    return folder


def _fingerprint(tokenizer: Path) -> str:
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt",
                 "chat_template.jinja"):  # fmt: skip
        if (tokenizer / name).is_file():
            digest.update(name.encode() + b"\0" + (tokenizer / name).read_bytes())
    return digest.hexdigest()[:16]


def _run(source: Path, folder: Path, device: str, tokenizer: Path | None) -> None:
    _say(f"{source} has no calibrated KV scales; calibrating on a short text on {device} ...")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "quant_methods.kv_scales", str(source), scratch, "--device", device]
        if tokenizer is not None:
            command += ["--tokenizer", str(tokenizer)]
        last = "no output"
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                last = line.strip() or last
                if line.startswith("KV scales: "):
                    _say(line.strip())
        if process.returncode or not (Path(scratch) / SCALES_FILE).is_file():
            # Not "pareto compress --recipe kv-scales": it does the same, and would fail the same way.
            raise ParetoError(f"calibrating KV scales at start-up failed ({last}): {INSTEAD}")
        (folder / SCALES_FILE).parent.mkdir(exist_ok=True)
        os.replace(Path(scratch) / SCALES_FILE, folder / SCALES_FILE)
    _say(f"KV scales kept in {folder}")


def _say(what: str) -> None:
    print(f"pareto: {what}", file=sys.stderr, flush=True)
