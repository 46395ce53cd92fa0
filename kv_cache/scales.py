"""Calibrated scales of a model's KV cache: what they are, and the file that carries them with a checkpoint.

They do not depend on the bits of a code, so that one set serves every dtype.

The file is ``kv_scales/scales.safetensors`` inside the checkpoint's folder. It lies in a folder of its own because vLLM
and transformers read every ``*.safetensors`` file beside config.json as weights.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kv_cache.atomic import write_bytes
from kv_cache.errors import ParetoError
from kv_cache.formats import MIXED, KVFormat, get_format, layer_format
from kv_cache.rotary import Rotary

SCALES_FILE = Path("kv_scales") / "scales.safetensors"
SCHEMA = "vllm-pareto/kv-scales/4"


@dataclass(frozen=True)
class LayerScales:
    """What makes one layer's keys and values even before they are coded (kv_cache/codec.py).

    Attributes:
        key_mean: float32 [num_kv_heads, head_dim], a head's mean key before rotary embedding, from which ``rotary``
            makes the centre at each position.
        key_first: float32 [num_kv_heads, head_dim], the centre of keys at position 0.
        key_transform: float32 [num_kv_heads, head_dim, head_dim], numbers of bfloat16; ``transform @ (key - centre)``
            is what is coded.
        key_inverse: float32 [num_kv_heads, head_dim, head_dim], of the transform. Kept rather than computed: a server
            must not call LAPACK, whose threads hang beside those that vLLM has pinned.
        value_size: float32 [num_kv_heads], positive: the root mean square of a head's values.
        value_mirror: float32 [num_kv_heads, head_dim], a vector n of length sqrt(2), or zeros: values are reflected,
            ``v - n (n . v)``, before they are mixed. That undoes itself.
        rotary: of the model.

    """

    key_mean: torch.Tensor
    key_first: torch.Tensor
    key_transform: torch.Tensor
    key_inverse: torch.Tensor
    value_size: torch.Tensor
    value_mirror: torch.Tensor
    rotary: Rotary

    @functools.cached_property
    def value_encode(self) -> torch.Tensor:
        """What values mixed by ``hadamard_sums`` are multiplied by to be coded, float32 [num_kv_heads]."""
        return (1 / (math.sqrt(self._run) * self.value_size.double())).float()

    @functools.cached_property
    def value_decode(self) -> torch.Tensor:
        """What values read from codes are multiplied by after ``hadamard_sums``, float32 [num_kv_heads]."""
        return (self.value_size.double() / math.sqrt(self._run)).float()

    @property
    def _run(self) -> int:
        dim = self.key_mean.shape[-1]
        return dim & -dim

    def to(self, device: torch.device) -> LayerScales:
        """Return the same scales on a device."""
        return LayerScales(**{name: getattr(self, name).to(device) for name in TENSORS}, rotary=self.rotary)

    def heads(self, start: int, stop: int) -> LayerScales:
        """Return the scales of KV heads start..stop-1, which is what one tensor-parallel rank holds."""
        mine = {name: getattr(self, name)[start:stop].contiguous() for name in TENSORS}
        return LayerScales(**mine, rotary=self.rotary)


TENSORS = ("key_mean", "key_first", "key_transform", "key_inverse", "value_size", "value_mirror")
MATRIX_DTYPE = torch.bfloat16
"""In which the file keeps ``key_transform``."""


@dataclass
class KVScales:
    """Scales for every layer of one model.

    Attributes:
        num_layers: decoder layers that have a KV cache.
        num_kv_heads: KV heads of a layer (before any tensor parallelism).
        head_dim: channels of a head.
        layers: one LayerScales a layer.
        bits: what ``mixed_per_head`` gives each layer, (bits of keys, bits of values); None: nothing was chosen.
        metadata: how they were made (seed, number of tokens, tool versions); JSON values.

    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    layers: list[LayerScales]
    bits: list[tuple[int, int]] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def rotary(self) -> Rotary:
        """The model's rotary embedding, the same for all layers."""
        return self.layers[0].rotary

    def layer(self, index: int) -> LayerScales:
        """Return one layer's scales.

        Raises:
            ParetoError: there is no such layer.

        """
        if not 0 <= index < self.num_layers:
            raise ParetoError(f"the checkpoint has KV scales for {self.num_layers} layers, not for layer {index}")
        return self.layers[index]

    def format(self, name: str, index: int) -> KVFormat:
        """Return the format that a layer has under the dtype of that name.

        Raises:
            ParetoError: there is no such dtype, or it is ``mixed_per_head`` and nobody chose its bits.

        """
        if name != MIXED:
            return get_format(name)
        if self.bits is None:
            raise ParetoError(
                f"--kv-cache-dtype {MIXED} needs bits for each layer, and the checkpoint has none: choose them with "
                "'pareto compress MODEL --recipe kv-scales --kv-budget 3.5bits --out DIR'"
            )
        self.layer(index)
        return layer_format(*self.bits[index])

    def bits_per_element(self, name: str) -> float:
        """Return the bits that an element costs under a dtype, the mean over the layers."""
        formats = [self.format(name, index) for index in range(self.num_layers)]
        return sum(fmt.bits_per_element(self.head_dim) for fmt in formats) / len(formats)

    def save(self, checkpoint: Path | str) -> Path:
        """Write ``kv_scales/scales.safetensors`` into a checkpoint's folder, atomically; returns its path."""
        path = Path(checkpoint) / SCALES_FILE
        tensors = {}
        for name in TENSORS:
            stack = torch.stack([getattr(layer, name) for layer in self.layers]).float()
            tensors[name] = (stack.to(MATRIX_DTYPE) if name == "key_transform" else stack).contiguous()
        rotary = self.rotary
        tensors["rotary.inv_freq"] = rotary.inv_freq.float().contiguous()
        header = {
            "schema": SCHEMA,
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rotary": {name: getattr(rotary, name) for name in ("max_position", "rotated", "interleaved")},
            "bits": self.bits,
            **self.metadata,
        }
        # save_file would make a file that only its owner may read.
        write_bytes(path, save(tensors, metadata={"kv_scales": json.dumps(header, sort_keys=True)}))
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
                layers, heads, dim = (int(header.pop(key)) for key in ("num_layers", "num_kv_heads", "head_dim"))
                rotary = Rotary(file.get_tensor("rotary.inv_freq"), **header.pop("rotary"))
                bits = header.pop("bits")
                stacks = {name: file.get_tensor(name).float() for name in TENSORS}
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ParetoError(f"{path} is truncated or no KV-scales file: make the scales again") from error
        head, square = (layers, heads, dim), (layers, heads, dim, dim)
        shapes = dict(zip(TENSORS, (head, head, square, square, (layers, heads), head), strict=True))
        for name, stack in stacks.items():
            if tuple(stack.shape) != shapes[name]:
                raise ParetoError(f"{path}: {name} has the shape {tuple(stack.shape)} instead of {shapes[name]}")
            if not stack.isfinite().all():
                raise ParetoError(f"{path}: {name} is not finite")
        if not (stacks["value_size"] > 0).all():
            raise ParetoError(f"{path}: value_size is not positive")
        length = stacks["value_mirror"].double().square().sum(-1)
        if not torch.isclose(torch.where(length == 0, 2.0, length), torch.tensor(2.0).double(), atol=1e-5).all():
            raise ParetoError(f"{path}: value_mirror is neither 0 nor of length sqrt(2)")
        if rotary.inv_freq.numel() * 2 != dim:
            raise ParetoError(
                f"{path}: {rotary.inv_freq.numel()} rotary frequencies do not fit heads of {dim} channels"
            )
        if bits is not None:
            bits = [layer_format(*pair) and (pair[0], pair[1]) for pair in bits]
            if len(bits) != layers:
                raise ParetoError(f"{path}: bits for {len(bits)} layers instead of {layers}")
        made = [LayerScales(**{name: stack[i] for name, stack in stacks.items()}, rotary=rotary) for i in range(layers)]
        return cls(layers, heads, dim, made, bits, header)
