"""Energy from the machine's own counters: NVML's of a GPU's board, RAPL's of processors; what has none is not zero.

A GPU of Volta's generation or later counts the millijoules of its whole board
(``nvmlDeviceGetTotalEnergyConsumption``), an x86 processor the microjoules of each package and of its memory (Linux's
``powercap``). Both are counters: nothing is integrated here from samples of power, which cover a quarter of the time on
A100 and H100 (Yang et al. 2023, "Part-time Power Measurements", arXiv 2312.02741). They move in steps, NVML's every 20
to 100 ms, so a window is to be much longer than that.

NVML is asked through ``nvidia-ml-py``, NVIDIA's own bindings, one file. Zeus (0.16), which measures in the same way,
brings pandas, scikit-learn and AMD's library, and creates a CUDA context in the process that measures unless told not
to.
"""

from __future__ import annotations

import os
import re
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Protocol

from bench.environment import VISIBLE_GPUS, named_gpus
from kv_cache.errors import ParetoError

POWERCAP = Path("/sys/class/powercap")
LEAST_WINDOW_S = 1.0
"""Shorter windows are too near to the counters' steps."""
PERIOD_S = 0.02


class CannotMeasure(ParetoError):
    """There is no energy to tell, and why."""


class Counter(Protocol):
    """Energy since some moment, of each of a few devices.

    Attributes:
        name: which counter it is.
        devices: their names.

    """

    name: str
    devices: tuple[str, ...]

    def read(self) -> list[float]:
        """Return the joules of each device since some moment; they never fall.

        Raises:
            CannotMeasure: the counter does not answer.

        """


class NvmlCounter:
    """The boards of some GPUs.

    Args:
        count: how many, the first of those that CUDA may use.
        nvml: the module ``pynvml``, or a stand-in.
        environment: variables of the process that uses the GPUs.

    Raises:
        CannotMeasure: no driver, no such GPU, an older GPU, or a part of one (MIG).

    """

    def __init__(self, count: int, nvml: Any, environment: Mapping[str, str]) -> None:
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            driver = _text(nvml.nvmlSystemGetDriverVersion())
            self.name = f"NVML: energy of the GPU's whole board, driver {driver}"
            names = _visible(environment.get(VISIBLE_GPUS), count)
            self._handles = [self._handle(name) for name in names]
            self.devices = tuple(_text(nvml.nvmlDeviceGetName(handle)) for handle in self._handles)
            if any(self._is_divided(handle) for handle in self._handles):
                raise CannotMeasure("MIG divides the GPU, and its energy counter is that of the whole board")
        except nvml.NVMLError as error:
            raise CannotMeasure(f"NVML does not answer ({error})") from error
        self.read()

    def _handle(self, name: str) -> Any:
        if name.startswith("GPU-"):
            return self._nvml.nvmlDeviceGetHandleByUUID(name)
        return self._nvml.nvmlDeviceGetHandleByIndex(int(name))

    def _is_divided(self, handle: Any) -> bool:
        try:
            return bool(self._nvml.nvmlDeviceGetMigMode(handle)[0])
        except self._nvml.NVMLError:
            return False  # A GPU that cannot be divided.

    def read(self) -> list[float]:
        """See :class:`Counter`."""
        try:
            return [self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000 for handle in self._handles]
        except self._nvml.NVMLError as error:
            raise CannotMeasure(
                f"the GPU's energy counter cannot be read ({error}); Volta and later have one"
            ) from error


def _visible(variable: str | None, count: int) -> list[str]:
    """Return how NVML calls the first GPUs that CUDA may use; CUDA_DEVICE_ORDER is to be PCI_BUS_ID, NVML's order."""
    if (named := named_gpus(variable)) is None:
        return [str(index) for index in range(count)]
    names = named[:count]
    if any(name.startswith("MIG") for name in names):
        raise CannotMeasure(
            "CUDA_VISIBLE_DEVICES names a part of a GPU (MIG), and the energy counter is that of a board"
        )
    if len(names) < count or not all(name.isdigit() or name.startswith("GPU-") for name in names):
        raise CannotMeasure(f"CUDA_VISIBLE_DEVICES={variable} does not name {count} GPU(s) by number or UUID")
    return names


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


