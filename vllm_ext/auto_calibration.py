"""Scales for a checkpoint that has none: calibrated once when its server starts, kept for the next start.

The work is ``pareto compress MODEL --recipe kv-scales``, run as a command of its own: its memory is free again before
the engine takes its share. A large model is refused with that command instead, to be run once where there is time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from kv_cache.errors import ParetoError
from kv_cache.scales import SCALES_FILE
from quant_methods.model_source import cache_dir, fingerprint, resolve_model

MAX_WEIGHT_BYTES = 4 * 2**30
"""Weights beyond this are not calibrated at start-up: sampling and calibrating would take long on a CPU."""
SAMPLES, LENGTH = 32, 512
REVISION = 4
"""Of the calibration's method: raised when scales made before are worse than those made now, which sets those aside."""


def calibrate(model: str) -> Path:
    """Return the folder whose ``kv_scales/`` was calibrated for a model, now or at an earlier start.

    Args:
        model: a local folder or a hub name.

    Raises:
        ParetoError: the model is too large to calibrate at start-up, or calibration failed.

    """
    by_hand = f"make them once with 'pareto compress {model} --recipe kv-scales --out DIR' and serve DIR"
    try:
        source = resolve_model(model)
    except ParetoError as error:
        raise ParetoError(f"{model} has no calibrated KV scales, and none can be made at start-up: {error}") from error
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    if size > MAX_WEIGHT_BYTES:
        raise ParetoError(f"{model} has no calibrated KV scales and is too large to calibrate at start-up: {by_hand}")
    folder = cache_dir() / "kv-scales" / f"{fingerprint(source)}-{REVISION}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / SCALES_FILE).is_file():
            _run(source, folder, by_hand)
    return folder


def _run(source: Path, folder: Path, by_hand: str) -> None:
    print(f"pareto: {source} has no calibrated KV scales; calibrating on text of its own ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch) / "out"
        command = [sys.executable, "-m", "vllm_ext.cli", "compress", str(source), "--recipe", "kv-scales"]
        command += ["--num-calibration-samples", str(SAMPLES), "--calibration-length", str(LENGTH), "--out", str(out)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode or not (out / SCALES_FILE).is_file():
            last = (done.stdout.strip().splitlines() or ["no output"])[-1]
            raise ParetoError(f"calibrating KV scales at start-up failed ({last}): {by_hand}")
        (folder / SCALES_FILE).parent.mkdir(exist_ok=True)
        shutil.copy(out / SCALES_FILE, folder / SCALES_FILE.with_suffix(".new"))
        os.replace(folder / SCALES_FILE.with_suffix(".new"), folder / SCALES_FILE)
    print(f"pareto: KV scales kept in {folder}", file=sys.stderr)
