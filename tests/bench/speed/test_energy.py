"""Energy with counters and clocks that are made up: what they must not do is to say zero, or too much."""

import os
import sys
import time
from types import SimpleNamespace

import pytest

from bench.speed.energy import CannotMeasure, Meter, NvmlCounter, RaplCounter, find_counter


class NVMLError(Exception):
    pass


class FakeNvml:
    """Two boards of 100 and 300 W that count millijoules in steps of 0.1 s, on a clock of its own."""

    NVMLError = NVMLError

    def __init__(self, clock, watts=(100, 300), mig=(), broken=""):
        self.clock, self.watts, self.mig, self.broken = clock, watts, mig, broken

    def nvmlInit(self):
        if self.broken == "driver":
            raise NVMLError("Driver Not Loaded")

    def nvmlSystemGetDriverVersion(self):
        return "580.1"

    def nvmlDeviceGetHandleByIndex(self, index):
        if index >= len(self.watts):
            raise NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetName(self, handle):
        return f"board {handle}".encode()

    def nvmlDeviceGetMigMode(self, handle):
        if not self.mig:
            raise NVMLError("Not Supported")
        return self.mig

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.broken == "counter":
            raise NVMLError("Not Supported")
        return int(5_000_000 + self.watts[handle] * 1000 * (int(self.clock[0] * 10 + 1e-6) / 10))


@pytest.fixture
def clock():
    return [1000.0]


def metered(counter, clock, seconds, step=0.02):
    meter = Meter(counter, clock=lambda: clock[0])
    for _ in range(round(seconds / step) + 1):
        meter.sample()
        clock[0] += step
    return meter


def test_several_boards_are_told_apart_and_added_up(clock):
    counter = NvmlCounter(2, FakeNvml(clock), {})
    meter = metered(counter, clock, 5)
    window = meter.window(1001.03, 1004.03)
    assert counter.devices == ("board 0", "board 1")
    assert counter.name.endswith("driver 580.1")
    assert window.seconds == pytest.approx(3)
    # One step at each end is what the counter leaves open.
    assert window.joules == pytest.approx([300, 900], abs=0.2 * 300)
    assert window.total == pytest.approx(1200, abs=0.2 * 400)
    assert meter.resolution_s() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("variable", "count", "devices"),
    [
        (None, 1, ("board 0",)),
        ("1", 1, ("board 1",)),
        ("1, GPU-0", 2, ("board 1", "board 0")),
        ("1,0", 1, ("board 1",)),
    ],
)
def test_the_boards_are_those_that_cuda_uses(clock, variable, count, devices):
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    assert NvmlCounter(count, FakeNvml(clock), environment).devices == devices


@pytest.mark.parametrize(
    ("nvml", "environment", "reason"),
    [
        ({"broken": "driver"}, {}, "Driver Not Loaded"),
        ({"broken": "counter"}, {}, "Volta and later"),
        ({"mig": (1, 1)}, {}, "MIG divides"),
        ({}, {"CUDA_VISIBLE_DEVICES": "MIG-1"}, "part of a GPU"),
        ({}, {"CUDA_VISIBLE_DEVICES": ""}, "does not name 1 GPU"),
        ({}, {"CUDA_VISIBLE_DEVICES": "7"}, "Invalid Argument"),
    ],
)
def test_what_nvml_cannot_tell_has_a_reason(clock, nvml, environment, reason):
    with pytest.raises(CannotMeasure, match=reason):
        NvmlCounter(1, FakeNvml(clock, **nvml), environment)


def test_a_board_that_fails_on_the_way_has_no_energy_rather_than_a_part_of_it(clock):
    nvml = FakeNvml(clock)
    meter = metered(NvmlCounter(1, nvml, {}), clock, 3)
    nvml.broken = "counter"
    meter.sample()
    with pytest.raises(CannotMeasure, match="cannot be read"):
        meter.window(1000.5, 1002)


