"""An adapter merged into a compressed checkpoint on disk: the result is a checkpoint in the format of ours.

Codes stay as they are. What an adapter adds is a product of two narrow matrices, and our format has a part for that
(``formats/parts/low_rank.py``): nothing is rounded but the factors to the 16 bits of the checkpoint, as vLLM rounds an
adapter that it serves. A pooled adapter (``pooled.py``) becomes other zero-points, and adds nothing to a layer.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from kv_cache.scales import SCALES_FILE
from quant_methods.calibration.text_source import quiet_transformers
from quant_methods.checkpoints.checkpoint import (
    Source,
    assemble,
    copy_companions,
    full_disk_explained,
    read_tensors,
    write_json,
    write_tensors,
)
from quant_methods.checkpoints.replaceable import RECIPE_FILE
from quant_methods.checkpoints.stored_layers import Rounding, stored_layers
from quant_methods.finetuning.pooled import check_pools, moved, steps_of
from quant_methods.formats.form import ACTIVATION_BITS, Form, form_of
from quant_methods.formats.grid import round_tokens
from quant_methods.formats.native_format import NativeConfig, local_tensors, pack
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.parts.low_rank import LowRank
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.model_source import fingerprint, quantization_settings, read_config

PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Product:
    """What an adapter adds to a layer, or to its groups if the adapter is pooled.

    Attributes:
        down: [rank, inputs], or [rank, groups].
        up: [out, rank].
        scaling: of the product.

    """

    down: Tensor
    up: Tensor
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """An adapter as peft stores it.

    Attributes:
        products: by the name of the layer in the model.
        pooled: each product is of the layer's groups.

    """

    products: dict[str, Product]
    pooled: bool


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter of peft's.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ParetoError: there is none, or one that is more than a product for each layer.

    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors, _ = read_tensors(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ParetoError(
            f"{folder} holds no adapter that can be read ({error}); expected adapter_config.json and "
            "adapter_model.safetensors, as peft writes them"
        ) from error
    if config.get("peft_type") != "LORA":
        raise ParetoError(f"{folder}: an adapter of type {config.get('peft_type')!r}; only LORA can be merged")
    if config.get("use_dora"):
        raise ParetoError(f"{folder}: DoRA scales whole rows, which no low-rank part holds; serve the adapter instead")
    found: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        match = _FACTOR.fullmatch(full.removeprefix(PREFIX))
        if match is None:
            raise ParetoError(f"{folder}: {full} is no factor of a linear layer's product, and cannot be merged")
        found.setdefault(match[1], {})[match[2]] = tensor
    products = {}
    for name, factors in found.items():
        if set(factors) != {"A", "B"} or factors["A"].shape[0] != factors["B"].shape[1]:
            raise ParetoError(f"{folder}: the two factors of {name} are not there, or do not fit each other")
        rank = _of_layer(config.get("rank_pattern"), name, config["r"])
        if rank != factors["A"].shape[0]:
            raise ParetoError(f"{folder}: {name} has rank {factors['A'].shape[0]}, its configuration says {rank}")
        alpha = _of_layer(config.get("alpha_pattern"), name, config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        products[name] = Product(factors["A"], factors["B"], scaling)
    return Adapter(products, bool(config.get("use_qalora")))


def _of_layer(pattern: dict[str, Any] | None, name: str, otherwise: Any) -> Any:
    """Return a setting of a layer, by peft's rule: a key is a pattern for the end of the name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return otherwise


def merged_layer(
    name: str, linear: QuantizedLinear, product: Product, pooled: bool, dtype: torch.dtype
) -> QuantizedLinear:
    """Return a layer with what an adapter adds to it.

    Args:
        name: the layer's, for errors.
        linear: the layer.
        product: what is added.
        pooled: it is to the groups, and moves zero-points.
        dtype: that a low-rank part is stored in.

    Raises:
        ParetoError: the product is not one of this layer's shape, or its zero-points cannot take it.

    """
    grid = check_pools(name, linear) if pooled else None
    wanted = linear.shape[0], linear.shape[1] if grid is None else grid.scale.shape[1]
    if (len(product.up), product.down.shape[1]) != wanted:
        raise ParetoError(
            f"{name}: the adapter is one for {len(product.up)} outputs and {product.down.shape[1]} inputs, the layer "
            f"has {wanted[0]} and {wanted[1]}; it was trained over another model"
        )
    if grid is not None:
        zero = moved(grid.zero_point, steps_of(product.down, product.up, product.scaling), grid.bits).to(torch.int8)
        return linear.having(GridCodes(grid.codes, grid.scale, zero, grid.bits))
    up, down = (product.up.float() * product.scaling).to(dtype), product.down.to(dtype)
    if (before := linear.get(LowRank)) is not None:
        up, down = (
            torch.cat([before.up, up.to(before.up.dtype)], 1),
            torch.cat([before.down, down.to(before.down.dtype)]),
        )
    return linear.having(LowRank(up, down))


