"""Scales for a checkpoint that has none: calibrated once when its server starts, kept for the next start.

The work is done by a process of its own (quant_methods/kv_scales.py), on the engine's device, before the engine takes
its memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_cache.errors import ParetoError
from kv_cache.scales import SCALES_FILE, SCHEMA
from kv_cache.user_cache import cache_dir, making
from quant_methods.model_source import read_config, resolve_model, resolve_tokenizer, sampled_fingerprint

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
        overrides: JSON of what ``--hf-overrides`` changes in it; None for nothing.

    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    download_dir: str | None = None
    token: str | bool | None = None
    config: str | None = None
    overrides: str | None = None

    @classmethod
    def of(cls, model: ModelConfig, load: LoadConfig) -> Origin:
        """Return where a model of an engine's configuration comes from.

        Raises:
            ParetoError: a function of the user's changes its configuration, and what it does cannot be known here.

        """
        found = cls(
            model.model,
            model.revision,
            getattr(model, "tokenizer", None),
            getattr(model, "tokenizer_revision", None),
            load.download_dir,
            getattr(model, "hf_token", None),
            getattr(model, "hf_config_path", None),
            _overrides(model),
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
    if origin.config is not None and not Path(origin.config).is_dir():
        raise ParetoError(
            f"{origin.model} has no calibrated KV scales, and none can be made at start-up for a model whose "
            f"config.json is no local file (--hf-config-path {origin.config}): download it, or {INSTEAD}"
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
    with contextlib.ExitStack() as views:
        if origin.config is not None or origin.overrides is not None:
            source = views.enter_context(_as_served(origin, source))
        return _calibrated(source, tokenizer, device)


def _overrides(model: ModelConfig) -> str | None:
    """Return what the user changes in the configuration, as JSON; None for nothing."""
    found = getattr(model, "hf_overrides", None)
    if callable(found):
        # vLLM tells the kind of a draft model so, which changes no layer.
        if getattr(found, "__module__", "").partition(".")[0] == "vllm":
            return None
        raise ParetoError(
            f"{model.model}: hf_overrides is a function, and KV scales need to know what it changes: give a dict, or "
            f"{INSTEAD}"
        )
    return json.dumps(found, sort_keys=True) if found else None


@contextlib.contextmanager
def _as_served(origin: Origin, source: Path) -> Iterator[Path]:
    """Give a folder of the model's files with the configuration that it is served with."""
    config = read_config(Path(origin.config) if origin.config else source)
    _override(config, json.loads(origin.overrides or "{}"))
    with tempfile.TemporaryDirectory(prefix="pareto-as-served-") as name:
        view = Path(name)
        for path in source.iterdir():
            if path.name != "config.json":
                (view / path.name).symlink_to(path.resolve())
        (view / "config.json").write_text(json.dumps(config))
        yield view


def _override(config: dict[str, Any], changes: dict[str, Any]) -> None:
    """Change a configuration as vLLM does: that of a part, such as text_config, entry by entry, all else as a whole."""
    for name, value in changes.items():
        part = name.endswith("_config") and name != "quantization_config"
        if part and isinstance(value, dict) and isinstance(config.get(name), dict):
            _override(config[name], value)
        else:
            config[name] = value


def _calibrated(source: Path, tokenizer: Path | None, device: str) -> Path:
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
