"""Makes the KV scales of a model, and nothing else: ``python -m quant_methods.kv_scales MODEL OUT``.

What a server runs when a checkpoint has none (vllm_ext/auto_calibration.py), as a process of its own: its memory is
free again before the engine takes its share, and its threads are none of the server's. It prints a line every ten
seconds; the last line of a run that failed says why.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from kv_cache.errors import ParetoError
from quant_methods.progress import Lines

NAME = "KV scales"
LENGTH = 1024
SEQUENCES = {"cpu": 16, "cuda": 64}
"""How much of the shipped text is used, by device; a GPU takes all there is."""


def make_scales(model: Path, out: Path, device: str, lines: Lines) -> None:
    """Write ``kv_scales/`` into a folder.

    Args:
        model: directory of a checkpoint, quantized or not.
        out: the folder.
        device: torch device.
        lines: is told how far it is.

    Raises:
        ParetoError: the model or the device cannot be used.

    """
    from quant_methods.calibration.calibrator import Decoder
    from quant_methods.calibration.kv_pass import calibrate, kv_sequences
    from quant_methods.compress import check_device

    kind = check_device(device).partition(":")[0]
    decoder = Decoder(model, device=device)
    longest = getattr(decoder.config, "max_position_embeddings", None) or LENGTH
    tokens = kv_sequences(model, None, SEQUENCES.get(kind, SEQUENCES["cpu"]), min(LENGTH, longest))
    total = len(decoder.blocks)
    calibrator = calibrate(decoder, model, tokens, 0, lambda done, what: lines.show(done, total, what))
    lines.show(total, total, "solving")
    calibrator.finish({"recipe": "at start-up"}).save(out)


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m quant_methods.kv_scales", description=__doc__)
    parser.add_argument("model", type=Path, help="directory of a checkpoint")
    parser.add_argument("out", type=Path, help="folder to write kv_scales/ into")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    args = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        with Lines(NAME, say) as lines:
            make_scales(args.model, args.out, args.device, lines)
    except ParetoError as error:
        say(str(error))
        return 1
    say(f"{NAME}: done in {lines.seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