def test_windows_that_are_short_or_not_watched_are_refused(clock):
    meter = metered(NvmlCounter(1, FakeNvml(clock), {}), clock, 4)
    with pytest.raises(CannotMeasure, match=r"0.50 s is shorter than 1 s"):
        meter.window(1001, 1001.5)
    for begin, end in ((999, 1002), (1002, 1009)):
        with pytest.raises(CannotMeasure, match="not read during"):
            meter.window(begin, end)
    with pytest.raises(CannotMeasure, match="not read during"):
        Meter(meter.counter).window(0, 5)


def test_a_counter_that_falls_is_an_error(clock):
    falling = SimpleNamespace(name="", devices=("a",), read=lambda: [2000 - clock[0]])
    with pytest.raises(CannotMeasure, match="backwards"):
        metered(falling, clock, 3).window(1001, 1002.5)


def test_a_clock_that_is_set_back_drops_readings_only(clock):
    meter = metered(NvmlCounter(1, FakeNvml(clock), {}), clock, 4)
    clock[0] = 1000.0
    meter.sample()
    assert meter.window(1001, 1003).total == pytest.approx(200, abs=20)


def zone(root, name, kind, energy=0, most=65_532_610_987):
    (root / name).mkdir(parents=True)
    (root / name / "name").write_text(kind + "\n")
    (root / name / "energy_uj").write_text(f"{energy}\n")
    (root / name / "max_energy_range_uj").write_text(f"{most}\n")


@pytest.fixture
def powercap(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 900_000_000, most=1_000_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core")
    zone(tmp_path, "intel-rapl:0:1", "dram", 5)
    zone(tmp_path, "intel-rapl:1", "package-1")
    zone(tmp_path, "intel-rapl:2", "psys")
    zone(tmp_path, "intel-rapl-mmio:0", "package-0")
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def test_rapl_counts_packages_and_memory_once_and_goes_on_after_it_wraps(powercap):
    counter = RaplCounter(powercap)
    assert counter.devices == ("package-0 (intel-rapl:0)", "dram (intel-rapl:0:1)", "package-1 (intel-rapl:1)")
    assert counter.read() == [0, 0, 0]
    # 150 J on a counter that holds 1000: 100 to its end and 50 from 0 on.
    (powercap / "intel-rapl:0" / "energy_uj").write_text("50000000")
    (powercap / "intel-rapl:0:1" / "energy_uj").write_text("2000005")
    assert counter.read() == pytest.approx([150, 2, 0])
    (powercap / "intel-rapl:0" / "energy_uj").write_text("60000000")
    assert counter.read() == pytest.approx([160, 2, 0])


def test_a_machine_without_rapl_says_so(tmp_path):
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(CannotMeasure, match="shows no energy counter"):
            RaplCounter(root)


def test_rapl_that_only_root_may_read_says_how_to_allow_it(powercap, monkeypatch):
    from pathlib import Path

    read = Path.read_text

    def refused(self, *args, **kwargs):
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(CannotMeasure, match=r"only root may read .*energy_uj; .* chmod a\+r"):
        RaplCounter(powercap)


def test_without_the_bindings_the_reason_is_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(CannotMeasure, match=r"vllm-pareto\[energy\]"):
        find_counter(1)


def test_the_meter_reads_by_itself(powercap):
    counter = RaplCounter(powercap)
    with Meter(counter, period_s=0.005) as meter:
        begin = time.time() + 0.02
        time.sleep(0.05)
        # As the kernel does: never half a number.
        (powercap / "new").write_text("2000000")
        os.replace(powercap / "new", powercap / "intel-rapl:1" / "energy_uj")
        time.sleep(1.05)
        window = meter.window(begin, begin + 1.02)
    assert window.total == pytest.approx(2, abs=0.01)


def test_the_bindings_have_what_is_asked_of_them():
    pynvml = pytest.importorskip("pynvml")
    for name in vars(FakeNvml):
        if name.startswith(("nvml", "NVML")):
            assert hasattr(pynvml, name), name
