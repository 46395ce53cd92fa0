"""Writes a model that computes what another one does, with activation outliers as large language models have them.

In every block some channels of each norm's weight are multiplied by a factor, and the same input channels of the layers
that the norm feeds are divided by it: the next layer undoes what the norm's output is multiplied by. Large models grow
such channels by themselves (Dettmers et al., "LLM.int8()", 2022, section 4); small ones do not, so this is how a
method's robustness shows on one.

    python -m bench.lab.plant_outliers ref-27m ref-27m-outliers --factor 128 --channels 6
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import Source, copy_companions, copy_file, write_tensors
from quant_methods.methods.rotation import LLAMA
from quant_methods.model_source import SINGLE, resolve_model


def plant(source: Source, factor: float, channels: int, seed: int) -> dict[str, Tensor]:
    """Return a Llama-like checkpoint's tensors with outliers planted.

    Args:
        source: the checkpoint.
        factor: a power of two, so that no number is rounded.
        channels: outlier channels of each norm, the same in every block, as they are in large models.
        seed: chooses them.

    Raises:
        ParetoError: the factor is no power of two, or the model's norms do not feed layers named as Llama's.

    """
    mantissa = torch.frexp(torch.tensor(float(factor))).mantissa.item()
    if factor <= 0 or mantissa != 0.5:
        raise ParetoError(f"--factor {factor:g} is not a power of two: weights would be rounded")
    tensors = {name: source.read(name) for name in source.entries}
    norms = [name for name in tensors if name.endswith(".input_layernorm.weight")]
    if not norms:
        raise ParetoError(
            f"{source.dir}: no input_layernorm in the checkpoint; outliers are planted in models like Llama"
        )
    width = len(tensors[norms[0]])
    chosen = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:channels]
    for norm in norms:
        block = norm.removesuffix("input_layernorm.weight")
        for local, fed in LLAMA.readers.items():
            tensors[f"{block}{local}.weight"][chosen] *= factor
            for layer in fed:
                tensors[f"{block}{layer}.weight"][:, chosen] /= factor
    return tensors


def main(argv: list[str] | None = None) -> int:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="embedded name, folder, or hub name")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--factor", type=float, default=128, help="a power of two (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=6, help="of each norm (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        folder = resolve_model(args.model)
        tensors = plant(Source(folder), args.factor, args.channels, args.seed)
        if args.out.exists():
            raise ParetoError(f"{args.out} exists; give another folder")
        args.out.mkdir(parents=True)
        copy_companions(folder, args.out)
        copy_file(folder / "config.json", args.out / "config.json")
        write_tensors(args.out / SINGLE, tensors, {"format": "pt"})
    except ParetoError as error:
        print(f"plant_outliers: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
