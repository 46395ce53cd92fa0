"""Refuses what is not finite, by name: one NaN among the weights spreads to every later number of a run.

Each check waits for the device once, however many tensors it looks at.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kv_cache.errors import ParetoError


def check_weights(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not finite.

    Args:
        tensors: by full name.

    Raises:
        ParetoError: with the first tensor's name.

    """
    if (bad := _first(tensors)) is not None:
        count = int((~torch.isfinite(tensors[bad])).sum())
        raise ParetoError(
            f"{bad} of the model holds NaN or infinity ({count:,} of {tensors[bad].numel():,} values), in a layer that "
            "cannot be compressed so; the file is damaged, or training diverged"
        )


def check_inputs(tensors: Mapping[str, Tensor]) -> None:
    """Refuse activations, or what is summed over them, that are not finite.

    Args:
        tensors: by what to call them, the name of a layer or block in front.

    Raises:
        ParetoError: with the first one's name.

    """
    if (bad := _first(tensors)) is not None:
        raise ParetoError(
            f"layer {bad} overflow to NaN or infinity on the calibration text; the weights of this layer, or of those "
            "before it, are too large to compute with"
        )


def _first(tensors: Mapping[str, Tensor]) -> str | None:
    # Eight bits hold no infinity in most formats, and PyTorch does not ask them.
    floats = {name: t for name, t in tensors.items() if t.is_floating_point() and t.element_size() > 1}
    # Tensors may lie on several devices; flags of one device are gathered there before the host reads them.
    flags: dict[torch.device, list[Tensor]] = {}
    for tensor in floats.values():
        # What is not finite makes the sum so, which takes a CPU a thirtieth of the time of asking each value.
        flags.setdefault(tensor.device, []).append(torch.isfinite(tensor.sum()))
    if all(bool(torch.stack(own).all()) for own in flags.values()):
        return None
    # None, where finite values had too large a sum.
    return next((name for name, tensor in floats.items() if not torch.isfinite(tensor).all()), None)
