"""Writes sparse weights as compressed-tensors 0.11.0 did; ``test_sparse_formats.py`` holds it to its bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.utils import (
    get_permutations_24,
    pack_bitmasks,
    sparse_semi_structured_from_dense_cutlass,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def kept(weight: Tensor) -> Tensor:
    """Return which two of four are the largest."""
    fours = weight.reshape(-1, 4).abs()
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.topk(2).indices, True).view(weight.shape)


def bitmask(weight: Tensor) -> dict[str, Tensor]:
    mask = weight != 0
    counts = mask.sum(1)
    offsets = counts.cumsum(0) - counts
    shape = torch.tensor(weight.shape)
    return {"shape": shape, "compressed": weight[mask], "bitmask": pack_bitmasks(mask), "row_offsets": offsets}


def bitmask_24(weight: Tensor) -> dict[str, Tensor]:
    mask = kept(weight)
    values = weight[mask].view(weight.shape[0], -1)
    return {"shape": torch.tensor(weight.shape).view(-1, 1), "compressed": values, "bitmask": pack_bitmasks(mask)}


def marlin_24(codes: Tensor, scale: Tensor, bits: int) -> dict[str, Tensor]:
    """Codes [rows, inputs], scales [rows, groups]."""
    values, meta = sparse_semi_structured_from_dense_cutlass(codes.half())
    unsigned = values.T.long() + (1 << (bits - 1))
    inputs, rows = unsigned.shape
    permutation, grouped, _ = get_permutations_24(bits)
    tiles = unsigned.reshape(inputs // 16, 16, rows // 16, 16).permute(0, 2, 1, 3).reshape(-1, permutation.numel())
    stream = tiles[:, permutation].reshape(inputs // 16, rows * 16 // (32 // bits), 32 // bits)
    packed = (stream << torch.arange(0, 32, bits)).sum(-1)
    stored = scale.half().T.contiguous()
    if len(stored) > 1 and 2 * inputs // len(stored) < inputs:
        stored = stored.reshape(-1, 64)[:, grouped].view(stored.shape)
    return {
        "weight_packed": ((packed + 2**31) % 2**32 - 2**31).int(),
        "scale_packed": stored,
        "meta": meta.reshape(meta.shape[1] // 2, -1),
    }


def rounded(weight: Tensor, bits: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Return the codes of a 2:4 weight, and scales of float16."""
    grouped = (weight * kept(weight)).unflatten(1, (groups, -1))
    top = (1 << (bits - 1)) - 1
    scale = (grouped.abs().amax(2) / top).half().float()
    return (grouped / scale[:, :, None]).round().clamp(-top - 1, top).flatten(1), scale


def scheme(bits: int, activations: dict[str, Any] | None = None, group_size: int | None = None) -> dict[str, Any]:
    strategy = "channel" if group_size is None else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group_size}
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}


PER_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def write_sparse(model: Path, out: Path, kind: str) -> tuple[Path, Path]:
    """Write a dense model's sparse checkpoint of a kind, and the dense one that means the same; return both folders."""
    dense, stored = {}, {}
    bits = {"marlin-4": 4, "marlin-8": 8, "int-24": 8}.get(kind)
    for full, tensor in load_file(model / "model.safetensors").items():
        name = full.removesuffix(".weight")
        if not name.endswith(LINEAR):
            dense[full] = stored[full] = tensor
            continue
        if bits is None:
            weight = torch.where(tensor.abs() > tensor.abs().median(), tensor, 0) if kind == "bitmask" else None
            dense[full] = tensor * kept(tensor) if weight is None else weight
            local = bitmask(dense[full]) if kind == "bitmask" else bitmask_24(dense[full])
        else:
            codes, scale = rounded(tensor.float(), bits)
            dense[full] = (codes * scale).to(tensor.dtype)
            plain = {**bitmask_24(codes.to(torch.int8)), "weight_scale": scale}
            local = plain if kind == "int-24" else marlin_24(codes, scale, bits)
        stored |= {f"{name}.{key}": value.contiguous() for key, value in local.items()}
    sparse_form = "sparse-bitmask" if kind == "bitmask" else "sparse-24-bitmask"
    sparsity = {"format": sparse_form, "targets": ["Linear"], "ignore": ["lm_head"], "sparsity_structure": "2:4"}
    settings: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "ignore": ["lm_head"],
        "sparsity_config": sparsity,
    }
    if bits is not None:
        settings |= {"config_groups": scheme(bits, PER_TOKEN if kind == "int-24" else None)}
        settings |= {
            "format": "int-quantized" if kind == "int-24" else "marlin-24",
            "quantization_status": "compressed",
        }
        settings["sparsity_config"] = sparsity if kind == "int-24" else {}
    for folder, tensors in ((out / kind, stored), (out / f"{kind}-dense", dense)):
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (out / kind / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return out / kind, out / f"{kind}-dense"
