"""What kernels ask of the tensors whose addresses they are given: they see neither dtypes nor shapes themselves."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kv_cache.errors import ParetoError


def expect(where: str, conditions: Iterable[tuple[bool, str]]) -> None:
    """Raise for the first condition that does not hold.

    Args:
        where: what asks for it.
        conditions: whether each holds, and what it asks for.

    Raises:
        ParetoError: one does not.

    """
    for holds, what in conditions:
        if not holds:
            raise ParetoError(f"{where} expects {what}")


def in_line(tensor: torch.Tensor) -> bool:
    """Return whether the elements of the last dimension lie one after the other."""
    return tensor.shape[-1] < 2 or tensor.stride(-1) == 1


def is_vector(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether it is one dimension of a dtype without gaps."""
    return tensor.dtype == dtype and tensor.dim() == 1 and in_line(tensor)


def is_table(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether it is two dimensions of a dtype whose rows have no gaps."""
    return tensor.dtype == dtype and tensor.dim() == 2 and in_line(tensor)


def are_heads(tensor: torch.Tensor, heads: int, dim: int) -> bool:
    """Return whether it is [tokens, heads, channels] with channels that lie one after the other."""
    return tensor.dim() == 3 and tuple(tensor.shape[1:]) == (heads, dim) and in_line(tensor)


def are_sinks(tensor: torch.Tensor, heads: int, device: torch.device) -> bool:
    """Return whether it is a logit of each query head: float32 [heads] without gaps, on a device."""
    return is_vector(tensor, torch.float32) and tensor.shape[0] == heads and tensor.device == device