class RaplCounter:
    """All processors of this machine, and their memory where it counts apart.

    Args:
        root: ``/sys/class/powercap``.

    Raises:
        CannotMeasure: there are no such counters, or only root may read them.

    """

    name = "RAPL: energy of the processors and their memory"

    def __init__(self, root: Path = POWERCAP) -> None:
        zones = sorted(path for path in _entries(root) if re.fullmatch(r"intel-rapl(:\d+)+", path.name))
        # A package has parts (its cores, its graphics) that are in its own figure; memory is not. "psys", the whole
        # machine, has the packages in it, and the zones called mmio are the same counters once more.
        named = [(path, (path / "name").read_text().strip()) for path in zones]
        self._zones = [path for path, name in named if name.startswith(("package", "dram"))]
        self.devices = tuple(f"{name} ({path.name})" for path, name in named if path in self._zones)
        if not any(name.startswith("package") for _, name in named):
            raise CannotMeasure(f"this machine shows no energy counter of its processors ({root}/intel-rapl:0)")
        self._ranges = [_number(path / "max_energy_range_uj") for path in self._zones]
        self._last = [_number(path / "energy_uj") for path in self._zones]
        self._total = [0] * len(self._zones)

    def read(self) -> list[float]:
        """See :class:`Counter`; the counters start again at 0 after a minute or more, so read them more often."""
        for index, path in enumerate(self._zones):
            value = _number(path / "energy_uj")
            step = value - self._last[index]
            self._total[index] += step if step >= 0 else step + self._ranges[index]
            self._last[index] = value
        return [total / 1e6 for total in self._total]


def _entries(root: Path) -> list[Path]:
    try:
        return list(root.iterdir())
    except OSError:
        return []


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError as error:
        raise CannotMeasure(f"only root may read {path}; run as root, or allow it: chmod a+r {path}") from error
    except (OSError, ValueError) as error:
        raise CannotMeasure(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error


def find_counter(gpus: int) -> Counter:
    """Return the counter of what an engine runs on.

    Args:
        gpus: how many GPUs it uses; 0: it runs on the processors.

    Raises:
        CannotMeasure: there is none; the message says why and what would help.

    """
    if not gpus:
        return RaplCounter()
    try:
        import pynvml
    except ImportError as error:
        raise CannotMeasure("nvidia-ml-py is not installed: pip install 'vllm-pareto[energy]'") from error
    return NvmlCounter(gpus, pynvml, os.environ)


@dataclass(frozen=True)
class Window:
    """Energy between two moments.

    Attributes:
        joules: of each device.
        seconds: how long it was.

    """

    joules: list[float]
    seconds: float

    @property
    def total(self) -> float:
        """Joules of all devices."""
        return sum(self.joules)


@dataclass
class Meter:
    """Reads a counter all the time, so that energy can be told afterwards, between any two moments.

    The load generator runs in a process of its own and says afterwards when its requests began and ended. Between two
    readings energy is taken to grow evenly, so a window is off by at most one step of the counter at each of its ends.

    Attributes:
        counter: what is read.
        clock: seconds since the Unix epoch, as the load generator counts them.
        period_s: between two readings.

    """

    counter: Counter
    clock: Callable[[], float] = time.time
    period_s: float = PERIOD_S
    _times: list[float] = field(default_factory=list)
    _readings: list[list[float]] = field(default_factory=list)
    _failure: str | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Meter:
        self._thread = threading.Thread(target=self._run, name="energy", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._failure:
            self.sample()
            if self._stop.wait(self.period_s):
                return

    def sample(self) -> None:
        """Read the counter now."""
        try:
            readings = self.counter.read()
        except CannotMeasure as error:
            self._failure = str(error)
            return
        now = self.clock()
        if self._times and now <= self._times[-1]:
            return  # The wall clock was set back; windows across it would be wrong, those after it are not.
        if self._readings and any(new < old for new, old in zip(readings, self._readings[-1], strict=True)):
            self._failure = "the energy counter went backwards: was the driver loaded again?"
            return
        self._times.append(now)
        self._readings.append(readings)

    def window(self, begin: float, end: float) -> Window:
        """Return the energy between two moments in seconds since the Unix epoch.

        Raises:
            CannotMeasure: the counter failed, the window is shorter than LEAST_WINDOW_S, or was not watched.

        """
        if self._failure:
            raise CannotMeasure(self._failure)
        if end - begin < LEAST_WINDOW_S:
            raise CannotMeasure(f"a window of {end - begin:.2f} s is shorter than {LEAST_WINDOW_S:g} s")
        if not self._times or begin < self._times[0] or end > self._times[-1] + 2 * self.period_s:
            raise CannotMeasure("the energy counter was not read during the whole window")
        first, last = self._at(begin), self._at(end)
        return Window([after - before for before, after in zip(first, last, strict=True)], end - begin)

    def _at(self, moment: float) -> list[float]:
        after = bisect_right(self._times, moment)
        if after == len(self._times):
            return self._readings[-1]
        share = (moment - self._times[after - 1]) / (self._times[after] - self._times[after - 1])
        pairs = zip(self._readings[after - 1], self._readings[after], strict=True)
        return [old + share * (new - old) for old, new in pairs]

    def resolution_s(self) -> float | None:
        """Return the usual time between two changes of the counter, not finer than ``period_s``; None if unknown."""
        moves = [
            now
            for now, old, new in zip(self._times[1:], self._readings, self._readings[1:], strict=False)
            if old != new
        ]
        gaps = [after - before for before, after in pairwise(moves)]
        return median(gaps) if len(gaps) > 2 else None
