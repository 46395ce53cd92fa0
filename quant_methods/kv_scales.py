"""Makes the KV scales of a model, and nothing else: ``python -m quant_methods.kv_scales MODEL OUT``.

What a server runs when a checkpoint has none (vllm_ext/auto_calibration.py), as a process of its own: its memory is
free again before the engine takes its share, and its threads are none of the server's. It prints a line every ten
seconds; the last line of a run that failed says why.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

from kv_cache.errors import ParetoError
from quant_methods.progress import Lines
from quant_methods.threads import wait_asleep

NAME = "KV scales"
LENGTH = 1024
FEWEST, MOST = 4, 16
"""Sequences on a CPU. Four are hardly worse than sixty (docs/kv-calibration.md), so that a large model gets few."""
CPU_OPERATIONS = 4e12
"""Multiplications that a CPU may spend on more than the fewest."""
ON_GPU = 64
"""Sequences on a GPU: all that the shipped text has."""


def make_scales(model: Path, out: Path, device: str, lines: Lines, tokenizer: Path | None = None) -> None:
    """Write ``kv_scales/`` into a folder.

    Args:
        model: directory of a checkpoint, quantized or not.
        out: the folder.
        device: torch device.
        lines: is told how far it is.
        tokenizer: folder of the tokenizer that is served with the model; None: the model's own.

    Raises:
        ParetoError: the model or the device cannot be used.

    """
    _wake(device)
    from quant_methods.calibration.calibrator import Decoder
    from quant_methods.calibration.kv_observer import unserved_kv
    from quant_methods.calibration.kv_pass import calibrate, kv_sequences
    from quant_methods.compress import check_device

    check_device(device)
    decoder = Decoder(model, device=device)
    if reason := unserved_kv(decoder.base, decoder.config):
        raise ParetoError(f"{model}: a quantized KV cache does not serve {reason}: use --kv-cache-dtype auto")
    length = min(LENGTH, decoder.config.max_position_embeddings)
    weights = sum(parameter.numel() for block in decoder.blocks for parameter in block.parameters())
    count = ON_GPU if decoder.device.type == "cuda" else on_cpu(weights, length)
    source = tokenizer or model
    tokens = kv_sequences(source, None, count, length)
    total = len(decoder.blocks)
    calibrator = calibrate(decoder, source, tokens, 0, lambda done, what: lines.show(done, total, what))
    lines.show(total, total, "solving")
    calibrator.finish({"recipe": "at start-up"}).save(out)


def _wake(device: str) -> None:
    """Let a GPU begin while libraries are imported; both take seconds."""
    import torch

    def begin() -> None:
        # What is wrong with a device, its check says later.
        with contextlib.suppress(Exception):
            torch.zeros(1, device=device)

    if device.startswith("cuda"):
        threading.Thread(target=begin, daemon=True).start()


def on_cpu(weights: int, length: int) -> int:
    """Return how many sequences a model of so many weights in its blocks is shown on a CPU."""
    return max(FEWEST, min(MOST, int(CPU_OPERATIONS / max(1, weights * length))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, with the process's own arguments unless given; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m quant_methods.kv_scales", description=__doc__)
    parser.add_argument("model", type=Path, help="directory of a checkpoint")
    parser.add_argument("out", type=Path, help="folder to write kv_scales/ into")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (default: the model's own)")
    args = parser.parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    wait_asleep()
    warnings.simplefilter("ignore")

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        with Lines(NAME, say) as lines:
            make_scales(args.model, args.out, args.device, lines, args.tokenizer)
    except ParetoError as error:
        say(str(error))
        return 1
    say(f"{NAME}: done in {lines.seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
