"""Calibrated scales of a model's KV cache: what they are, and the file that carries them with a checkpoint.

The file is ``kv_scales/scales.safetensors`` inside the checkpoint's folder. It lies in a folder of its own because vLLM
and transformers read every ``*.safetensors`` file beside config.json as weights.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS, KVFormat

SCALES_FILE = Path("kv_scales") / "scales.safetensors"
SCHEMA = "vllm-pareto/kv-scales/1"


@dataclass(frozen=True)
class LayerScales:
    """Scales of one layer for one format; every tensor is float32 [num_kv_heads, head_dim].

    An element is read as ``(code - zero) * scale`` (kv_cache/formats.py); a per-tensor format repeats its number.
    """

    key_scale: torch.Tensor
    key_zero: torch.Tensor
    value_scale: torch.Tensor
    value_zero: torch.Tensor

    def heads(self, start: int, stop: int) -> LayerScales:
        """Return the scales of KV heads start..stop-1, which is what one tensor-parallel rank holds."""
        return LayerScales(*(getattr(self, name)[start:stop].contiguous() for name in TENSORS))


TENSORS = ("key_scale", "key_zero", "value_scale", "value_zero")


@dataclass
class KVScales:
    """Scales of every static format (``formats.FORMATS``) for every layer of one model.

    Attributes:
        num_layers: decoder layers that have a KV cache.
        num_kv_heads: KV heads of a layer (before any tensor parallelism).
        head_dim: channels of a head.
        layers: by format name, one LayerScales a layer.
        metadata: how they were made (seed, number of tokens, tool versions); JSON values.

    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    layers: dict[str, list[LayerScales]]
    metadata: dict[str, Any] = field(default_factory=dict)

    def layer(self, fmt: KVFormat, index: int) -> LayerScales:
        """Return one layer's scales for one static format.

        Raises:
            ParetoError: the file has none for that format or layer.

        """
        if fmt.name not in self.layers:
            raise ParetoError(f"the checkpoint has no KV scales for {fmt.name}; it has: {', '.join(self.layers)}")
        if not 0 <= index < self.num_layers:
            raise ParetoError(f"the checkpoint has KV scales for {self.num_layers} layers, not for layer {index}")
        return self.layers[fmt.name][index]

    def save(self, checkpoint: Path | str) -> Path:
        """Write ``kv_scales/scales.safetensors`` into a checkpoint's folder, atomically; returns its path."""
        path = Path(checkpoint) / SCALES_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{name}.{tensor}": torch.stack([getattr(layer, tensor) for layer in layers]).float().contiguous()
            for name, layers in self.layers.items()
            for tensor in TENSORS
        }
        header = {
            "schema": SCHEMA,
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            **self.metadata,
        }
        partial = path.with_suffix(f".partial-{os.getpid()}")
        save_file(tensors, partial, metadata={"kv_scales": json.dumps(header, sort_keys=True)})
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, checkpoint: Path | str) -> KVScales:
        """Read the scales of a checkpoint's folder.

        Raises:
            ParetoError: there is no such file, or it is truncated, foreign, or not finite.

        """
        path = Path(checkpoint) / SCALES_FILE
        if not path.is_file():
            raise ParetoError(f"no KV scales in {checkpoint}: make them with 'pareto compress --recipe kv-scales'")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["kv_scales"])
                if header.pop("schema", None) != SCHEMA:
                    raise ParetoError(f"{path}: written by another version of vllm-pareto; make the scales again")
                shape = tuple(int(header.pop(key)) for key in ("num_layers", "num_kv_heads", "head_dim"))
                layers = {}
                for name in sorted(
                    {key.rpartition(".")[0] for key in file.keys()}  # noqa: SIM118 - it is no mapping
                    & set(FORMATS)
                ):
                    stacks = [file.get_tensor(f"{name}.{tensor}") for tensor in TENSORS]
                    if any(tuple(stack.shape) != shape or not stack.isfinite().all() for stack in stacks):
                        raise ParetoError(f"{path}: the scales of {name} have a wrong shape or are not finite")
                    if not (stacks[0] > 0).all() or not (stacks[2] > 0).all():
                        raise ParetoError(f"{path}: the scales of {name} are not positive")
                    layers[name] = [LayerScales(*(stack[i] for stack in stacks)) for i in range(shape[0])]
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ParetoError(f"{path} is truncated or no KV-scales file: make the scales again") from error
        return cls(shape[0], shape[1], shape[2], layers=layers, metadata=header)
