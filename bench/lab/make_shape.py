"""Writes the config.json of a quantized model of a given shape, for ``--load-format dummy``: speed without weights.

python -m bench.lab.make_shape bench/shapes/mistral-7b gptq-w3 shapes/w3
python -m bench.lab.make_shape bench/shapes/mistral-7b gptq-w4 shapes/w4-ours --native
python -m bench.lab.make_shape bench/shapes/mistral-7b gptq-w4 shapes/w4-outliers --outliers 0.01
pareto kv-bench bench/shapes/mistral-7b --load-format dummy --compressed shapes/w3 shapes/w4-ours ...
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.files import write_json
from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import quantization_config
from quant_methods.formats.form import Form
from quant_methods.formats.native_format import NativeConfig
from quant_methods.formats.parts.columns import ColumnsForm
from quant_methods.formats.parts.low_rank import LowRankForm
from quant_methods.formats.parts.part import PartForm
from quant_methods.formats.parts.single_weights import SparseForm
from quant_methods.model_source import read_config
from quant_methods.recipe import Recipe
from quant_methods.recipe_file import load_recipe
from quant_methods.steps import RoundStep


def form_of(step: RoundStep, inputs: int) -> Form:
    """Return how a layer with that many inputs is stored in the format of ours."""
    parts: list[PartForm] = [step.bulk_form]
    if columns := round(step.outliers * inputs):
        parts.append(ColumnsForm(columns, step.outlier_bits))
    if getattr(step, "sparse", 0):
        parts.append(SparseForm())
    if step.rank:
        parts.append(LowRankForm(step.rank))
    return Form(tuple(parts), step.activations)


def quantized(config: dict[str, Any], recipe: Recipe, *, native: bool) -> dict[str, Any]:
    """Return a config.json with the ``quantization_config`` of a recipe's rounding step.

    Args:
        config: of the unquantized model.
        recipe: its last step that rounds counts, for all linear layers but the head.
        native: the format of ours also where a standard one would do.

    Raises:
        ParetoError: the recipe rounds nothing.

    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not recipe.rounding:
        raise ParetoError(f"recipe {recipe.name} rounds no weights")
    step = recipe.rounding[-1]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    if step.plain and step.bits in (4, 8) and not native:
        settings = quantization_config([(step, list(linears))], ["lm_head"])
    else:
        forms = {name: form_of(step, module.in_features) for name, module in linears.items()}
        settings = NativeConfig(forms, ("lm_head",)).to_dict()
    return config | {"quantization_config": settings}


def main(argv: list[str] | None = None) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=Path, help="folder with the unquantized model's config.json")
    parser.add_argument("recipe", help="built-in recipe or YAML file")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--native", action="store_true", help="the format of ours in any case")
    parser.add_argument("--outliers", type=float, help="fraction of the channels kept apart")
    args = parser.parse_args(argv)
    try:
        recipe = load_recipe(args.recipe)
        if args.outliers is not None:
            steps = [
                dataclasses.replace(step, outliers=args.outliers) if isinstance(step, RoundStep) else step
                for step in recipe.steps
            ]
            recipe = dataclasses.replace(recipe, steps=tuple(steps))
        config = quantized(read_config(args.shape), recipe, native=args.native)
    except ParetoError as error:
        print(f"make_shape: error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "config.json", config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
