"""What a worker's memory is made of, asked of the worker itself while it serves.

vLLM logs these figures in words that change between releases; a class that it mixes into its workers
(``--worker-extension-cls``) reads them where they are kept.
"""

from __future__ import annotations

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

        The names are those of :class:`bench.speed.served_schema.Memory`; ``allocated`` and ``peak_allocated`` are
        PyTorch's on the GPU, None on a CPU, where its allocator does not count; ``rss`` and ``peak_rss`` are the
        process's, the latter since it started. ``token_cost`` is :func:`bench.quality.worker_tap.token_cost`'s.
        """
        gpu = torch.cuda.is_available()
        # vLLM's own figure; its runner for CPUs takes none.
        loaded = int(getattr(self.model_runner, "model_memory_usage", 0) or 0)
        profiled = getattr(self, "peak_activation_memory", None)
        rss, peak_rss = resident()
        return {
            "weights": loaded or storage_bytes(self.model_runner.get_model()),
            "kv_cache": self.pareto_kv_bytes(),
            "allocated": torch.cuda.memory_allocated() if gpu else None,
            "peak_allocated": torch.cuda.max_memory_allocated() if gpu else None,
            "profiled_activations": None if profiled is None else int(profiled),
            "rss": rss,
            "peak_rss": peak_rss,
            "token_cost": list(self.pareto_token_cost()),
        }


def storage_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, those that share memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def resident(status: Path = Path("/proc/self/status")) -> tuple[int | None, int | None]:
    """Return the bytes of this process in memory, now and at most so far; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    except OSError:
        return None, None
    now, peak = (lines.get(name, "").split() for name in ("VmRSS", "VmHWM"))
    return (int(now[0]) << 10 if now else None), (int(peak[0]) << 10 if peak else None)
