"""Reads source checkpoints and writes compressed-tensors checkpoints, without ever holding a whole one in memory.

Layouts (https://github.com/vllm-project/compressed-tensors): ``pack-quantized`` stores a linear layer as
``weight_packed`` (codes, 32/bits of them in an int32, along the input channels), ``weight_scale``, ``weight_shape``
and, with zero-points, ``weight_zero_point`` (packed along the output channels); ``int-quantized`` as int8 ``weight``
and ``weight_scale``. Tensors that are not quantized are copied byte for byte.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kv_cache.atomic import write_bytes
from kv_cache.errors import ParetoError
from quant_methods.formats.foreign_formats import unpack_stream
from quant_methods.formats.grid import Grid
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.formats.sparse_formats import bitmask_tensors, unpack_bitmask
from quant_methods.model_source import INDEX, SINGLE, read_header, weight_files
from quant_methods.steps import RoundStep

SHARD_BYTES = 4 << 30
# Linux' request to share a file's blocks; Python has no name for it before 3.12.
_FICLONE = 0x40049409
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Files that make a checkpoint usable beside its weights: tokenizer, chat template, generation defaults, licence, and
# what older tools say of their quantization beside config.json.
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken",
    "chat_template*", "generation_config.json", "preprocessor_config.json", "LICENSE*", "NOTICE*",
    "quantize_config.json", "quant_config.json",
)  # fmt: skip


class Source:
    """A safetensors checkpoint on disk; a weight that is stored sparsely, with a bitmask, is read as a dense one."""

    def __init__(self, model_dir: Path) -> None:
        """Read the headers of its files.

        Raises:
            ParetoError: a file is missing or damaged.

        """
        self.dir = model_dir
        self.entries: dict[str, tuple[Path, dict[str, Any]]] = {}
        for path in weight_files(model_dir):
            for name, entry in read_header(path).items():
                self.entries[name] = (path, entry)

    def __contains__(self, name: str) -> bool:
        """Return whether the checkpoint has a tensor of this name."""
        return name in self.entries or bool(bitmask_tensors(name, self.entries))

    def read(self, name: str) -> Tensor:
        """Return one tensor, on the CPU in its stored dtype.

        Raises:
            ParetoError: there is none of that name.

        """
        if parts := bitmask_tensors(name, self.entries):
            module = name.removesuffix(".weight")
            return unpack_bitmask(module, {part: self.stored(f"{module}.{part}") for part in parts})
        return self.stored(name)

    def stored(self, name: str) -> Tensor:
        """Return one tensor as it is stored; see :meth:`read`."""
        if name not in self.entries:
            raise ParetoError(f"{self.dir}: the checkpoint lacks {name}")
        with safe_open(self.entries[name][0], framework="pt") as file:
            return file.get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is stored in."""
        return _DTYPES[self.entries[name][1]["dtype"]]

    def changed(self) -> list[str]:
        """Return the names of the tensors that ``read`` returns other than the files have them: none."""
        return []

    def check_block(self, block: nn.Module, config: Any) -> None:
        """Refuse a model that tensors changed like this would not compute the same in.

        Args:
            block: its first block.
            config: transformers' configuration of it.

        Raises:
            ParetoError: what of it does not fit.

        """

    def size_of(self, name: str) -> int:
        """Return the bytes of one tensor."""
        start, stop = self.entries[name][1]["data_offsets"]
        return int(stop - start)

    def size(self) -> int:
        """Return the bytes of all tensors."""
        return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for _, entry in self.entries.values())


def pack_linear(name: str, linear: QuantizedLinear, step: RoundStep) -> dict[str, Tensor]:
    """Return the tensors that store a quantized layer named ``name``, which is codes on a grid and nothing else."""
    grid = linear.part(GridCodes)
    if step.activations != "none":
        stored = {f"{name}.weight": grid.codes.contiguous(), f"{name}.weight_scale": grid.scale.contiguous()}
        return stored if linear.input_scale is None else stored | {f"{name}.input_scale": linear.input_scale}
    tensors = {
        f"{name}.weight_packed": pack_to_int32(grid.codes, step.bits).contiguous(),
        f"{name}.weight_scale": grid.scale.contiguous(),
        f"{name}.weight_shape": torch.tensor(grid.codes.shape, dtype=torch.int64),
    }
    if not step.symmetric:
        tensors[f"{name}.weight_zero_point"] = pack_to_int32(grid.zero_point, step.bits, packed_dim=0).contiguous()
    return tensors


def unpack_linear(name: str, tensors: dict[str, Tensor], grid: Grid) -> QuantizedLinear:
    """Return the quantized layer that ``pack_linear`` stored."""
    scale = tensors[f"{name}.weight_scale"]
    if f"{name}.weight" in tensors:
        zero = tensors.get(f"{name}.weight_zero_point", torch.zeros_like(scale, dtype=torch.int8))
        codes = GridCodes(tensors[f"{name}.weight"], scale, zero, grid.bits, grid.symmetric)
        return QuantizedLinear(codes, input_scale=tensors.get(f"{name}.input_scale"))
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    codes = _unpack(tensors[f"{name}.weight_packed"], grid.bits, columns)
    zero = torch.zeros_like(scale, dtype=torch.int8)
    if not grid.symmetric:
        zero = _unpack(tensors[f"{name}.weight_zero_point"].T, grid.bits, rows).T.contiguous()
    return QuantizedLinear(GridCodes(codes, scale, zero, grid.bits, grid.symmetric))


