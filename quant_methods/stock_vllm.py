"""What serves a checkpoint: what stock vLLM has kernels for, and what takes this plugin."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from quant_methods.steps import RoundStep


def stock_devices(step: RoundStep) -> tuple[str, ...]:
    """Return the devices on which stock vLLM 0.32 serves what a step makes: ``cpu``, ``cuda``, or none.

    Its kernels are listed in its model_executor/kernels/linear: int8 activations by 8-bit symmetric weights with
    one scale per channel; 16-bit activations by 4-bit weights, and on CUDA (Marlin) by symmetric 8-bit weights.
    Everything else is served by this plugin, from the format of ``native_format.py``. On CPUs with AMX vLLM rounds
    activations per token whatever the checkpoint says, so that static scales are for CUDA.
    """
    if not step.plain:
        return ()
    if step.static:
        return ("cuda",)
    if step.activations == "int8":
        return ("cpu", "cuda") if step.bits == 8 and step.group_size == -1 and step.symmetric else ()
    if step.activations != "none" or step.bits not in (4, 8):
        return ()
    if step.bits == 8:
        return ("cuda",) if step.symmetric else ()
    return ("cpu", "cuda")


@dataclass(frozen=True)
class Serving:
    """What serves a checkpoint.

    Attributes:
        devices: where: ``cpu``, ``cuda``.
        plugin: vLLM with this plugin does; else stock vLLM does.

    """

    devices: tuple[str, ...]
    plugin: bool

    @classmethod
    def of(cls, steps: Iterable[RoundStep]) -> Serving:
        """Return what serves a checkpoint whose layers went through these steps."""
        stock = {"cpu", "cuda"}
        for step in steps:
            if not stock_devices(step):
                return cls(("cpu", "cuda"), plugin=True)
            stock &= set(stock_devices(step))
        return cls(tuple(sorted(stock)), plugin=False)

    def __str__(self) -> str:
        """Return it in words."""
        what = "vLLM with this plugin" if self.plugin else "stock vLLM"
        return f"{what} on {' and '.join(device.upper() for device in self.devices)}"