def merge(checkpoint: Path, adapter_dir: Path, out: Path) -> None:
    """Write a checkpoint with an adapter in it.

    Args:
        checkpoint: that the adapter was trained over: in the format of ours, or compressed-tensors, GPTQ or AWQ with
            integer weights; layers that are not quantized get the product added to their weight, rounded to its dtype.
        adapter_dir: the adapter's.
        out: folder to make.

    Raises:
        ParetoError: the two do not belong together, the result would not be served, or ``out`` is there already.

    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ParetoError(f"{out} is there already; give another place for the merged checkpoint")
    adapter, source, settings = read_adapter(adapter_dir), Source(checkpoint), quantization_settings(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with full_disk_explained(made):
            config = read_config(checkpoint)
            tensors, replaced, forms, ignored = _layers(checkpoint, source, settings, adapter)
            if forms:
                config["quantization_config"] = NativeConfig(forms, ignored).to_dict()
            part = made / "merged.part"
            write_tensors(part, tensors, {"format": "pt"})
            assemble(source, replaced, [part], made)
            part.unlink()
            copy_companions(checkpoint, made)
            # What GPTQ and AWQ say of their layout beside config.json is not true of the result.
            for name in ("quantize_config.json", "quant_config.json"):
                (made / name).unlink(missing_ok=True)
            if (checkpoint / SCALES_FILE).is_file():
                (made / SCALES_FILE).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint / SCALES_FILE, made / SCALES_FILE)
            recipe = checkpoint / RECIPE_FILE
            before = json.loads(recipe.read_text()) if recipe.is_file() else {}
            about = {"base": fingerprint(checkpoint), "layers": len(adapter.products), "pooled": adapter.pooled}
            write_json(made / RECIPE_FILE, {**before, "merged_adapter": about})
            write_json(made / "config.json", config)
            made.chmod(0o755)
            if out.exists():
                out.rmdir()
            made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _layers(
    checkpoint: Path, source: Source, settings: dict[str, Any] | None, adapter: Adapter
) -> tuple[dict[str, Tensor], set[str], dict[str, Form], tuple[str, ...]]:
    """Return new tensors, the names of those that they replace, the layers' forms, and the layers left alone."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = stored_layers(source, settings) if settings else None
    config = AutoConfig.from_pretrained(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with quiet_transformers(), init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    dtype = config.dtype if config.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    tensors: dict[str, Tensor] = {}
    replaced: set[str] = set()
    forms: dict[str, Form] = {}
    ignored, unmerged = [], dict(adapter.products)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        stored = layers.layer(name, module) if layers is not None else None
        product = unmerged.pop(name, None)
        if stored is None:
            ignored.append(name)
            if product is not None:
                tensors[f"{name}.weight"] = _dense(name, source, product, adapter.pooled)
                replaced.add(f"{name}.weight")
            continue
        linear, rounding = stored
        if product is not None:
            linear = merged_layer(name, linear, product, adapter.pooled, dtype)
        own = pack(name, linear)
        form = form_of({n: tuple(t.shape) for n, t in local_tensors(name, own).items()}, _activations(name, rounding))
        assert form is not None
        tensors, forms[name] = tensors | own, form
        # The layer's bias stays; AutoGPTQ writes one, of zeros, for models that have none.
        kept = {f"{name}.bias"} if module.bias is not None else set()
        replaced |= {full for full in source.entries if full.rpartition(".")[0] == name} - kept
    if layers is not None:
        layers.finish()
    if unmerged:
        raise ParetoError(f"{checkpoint}: the model has no linear layer {min(unmerged)}, which the adapter is for")
    return tensors, replaced, forms, tuple(ignored)


def _dense(name: str, source: Source, product: Product, pooled: bool) -> Tensor:
    if pooled:
        raise ParetoError(f"{name}: it is not quantized, and a pooled adapter is for zero-points")
    if f"{name}.weight" not in source.entries:
        raise ParetoError(f"{name}: its weight is tied to another layer's, which the adapter is not for")
    weight = source.read(f"{name}.weight")
    if tuple(weight.shape) != (len(product.up), product.down.shape[1]):
        raise ParetoError(f"{name}: the adapter has another shape; it was trained over another model")
    return (weight.float() + product.scaling * product.up.float() @ product.down.float()).to(weight.dtype)


def _activations(name: str, rounding: Rounding | None) -> str:
    """Return what the format of ours calls the rounding of a layer's inputs.

    Raises:
        ParetoError: it has no such rounding.

    """
    if rounding is None:
        return "none"
    if isinstance(rounding, functools.partial) and rounding.func is round_tokens:
        bits = rounding.keywords["bits"]
        for word, known in ACTIVATION_BITS.items():
            if known == bits:
                return word
    raise ParetoError(
        f"{name}: its inputs are rounded with fixed scales, which our format does not have; serve the adapter"
    )
