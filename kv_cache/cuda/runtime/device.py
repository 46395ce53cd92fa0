"""What a CUDA device offers a kernel."""

from __future__ import annotations

import functools

import torch

RESERVED_SHARED = 1024
"""Bytes of shared memory that the system takes of each thread block."""


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int, bool]:
    """Return a device's multiprocessors, the shared memory of a block, and whether launches may overlap."""
    properties = torch.cuda.get_device_properties(device)
    overlap = torch.cuda.get_device_capability(device) >= (9, 0)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin, overlap


def architecture(device: torch.device) -> str:
    """Return the name under which NVRTC compiles for a device: ``sm_80``, ``sm_90``, ..."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
