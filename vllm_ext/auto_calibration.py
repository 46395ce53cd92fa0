"""Scales for a checkpoint that has none: calibrated once when its server starts, kept for the next start.

The work is done by a process of its own (quant_methods/kv_scales.py), on the engine's device, before the engine takes
its memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from kv_cache.errors import ParetoError
from kv_cache.scales import SCALES_FILE, SCHEMA
from kv_cache.user_cache import cache_dir
from quant_methods.model_source import resolve_model, sampled_fingerprint

REVISION = 6
"""Of the calibration's method: raised when scales made before are worse than those made now, which sets those aside."""


def calibrate(model: str, *, device: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """Return the folder whose ``kv_scales/`` was calibrated for a model, now or at an earlier start.

    Args:
        model: a local folder or a hub name.
        device: where to calibrate, a torch device.
        revision: branch, tag or commit of a hub model.
        download_dir: where vLLM keeps models from the hub, if not in the hub's own cache.

    Raises:
        ParetoError: the model cannot be found or calibrated.

    """
    try:
        source = resolve_model(model, quantized=True, revision=revision, download_dir=download_dir)
    except ParetoError as error:
        raise ParetoError(f"{model} has no calibrated KV scales, and none can be made at start-up: {error}") from error
    # Scales of another schema could not be read.
    key = f"{sampled_fingerprint(source)}-{SCHEMA.rpartition('/')[-1]}-{REVISION}"
    folder = cache_dir() / "kv-scales" / key
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / SCALES_FILE).is_file():
            _run(source, folder, device)
    return folder


def _run(source: Path, folder: Path, device: str) -> None:
    _say(f"{source} has no calibrated KV scales; calibrating on a short text on {device} ...")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "quant_methods.kv_scales", str(source), scratch, "--device", device]
        last = "no output"
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                last = line.strip() or last
                if line.startswith("KV scales: "):
                    _say(line.strip())
        if process.returncode or not (Path(scratch) / SCALES_FILE).is_file():
            raise ParetoError(
                f"calibrating KV scales at start-up failed ({last}): make them with 'pareto compress {source} --recipe "
                "kv-scales --out DIR' and serve DIR"
            )
        (folder / SCALES_FILE).parent.mkdir(exist_ok=True)
        os.replace(Path(scratch) / SCALES_FILE, folder / SCALES_FILE)
    _say(f"KV scales kept in {folder}")


def _say(what: str) -> None:
    print(f"pareto: {what}", file=sys.stderr, flush=True)
