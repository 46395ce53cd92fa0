"""An adapter made part of its checkpoint: its products join the low-rank parts of the layers, whose codes stay."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.checkpoint import Source, assemble, copy_file, write_json, write_tensors
from quant_methods.checkpoints.stored_layers import Rounding, StoredLayers, stored_layers
from quant_methods.finetuning.pooled import with_moved
from quant_methods.formats.form import ACTIVATION_BITS, Form, form_of
from quant_methods.formats.grid import round_tokens
from quant_methods.formats.native_format import NativeConfig, pack
from quant_methods.formats.parts.low_rank import LowRank
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.formats.sparse_formats import is_sparse
from quant_methods.model_source import quantization_settings, read_config

ADAPTER = "adapter_model.safetensors"
PREFIX = "base_model.model."
KNOWN = {"bias": "none", "fan_in_fan_out": False, "modules_to_save": None}
"""What an adapter must not be otherwise, to be a product that is added to each of its layers."""
OWN = ("README.md", "config.json", "model.safetensors.index.json")
"""Files of a checkpoint that a merged one has of its own."""


class Adapter:
    """An adapter of peft's on disk.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ParetoError: it is none, or does more than add a product to each of its layers.

    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
            with safe_open(folder / ADAPTER, framework="pt") as file:
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError) as error:
            raise ParetoError(f"{folder} is no adapter of peft's with adapter_config.json and {ADAPTER}") from error
        if self.config.get("peft_type") != "LORA":
            raise ParetoError(f"{folder}: peft_type is {self.config.get('peft_type')!r}; only 'LORA' can be merged")
        for name, wanted in KNOWN.items():
            if (found := self.config.get(name)) not in (wanted, None):
                raise ParetoError(f"{folder}: an adapter with {name} {found!r} cannot be merged into codes")
        for name in ("rank_pattern", "alpha_pattern"):
            if self.config.get(name):
                raise ParetoError(f"{folder}: an adapter with a {name} is not merged yet")
        self.pooled = bool(self.config.get("use_qalora"))
        """Products are of each layer's groups, and count in steps of its grid (``pooled.py``)."""
        names = {name.rpartition(".lora_")[0] for name in tensors}
        self.dora = bool(self.config.get("use_dora"))
        """Each layer's output channels have a size of their own (DoRA)."""
        self.magnitudes = {
            name.removeprefix(PREFIX): _of(tensors, f"{name}.lora_magnitude_vector", folder)
            for name in names
            if self.dora
        }
        """By module, float32 [out], the norm of each output channel of the changed weight; only of DoRA."""
        self.products = {
            name.removeprefix(PREFIX): (
                self.scaling * _of(tensors, f"{name}.lora_B.weight", folder),
                _of(tensors, f"{name}.lora_A.weight", folder),
            )
            for name in sorted(names)
        }
        """By module, float32 ``up`` [out, rank] and ``down`` [rank, in], whose product is added to the weight."""

    def factors(self, name: str, changed: Tensor) -> Tensor | None:
        """Return what output channels are multiplied by once the product is added; None: by nothing.

        A channel's norm is learnt apart from its direction (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation"
        (2024), https://arxiv.org/abs/2402.09353, section 4.1, equation 5).

        Args:
            name: of the module.
            changed: its weight with the product, float32 [out, in].

        """
        return self.magnitudes[name] / changed.norm(dim=1) if self.dora else None

    @property
    def scaling(self) -> float:
        """What products are multiplied by."""
        rank, alpha = self.config["r"], self.config["lora_alpha"]
        return float(alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank)


