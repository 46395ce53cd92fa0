"""Sparse weights in layouts that compressed-tensors 0.11 had, and 0.17 no longer reads or writes.

``sparse-24-bitmask`` and ``sparse-bitmask`` store a weight NAME.weight as ``NAME.compressed``, its non-zero elements
row after row, ``NAME.bitmask``, uint8 [rows, ceil(columns / 8)] with the first column lowest, and ``NAME.shape``.
``sparse-bitmask`` has ``NAME.row_offsets`` too: where each row begins in ``compressed``. The elements may be codes of
a quantization (int8, float8), whose scales lie beside them as if the weight were stored densely.

``marlin-24`` stores 4- or 8-bit codes with two of four equal to zero, in the order of the Sparse-Marlin kernel (Frantar
et al., "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large Language Models", arXiv 2408.11743):
``weight_packed`` int32 [inputs / 32, rows * bits / 2], ``scale_packed`` float16 [groups, rows], and ``meta`` int16
[inputs / 32, 2 * rows], two bits for the place of each code in its four.

Sources: compressed-tensors 0.11.0, the folders ``sparse_compressors`` and ``sparse_quantized_compressors``. What the
installed compressed-tensors still has of it, the permutations and the places of codes, is used from there.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.parts.grid_codes import GridCodes

BITMASKS = ("sparse-24-bitmask", "sparse-bitmask")
MARLIN_24 = "marlin-24"
BITMASK_TENSORS = {"compressed", "bitmask", "shape"}
"""Local names of a sparse weight."""
ROW_OFFSETS = "row_offsets"
"""Of a weight of ``sparse-bitmask``; it says nothing that the mask does not say."""
MARLIN_TENSORS = {"weight_packed", "scale_packed", "meta"}
DAMAGED = "the checkpoint is damaged"
_TILE = 16


def is_marlin(settings: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Return whether layers of a group of a ``quantization_config`` are stored as ``marlin-24``."""
    return (group.get("format") or settings.get("format")) == MARLIN_24


def has_marlin(settings: Mapping[str, Any]) -> bool:
    """Return whether a ``quantization_config`` has layers of ``marlin-24``."""
    return any(is_marlin(settings, group) for group in (settings.get("config_groups") or {}).values())


def is_sparse(settings: Mapping[str, Any] | None) -> bool:
    """Return whether a ``quantization_config`` speaks of sparse weights, whatever they are stored as.

    Raises:
        ParetoError: they are stored in a way that this does not read.

    """
    if settings is None or settings.get("quant_method") != "compressed-tensors":
        return False
    sparsity = settings.get("sparsity_config") or {}
    known = ("dense", *BITMASKS)
    if sparsity and sparsity.get("format") not in known:
        raise ParetoError(
            f"quantization_config: sparsity_config has the format {sparsity.get('format')!r}; expected "
            f"{', '.join(known)}: store the weights densely, zeros included"
        )
    return bool(sparsity) or has_marlin(settings)


