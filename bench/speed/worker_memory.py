"""What a worker's memory is made of, asked of the worker itself while it serves.

vLLM logs these figures in words that change between releases; a class that it mixes into its workers
(``--worker-extension-cls``) reads them where they are kept.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from bench.quality.worker_tap import LogitsTap


class MemoryProbe(LogitsTap):
    """Methods that vLLM mixes into its worker; each returns a mapping, which is all that its HTTP door passes on."""

    def pareto_memory_begin(self) -> dict[str, Any]:
        """Let peaks count from now on."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return {}

    def pareto_memory(self) -> dict[str, Any]:
        """Return the bytes of this rank, and what its pages cost.

        ``weights`` and ``profiled_activations`` are vLLM's, None where it has none; ``allocated`` and
        ``peak_allocated`` PyTorch's on the GPU, None on a CPU, where its allocator does not count; ``peak_rss`` the
        process's since it started. ``token_cost`` is :func:`bench.quality.worker_tap.token_cost`'s.
        """
        gpu = torch.cuda.is_available()
        # vLLM's own figure. Its runner for CPUs takes none, and the parameters are no help there: most are empty after
        # oneDNN has packed them into tensors of its own.
        loaded = getattr(self.model_runner, "model_memory_usage", None)
        profiled = getattr(self, "peak_activation_memory", None)
        return {
            "weights": None if loaded is None else int(loaded),
            "kv_cache": self.pareto_kv_bytes(),
            "allocated": torch.cuda.memory_allocated() if gpu else None,
            "peak_allocated": torch.cuda.max_memory_allocated() if gpu else None,
            "profiled_activations": None if profiled is None else int(profiled),
            "peak_rss": peak_rss(),
            "token_cost": list(self.pareto_token_cost()),
        }


def peak_rss(status: Path = Path("/proc/self/status")) -> int | None:
    """Return the most bytes that this process has had in memory; None where the system does not say."""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) << 10 if found else None