def _of(tensors: dict[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in tensors:
        raise ParetoError(f"{folder}: it lacks {name}")
    return tensors[name]


def merge(checkpoint: Path, adapter_dir: Path, out: Path) -> None:
    """Write a checkpoint that puts out what another one does with an adapter beside it.

    The codes of quantized layers stay as they are, and a layer's product joins its low-rank part; both are stored in 16
    bits, as an engine that serves the adapter would hold them; a pooled adapter moves zero-points instead, and the
    magnitudes of DoRA multiply what codes are multiplied by, which is rounded to its 16 bits again. Layers in 16
    bits take the product into their weight. Quantized checkpoints are written in our format, whichever they came in;
    the adapter is kept in ``adapter/``.

    Args:
        checkpoint: directory.
        adapter_dir: of the adapter.
        out: new directory.

    Raises:
        ParetoError: the adapter belongs to another model, or the layers' format has no place for it.

    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    adapter, source, settings = Adapter(adapter_dir), Source(checkpoint), quantization_settings(checkpoint)
    layers = stored_layers(source, settings) if settings else None
    if settings and settings.get("quant_method") == "compressed-tensors" and is_sparse(settings):
        raise ParetoError(
            f"{checkpoint}: sparse compressed-tensors checkpoints are not merged into; {_instead(adapter)}"
        )
    config = AutoConfig.from_pretrained(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if others := sorted(set(adapter.products) - set(modules)):
        raise ParetoError(f"{adapter_dir}: it has a product for {others[0]}, which {checkpoint} has not")
    dtype = _dtype(checkpoint)
    tensors: dict[str, Tensor] = {}
    forms: dict[str, Form] = {}
    replaced: set[str] = set()
    for name, module in modules.items():
        product = adapter.products.get(name)
        fits = product is None or (product[0].shape[0], product[1].shape[1]) == tuple(module.weight.shape)
        if not (fits or adapter.pooled):
            raise ParetoError(f"{adapter_dir}: its product for {name} does not fit {list(module.weight.shape)}")
        stored = layers.layer(name, module) if layers is not None else None
        if stored is not None:
            linear = stored[0]
            if product is not None:
                if adapter.pooled:
                    linear = with_moved(name, linear, *product)
                else:
                    factors = adapter.factors(name, linear.read() + product[0] @ product[1])
                    linear = joined(linear, *product, dtype)
                    linear = linear if factors is None else linear.times(factors)
            packed = pack(name, linear)
            form = _form(name, packed, stored[1], _instead(adapter))
            tensors |= packed
            forms[name] = form
            replaced |= _stored_names(source, name, module)
        elif product is not None:
            full = f"{name}.weight"
            if adapter.pooled:
                raise ParetoError(f"{adapter_dir}: it moves zero-points of {name}, which is not quantized")
            if full not in source:
                raise ParetoError(f"{checkpoint}: the checkpoint lacks {full}, which {adapter_dir} changes")
            weight = source.read(full)
            changed = weight.float() + product[0] @ product[1]
            factors = adapter.factors(name, changed)
            tensors[full] = (changed if factors is None else changed * factors[:, None]).to(weight.dtype)
            replaced.add(full)
    _write(checkpoint, source, layers, tensors, forms, replaced, out)
    kept = out / "adapter"
    kept.mkdir()
    for file in sorted(adapter_dir.iterdir()):
        if file.is_file():
            copy_file(file, kept / file.name)


def joined(linear: QuantizedLinear, up: Tensor, down: Tensor, dtype: torch.dtype) -> QuantizedLinear:
    """Return a layer whose low-rank part has a product beside what it had.

    Args:
        linear: the layer.
        up: [out, rank].
        down: [rank, in].
        dtype: that a new part is stored in; one that is there keeps its own.

    """
    if (before := linear.get(LowRank)) is None:
        return linear.having(LowRank(up.to(dtype), down.to(dtype)))
    stored = before.up.dtype
    return linear.having(LowRank(torch.cat([before.up, up.to(stored)], 1), torch.cat([before.down, down.to(stored)])))


def _instead(adapter: Adapter) -> str:
    """Return what to do with an adapter that cannot be merged."""
    if adapter.dora:
        return "learn without --dora, whose adapters no server adds, and serve the adapter beside the checkpoint"
    return "serve the adapter beside the checkpoint, without --merge"


def _form(name: str, packed: dict[str, Tensor], rounding: Rounding | None, instead: str) -> Form:
    activations = None
    if rounding is None:
        activations = "none"
    elif isinstance(rounding, functools.partial) and rounding.func is round_tokens:
        bits = rounding.keywords["bits"]
        activations = next((known for known, value in ACTIVATION_BITS.items() if value == bits), None)
    if activations is None:
        raise ParetoError(f"{name}: inputs are rounded with a fixed scale, which our format has no word for; {instead}")
    form = form_of({full.removeprefix(f"{name}."): tuple(tensor.shape) for full, tensor in packed.items()}, activations)
    assert form is not None, "what was packed has a bulk"
    return form


def _stored_names(source: Source, name: str, module: nn.Linear) -> set[str]:
    """Return the names of a quantized layer's tensors; AutoGPTQ gives also layers without a bias one, of zeros."""
    found = {full for full in source.entries if full.rpartition(".")[0] == name}
    return found if module.bias is None else found - {f"{name}.bias"}


def _dtype(checkpoint: Path) -> torch.dtype:
    config = read_config(checkpoint)
    return torch.float16 if (config.get("dtype") or config.get("torch_dtype")) == "float16" else torch.bfloat16


def _write(
    checkpoint: Path, source: Source, layers: StoredLayers | None, tensors: dict[str, Tensor], forms: dict[str, Form],
    replaced: set[str], out: Path,
) -> None:  # fmt: skip
    config = json.loads((checkpoint / "config.json").read_text())
    if layers is not None:
        layers.finish()
        ignore = (config.get("quantization_config") or {}).get("ignore") or ()
        config["quantization_config"] = NativeConfig(forms, tuple(ignore)).to_dict()
    out.mkdir(parents=True)
    part = out / "merged.part"
    write_tensors(part, tensors, {})
    assemble(source, replaced, [part], out)
    part.unlink()
    write_json(out / "config.json", config)
    for path in sorted(checkpoint.iterdir()):
        # Tokenizer, template, licence, KV scales and what else lies there; what older tools say of codes is not so now.
        known = path.name in OWN or path.name in ("quantize_config.json", "quant_config.json")
        if path.is_file() and not known and path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)