def without_sparsity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``quantization_config`` of the checkpoint with its sparse weights expanded."""
    return {key: value for key, value in settings.items() if key != "sparsity_config"}


def bitmask_tensors(name: str, stored: Container[str]) -> list[str]:
    """Return the local names of the tensors that hold a weight NAME.weight with a bitmask; none if it is not so stored.

    Args:
        name: the weight's.
        stored: full names of all tensors of the checkpoint.

    """
    module, _, local = name.rpartition(".")
    if local != "weight" or name in stored or not all(f"{module}.{part}" in stored for part in BITMASK_TENSORS):
        return []
    return [part for part in (*sorted(BITMASK_TENSORS), ROW_OFFSETS) if f"{module}.{part}" in stored]


def unpack_bitmask(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a weight of the layouts ``sparse-24-bitmask`` and ``sparse-bitmask``.

    Args:
        name: the module's, for errors.
        tensors: by local name, see the head of this file.

    Returns:
        [rows, columns] in the dtype and on the device of ``compressed``.

    Raises:
        ParetoError: a tensor is missing, or they contradict each other.

    """
    # Here and not above, as below: it imports transformers, which no checkpoint without sparse weights shall wait for.
    from compressed_tensors.utils import unpack_bitmasks

    _complete(name, tensors, BITMASK_TENSORS)
    values, mask, shape = tensors["compressed"], tensors["bitmask"], tensors["shape"].flatten().tolist()
    if len(shape) != 2 or min(shape) < 1 or mask.dtype != torch.uint8 or mask.shape != (shape[0], -(-shape[1] // 8)):
        raise ParetoError(
            f"{name}.bitmask is {mask.dtype} {list(mask.shape)}, expected torch.uint8 with a bit for each element of a "
            f"weight {shape}; {DAMAGED}"
        )
    where = unpack_bitmasks(mask, shape).to(values.device)
    counts = where.sum(1)
    if int(counts.sum()) != values.numel():
        raise ParetoError(
            f"{name}.compressed has {values.numel()} elements and {name}.bitmask {int(counts.sum())} bits that are "
            f"set; {DAMAGED}"
        )
    offsets = tensors.get(ROW_OFFSETS)
    if offsets is not None and not torch.equal(offsets.to(counts), counts.cumsum(0) - counts):
        raise ParetoError(f"{name}.row_offsets does not say where the rows of {name}.bitmask begin; {DAMAGED}")
    dense = torch.zeros(shape, dtype=values.dtype, device=values.device)
    # PyTorch cannot choose among elements of float8: their bytes are moved.
    plain = dense.view(torch.uint8) if values.element_size() == 1 else dense
    plain[where] = values.flatten().view(plain.dtype)
    return dense


def unpack_marlin_24(name: str, tensors: Mapping[str, Tensor]) -> GridCodes:
    """Return the codes of a layer in the layout ``marlin-24``; those that were left out are zeros.

    Args:
        name: the module's, for errors.
        tensors: by local name, see the head of this file.

    Raises:
        ParetoError: a tensor is missing, or they contradict each other.

    """
    from compressed_tensors.utils import get_permutations_24, sparse_semi_structured_to_dense_cutlass

    _complete(name, tensors, MARLIN_TENSORS)
    packed, scale, meta = tensors["weight_packed"], tensors["scale_packed"], tensors["meta"]
    dims_fit = packed.dim() == scale.dim() == meta.dim() == 2 and 0 not in (packed.numel(), scale.numel())
    tiles, words = packed.shape if dims_fit else (0, 0)
    groups, rows = scale.shape if dims_fit else (1, 1)
    bits, rest = divmod(2 * words, rows)
    inputs = 2 * _TILE * tiles
    if rest or bits not in (4, 8) or rows % 64 or inputs % groups or meta.shape != (tiles, 2 * rows):
        shapes = ", ".join(f"{local} {list(tensors[local].shape)}" for local in sorted(MARLIN_TENSORS))
        raise ParetoError(f"{name}: {shapes} are no 2:4 weight of 4 or 8 bits as marlin-24 has it; {DAMAGED}")
    if packed.dtype != torch.int32 or meta.dtype != torch.int16 or not scale.is_floating_point():
        raise ParetoError(
            f"{name}: weight_packed is {packed.dtype}, meta {meta.dtype} and scale_packed {scale.dtype}, expected "
            f"torch.int32, torch.int16 and floating point; {DAMAGED}"
        )
    permutation, grouped, _ = get_permutations_24(bits)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    stored = ((packed[:, :, None] >> shifts) & ((1 << bits) - 1)).to(torch.int16).reshape(-1, permutation.numel())
    plain = torch.empty_like(stored)
    plain[:, permutation.to(packed.device)] = stored
    kept = plain.view(tiles, rows // _TILE, _TILE, _TILE).permute(0, 2, 1, 3).reshape(inputs // 2, rows)
    signed = (kept.T - (1 << (bits - 1))).to(torch.int8).contiguous()
    codes = sparse_semi_structured_to_dense_cutlass(signed, meta.reshape(rows, inputs // 16))
    if groups > 2:
        # The writer compares the size of a group with half of the input channels, those that are kept: it leaves two
        # groups in their order.
        ordered = torch.empty_like(scale).reshape(-1, len(grouped))
        ordered[:, torch.tensor(grouped, device=scale.device)] = scale.reshape(-1, len(grouped))
        scale = ordered.view(groups, rows)
    scale = scale.T.contiguous()
    zero = torch.zeros(scale.shape, dtype=torch.int8, device=scale.device)
    return GridCodes(codes, scale, zero, bits, symmetric=True)


def expanded(weights: Iterable[tuple[str, Tensor]], *, marlin: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's tensors by name, sparse weights expanded.

    Those of bitmasks become ``NAME.weight``, those of marlin-24 the tensors of our own codes on a grid. Tensors of a
    weight may come in any order; no more are held than of the weights of which some are still to come.

    Args:
        weights: full name and tensor of each.
        marlin: whether the checkpoint has layers of marlin-24; ``weight_packed`` is a name in other layouts too.

    Raises:
        ParetoError: a weight is damaged or lacks a tensor.

    """
    waiting: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for full, tensor in weights:
        name, _, local = full.rpartition(".")
        masked = local in BITMASK_TENSORS | {ROW_OFFSETS}
        if not masked and not (marlin and local in MARLIN_TENSORS):
            yield full, tensor
            continue
        tensors = waiting.setdefault((name, masked), {})
        tensors[local] = tensor
        # Row offsets are dropped if they come last: the mask says the same.
        if (BITMASK_TENSORS if masked else MARLIN_TENSORS) <= tensors.keys():
            del waiting[name, masked]
            if masked:
                yield f"{name}.weight", unpack_bitmask(name, tensors)
            else:
                for own, value in unpack_marlin_24(name, tensors).pack().items():
                    yield f"{name}.{own}", value
    for (name, masked), tensors in waiting.items():
        if tensors.keys() == {"weight_packed"}:
            # Of another layout beside marlin-24.
            yield f"{name}.weight_packed", tensors["weight_packed"]
        elif tensors.keys() != {ROW_OFFSETS}:
            _complete(name, tensors, BITMASK_TENSORS if masked else MARLIN_TENSORS)


def _complete(name: str, tensors: Mapping[str, Tensor], wanted: set[str]) -> None:
    if missing := sorted(wanted - tensors.keys()):
        raise ParetoError(
            f"the checkpoint lacks {name}.{missing[0]}, without which the sparse weight {name} cannot be read"
        )
