"""Zeros of pruned layers, counted in what is written, and none of them lost while the model learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.storage import Storage
from quant_methods.report import LayerReport
from quant_methods.steps import PruneStep, RoundStep, TrainStep


def zeros(name: str, tensors: Mapping[str, Tensor], step: RoundStep | None, storage: Storage) -> Tensor:
    """Return which weights of a layer read back as zero, bool [out, in].

    Args:
        name: the layer's full name.
        tensors: its block's tensors as stored.
        step: what rounded it, or None.
        storage: the format of its codes.

    """
    # Of the codes: a low-rank product beside them is dense.
    stored = tensors[f"{name}.weight"] if step is None else storage.unpack(name, tensors, step).read_bulk()
    return stored == 0


def recounted(
    layer: LayerReport,
    prune: PruneStep,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    step: RoundStep | None,
    storage: Storage,
) -> LayerReport:
    """Return the report of a pruned layer that has learned.

    Args:
        layer: its report from before.
        prune: what pruned it.
        before: its block's tensors, before it learned.
        after: the same, after.
        step: what rounded it, or None.
        storage: the format of its codes.

    Raises:
        ParetoError: zeros were lost, or those that training was to choose are not there.

    """
    old, new = (zeros(layer.name, tensors, step, storage) for tensors in (before, after))
    lost, count, error = int((old & ~new).sum()), int(new.sum()), layer.relative_error
    if isinstance(prune, TrainStep):
        lost += max(0, int(prune.sparsity * new.numel()) - count)
        first, last = (tensors[f"{layer.name}.weight"].float() for tensors in (before, after))
        error = float((first - last).norm() / first.norm())
    if lost:
        raise ParetoError(f"no-op: {layer.name} lacks {lost} zeros after it learned; nothing was kept")
    return dataclasses.replace(layer, zeros=count, relative_error=error)
