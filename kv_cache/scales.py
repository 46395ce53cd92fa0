"""Calibrated scales of a model's KV cache: what they are, and the file that carries them with a checkpoint.

The file is ``kv_scales/scales.safetensors`` inside the checkpoint's folder. It lies in a folder of its own because vLLM
and transformers read every ``*.safetensors`` file beside config.json as weights.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS, KVFormat
from kv_cache.rotary import Rotary

SCALES_FILE = Path("kv_scales") / "scales.safetensors"
SCHEMA = "vllm-pareto/kv-scales/2"


@dataclass(frozen=True)
class LayerScales:
    """What one layer's keys and values are coded with in one format.

    An element is read as ``(code - zero) * scale`` (kv_cache/formats.py); a per-tensor format repeats its number. What
    is None is left out. The matrices say how four bits are spent better: docs/kv-calibration.md.

    Attributes:
        key_scale: float32 [num_kv_heads, head_dim], as are key_zero, value_scale and value_zero.
        key_transform: float32 [num_kv_heads, head_dim, head_dim]; ``transform @ (key - centre)`` is what is coded.
        key_inverse: float32 [num_kv_heads, head_dim, head_dim], of the transform. Kept rather than computed: a server
            must not call LAPACK, whose threads hang beside those that vLLM has pinned.
        key_mean: float32 [num_kv_heads, head_dim], a head's mean key before rotary embedding, from which ``rotary``
            makes the centre at each position; only with a transform.
        key_feedback: float32 [num_kv_heads, head_dim, head_dim], strictly lower triangular. Channels are rounded from
            the last to the first, and channel i's error, in codes, times ``feedback[i, j]`` is added to the channels
            j < i that come after it. There wherever a transform is.
        value_feedback: likewise.
        rotary: of the model; only with a mean.

    Raises:
        ParetoError: a part lacks the other that it needs.

    """

    key_scale: torch.Tensor
    key_zero: torch.Tensor
    value_scale: torch.Tensor
    value_zero: torch.Tensor
    key_transform: torch.Tensor | None = None
    key_inverse: torch.Tensor | None = None
    key_mean: torch.Tensor | None = None
    key_feedback: torch.Tensor | None = None
    value_feedback: torch.Tensor | None = None
    rotary: Rotary | None = None

    def __post_init__(self) -> None:
        if self.key_transform is not None and (self.key_inverse is None or self.key_feedback is None):
            raise ParetoError("KV scales: a transform of the keys needs its inverse and the keys' feedback")
        if self.key_mean is not None and (self.key_transform is None or self.rotary is None):
            raise ParetoError("KV scales: centred keys need a transform and the model's rotary embedding")

    @functools.cached_property
    def key_encode(self) -> torch.Tensor | None:
        """``key_transform`` with the key scales divided out: its product with a key, plus zero, is in codes."""
        return None if self.key_transform is None else self.key_transform * (1.0 / self.key_scale)[..., None]

    @functools.cached_property
    def key_decode(self) -> torch.Tensor | None:
        """``key_inverse * key_scale``: a query times it meets codes."""
        return None if self.key_inverse is None else self.key_inverse * self.key_scale[:, None]

    def heads(self, start: int, stop: int) -> LayerScales:
        """Return the scales of KV heads start..stop-1, which is what one tensor-parallel rank holds."""
        parts = {name: getattr(self, name) for name in (*TENSORS, *PARTS)}
        mine = {name: None if part is None else part[start:stop].contiguous() for name, part in parts.items()}
        return LayerScales(**mine, rotary=self.rotary)


TENSORS = ("key_scale", "key_zero", "value_scale", "value_zero")
PARTS = ("key_transform", "key_inverse", "key_mean", "key_feedback", "value_feedback")
"""Parts of LayerScales that a format may lack."""
ROUNDED = frozenset({"key_transform", "key_feedback", "value_feedback"})
"""Those that the file keeps as bfloat16."""
MATRIX_DTYPE = torch.bfloat16


@dataclass
class KVScales:
    """Scales of every static format (``formats.FORMATS``) for every layer of one model.

    Attributes:
        num_layers: decoder layers that have a KV cache.
        num_kv_heads: KV heads of a layer (before any tensor parallelism).
        head_dim: channels of a head.
        layers: by format name, one LayerScales a layer.
        rotary: that centred keys refer to; None if no format has any.
        metadata: how they were made (seed, number of tokens, tool versions); JSON values.

    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    layers: dict[str, list[LayerScales]]
    metadata: dict[str, Any] = field(default_factory=dict)
    rotary: Rotary | None = None

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
        tensors = {}
        for name, layers in self.layers.items():
            for part in (*TENSORS, *PARTS):
                if getattr(layers[0], part) is None:
                    continue
                stack = torch.stack([getattr(layer, part) for layer in layers]).float()
                tensors[f"{name}.{part}"] = (stack.to(MATRIX_DTYPE) if part in ROUNDED else stack).contiguous()
        header = {
            "schema": SCHEMA,
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            **self.metadata,
        }
        if self.rotary is not None:
            tensors["rotary.inv_freq"] = self.rotary.inv_freq.float().contiguous()
            header["rotary"] = {"max_position": self.rotary.max_position, "interleaved": self.rotary.interleaved}
        partial = path.with_suffix(f".partial-{os.getpid()}")
        # save_file would make a file that only its owner may read.
        partial.write_bytes(save(tensors, metadata={"kv_scales": json.dumps(header, sort_keys=True)}))
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
                known = set(file.keys())
                rotary = None
                if "rotary" in header:
                    rotary = Rotary(file.get_tensor("rotary.inv_freq"), **header.pop("rotary"))
                layers = {}
                for name in sorted({key.rpartition(".")[0] for key in known} & set(FORMATS)):
                    stacks = {part: file.get_tensor(f"{name}.{part}") for part in TENSORS}
                    if any(tuple(stack.shape) != shape for stack in stacks.values()):
                        raise ParetoError(f"{path}: the scales of {name} have a wrong shape")
                    if not (stacks["key_scale"] > 0).all() or not (stacks["value_scale"] > 0).all():
                        raise ParetoError(f"{path}: the scales of {name} are not positive")
                    for part in PARTS:
                        if f"{name}.{part}" in known:
                            stacks[part] = file.get_tensor(f"{name}.{part}").float()
                            if tuple(stacks[part].shape) != (shape if part == "key_mean" else (*shape, shape[2])):
                                raise ParetoError(f"{path}: {part} of {name} has a wrong shape")
                    if any(not stack.isfinite().all() for stack in stacks.values()):
                        raise ParetoError(f"{path}: the scales of {name} are not finite")
                    layers[name] = [
                        LayerScales(
                            **{part: stack[i] for part, stack in stacks.items()},
                            rotary=rotary if "key_mean" in stacks else None,
                        )
                        for i in range(shape[0])
                    ]
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ParetoError(f"{path} is truncated or no KV-scales file: make the scales again") from error
        return cls(shape[0], shape[1], shape[2], layers=layers, metadata=header, rotary=rotary)