def _unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Return int8 [rows, count], signed codes, from either packing of compressed-tensors.

    Codes of 3, 5, 6 and 7 bits lie behind each other as one stream (as 0.19 packs them), or a word holds as many whole
    ones as fit (0.17). The number of words tells the two apart, for counts of 96 or more and multiples of 32; with 2, 4
    and 8 bits they are the same.
    """
    if words.shape[1] == math.ceil(count * bits / 32):
        return (unpack_stream(words.T, bits, count).T - (1 << (bits - 1))).to(torch.int8).contiguous()
    return unpack_from_int32(words.contiguous(), bits, torch.Size((len(words), count)))


def quantization_config(schemes: list[tuple[RoundStep, list[str]]], ignored: list[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of config.json.

    Args:
        schemes: each step with the module names that it quantized.
        ignored: names of the linear modules left alone.

    """
    groups = {}
    for index, (step, names) in enumerate(schemes):
        channel = step.group_size == -1
        weights = {
            "num_bits": step.bits,
            "type": "int",
            "symmetric": step.symmetric,
            "strategy": "channel" if channel else "group",
            "group_size": None if channel else step.group_size,
            "block_structure": None,
            "dynamic": False,
            "actorder": "weight" if getattr(step, "act_order", False) else None,
            "observer": "minmax",
            "observer_kwargs": {},
        }
        activations = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "tensor" if step.static else "token",
            "dynamic": not step.static,
            "observer": "minmax" if step.static else None,
        }
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else names,
            "weights": weights,
            "input_activations": activations if step.activations != "none" else None,
            "output_activations": None,
            "format": _format(step),
        }
    formats = {_format(step) for step, _ in schemes}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": compressed_tensors.__version__,
    }


def _format(step: RoundStep) -> str:
    return "pack-quantized" if step.activations == "none" else "int-quantized"


@dataclass(frozen=True)
class _Piece:
    """One tensor's bytes inside a file."""

    name: str
    path: Path
    begin: int
    entry: dict[str, Any]

    @property
    def size(self) -> int:
        start, stop = self.entry["data_offsets"]
        return int(stop - start)


def _pieces(path: Path) -> Iterator[_Piece]:
    with path.open("rb") as file:
        base = 8 + struct.unpack("<Q", file.read(8))[0]
    for name, entry in read_header(path).items():
        yield _Piece(name, path, base + entry["data_offsets"][0], entry)


def assemble(source: Source, replaced: set[str], parts: list[Path], out: Path) -> int:
    """Write a checkpoint's weight files from the source's tensors and the finished blocks, by copying byte ranges.

    Args:
        source: the original checkpoint.
        replaced: names of its tensors that quantized ones replace.
        parts: safetensors files with the quantized tensors.
        out: directory to write into.

    Returns:
        Bytes of all tensors written.

    """
    pieces = [p for path in weight_files(source.dir) for p in _pieces(path) if p.name not in replaced]
    pieces += [piece for path in parts for piece in _pieces(path)]
    pieces.sort(key=lambda piece: piece.name)
    shards: list[list[_Piece]] = [[]]
    room = SHARD_BYTES
    for piece in pieces:
        if piece.size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(piece)
        room -= piece.size
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for name, shard in zip(names, shards, strict=True):
        _write_shard(out / name, shard)
    total = sum(piece.size for piece in pieces)
    if len(shards) > 1:
        weight_map = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return total


def _write_shard(path: Path, pieces: list[_Piece]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide elements first keeps every offset a multiple of its element's size, as readers that map the file want it.
    ordered = sorted(pieces, key=lambda piece: (-_ALIGNMENT.get(piece.entry["dtype"], 8), piece.name))
    for piece in ordered:
        header[piece.name] = {
            "dtype": piece.entry["dtype"],
            "shape": piece.entry["shape"],
            "data_offsets": [offset, offset + piece.size],
        }
        offset += piece.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in ordered:
            with piece.path.open("rb") as origin:
                origin.seek(piece.begin)
                left = piece.size
                while left:
                    chunk = origin.read(min(left, 16 << 20))
                    if not chunk:
                        raise ParetoError(f"{piece.path} became shorter while it was read")
                    file.write(chunk)
                    left -= len(chunk)
        file.flush()
        os.fsync(file.fileno())


_ALIGNMENT = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2} | {
    name: 1 for name in ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2")
}


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    write_bytes(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    write_bytes(path, save({name: tensor.cpu() for name, tensor in tensors.items()}, metadata=metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def copy_file(origin: Path, target: Path) -> None:
    """Copy a file that someone else may edit: not a second name, through which an edit of one would change both.

    Where the file system can, both share their blocks until one is written to, so that the copy takes no room.
    """
    with origin.open("rb") as source, target.open("wb") as copy:
        try:
            fcntl.ioctl(copy.fileno(), _FICLONE, source.fileno())
        except OSError:
            shutil.copyfileobj(source, copy, 16 << 20)
        copy.flush()
        os.fsync(copy.fileno())


def link_or_copy(origin: Path, target: Path) -> None:
    """Give a file of our own a second name, or copy it where the file system does not allow that."""
    try:
        os.link(origin.resolve(), target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        shutil.copyfile(origin, target)


def copy_companions(model_dir: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence."""
    for pattern in COPIED:
        for path in sorted(model_dir.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, out / path.name)


@contextlib.contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ParetoError(f"{path}: the disk is full; free some space and run the same command to go on") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ParetoError(f"{error.filename or path}: cannot be written ({error.strerror})") from error
        raise
