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
"""Of a file whose layers are all alike."""
SCHEMA_OF_GROUPS = "vllm-pareto/kv-scales/5"
"""Of a file with groups of layers: those of a group have one shape and one rotary embedding."""
GROUP = ("num_kv_heads", "head_dim", "rotary")
"""What the header says of a group beside its layers."""


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
        rotary: of the layer; one object for all layers that have the same.

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
    """Scales for every layer of one model. Layers may differ in their heads and in their rotary embedding.

    Attributes:
        layers: of each decoder layer in turn; None for one whose cache is not coded by scales of its own: it has no
            attention, reads another layer's cache, or has heads that no kernel serves.
        bits: what ``mixed_per_head`` gives each layer, (bits of keys, bits of values); None: nothing was chosen.
        metadata: how they were made (seed, number of tokens, tool versions); JSON values.

    """

    layers: list[LayerScales | None]
    bits: list[tuple[int, int]] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Decoder layers, those without scales included."""
        return len(self.layers)

    def shape(self, index: int) -> tuple[int, int] | None:
        """Return (KV heads before any tensor parallelism, channels of a head) of a layer; None without scales."""
        layer = self.layers[index]
        return None if layer is None else (layer.key_mean.shape[0], layer.key_mean.shape[1])

    @property
    def uniform(self) -> bool:
        """Whether all layers have scales, of one shape."""
        return len({self.shape(index) for index in range(self.num_layers)} | {None}) == 2 and None not in self.layers

    @property
    def head_dim(self) -> int:
        """Channels of a head in a model whose layers are `uniform`.

        Raises:
            ParetoError: its layers differ.

        """
        shape = self.shape(0)
        if not self.uniform or shape is None:
            raise ParetoError("the layers of this model differ in their heads, or not all of them are coded")
        return shape[1]

    def layer(self, index: int) -> LayerScales:
        """Return one layer's scales.

        Raises:
            ParetoError: there is no such layer, or it has none.

        """
        if not 0 <= index < self.num_layers:
            raise ParetoError(f"the checkpoint has KV scales for {self.num_layers} layers, not for layer {index}")
        found = self.layers[index]
        if found is None:
            raise ParetoError(f"the checkpoint has no KV scales for layer {index}, which was not calibrated")
        return found

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
        numbers = bits = 0.0
        for index in range(self.num_layers):
            if shape := self.shape(index):
                numbers += math.prod(shape)
                bits += math.prod(shape) * self.format(name, index).bits_per_element(shape[1])
        return bits / numbers

    def _groups(self) -> list[list[int]]:
        """Return the layers with scales that have one shape and one rotary embedding, from the first on."""
        found: dict[tuple[Any, ...], list[int]] = {}
        for index, layer in enumerate(self.layers):
            if layer is not None:
                found.setdefault((self.shape(index), id(layer.rotary)), []).append(index)
        return list(found.values())

    def save(self, checkpoint: Path | str) -> Path:
        """Write ``kv_scales/scales.safetensors`` into a checkpoint's folder, atomically; returns its path."""
        path = Path(checkpoint) / SCALES_FILE
        tensors: dict[str, torch.Tensor] = {}
        groups = []
        for number, indices in enumerate(self._groups()):
            # Where all layers are alike the file is what it was before layers could differ.
            prefix = "" if len(indices) == self.num_layers else f"{number}."
            layers = [self.layer(index) for index in indices]
            for name in TENSORS:
                stack = torch.stack([getattr(layer, name) for layer in layers]).float()
                tensors[prefix + name] = (stack.to(MATRIX_DTYPE) if name == "key_transform" else stack).contiguous()
            rotary, (heads, dim) = layers[0].rotary, layers[0].key_mean.shape
            tensors[f"{prefix}rotary.inv_freq"] = rotary.inv_freq.float().contiguous()
            described = {name: getattr(rotary, name) for name in ("max_position", "rotated", "interleaved")}
            groups.append({"layers": indices, "num_kv_heads": heads, "head_dim": dim, "rotary": described})
        alike = len(groups) == 1 and len(groups[0]["layers"]) == self.num_layers
        header = {
            "schema": SCHEMA if alike else SCHEMA_OF_GROUPS,
            "num_layers": self.num_layers,
            **({name: groups[0][name] for name in GROUP} if alike else {"groups": groups}),
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
            # vLLM builds models with their device as the default, also where a worker reads its scales there.
            with torch.device("cpu"), safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["kv_scales"])
                if (schema := header.pop("schema", None)) not in (SCHEMA, SCHEMA_OF_GROUPS):
                    raise ParetoError(f"{path}: written by another version of vllm-pareto; make the scales again")
                count, bits = int(header.pop("num_layers")), header.pop("bits")
                layers: list[LayerScales | None] = [None] * count
                if schema == SCHEMA:
                    groups = [("", {"layers": range(count), **{name: header.pop(name) for name in GROUP}})]
                else:
                    groups = [(f"{number}.", group) for number, group in enumerate(header.pop("groups"))]
                for prefix, group in groups:
                    stacks = {name: file.get_tensor(prefix + name).float() for name in TENSORS}
                    rotary = Rotary(file.get_tensor(f"{prefix}rotary.inv_freq"), **group["rotary"])
                    shape = len(group["layers"]), int(group["num_kv_heads"]), int(group["head_dim"])
                    _check(path, stacks, rotary, shape)
                    for place, index in enumerate(group["layers"]):
                        layers[index] = LayerScales(**{name: x[place] for name, x in stacks.items()}, rotary=rotary)
        except (SafetensorError, KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
            raise ParetoError(f"{path} is truncated or no KV-scales file: make the scales again") from error
        if bits is not None:
            bits = [layer_format(*pair) and (pair[0], pair[1]) for pair in bits]
            if len(bits) != count:
                raise ParetoError(f"{path}: bits for {len(bits)} layers instead of {count}")
        return cls(layers, bits, header)


def _check(path: Path, stacks: dict[str, torch.Tensor], rotary: Rotary, shape: tuple[int, int, int]) -> None:
    """Raise unless the stacked tensors of ``shape``, (layers, KV heads, head_dim), are what scales can be."""
    layers, heads, dim = shape
    square = (*shape, dim)
    shapes = dict(zip(TENSORS, (shape, shape, square, square, (layers, heads), shape), strict=True))
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
        raise ParetoError(f"{path}: {rotary.inv_freq.numel()} rotary frequencies do not fit heads of {dim} channels")
