"""The energy of the server's GPUs during a stage, by what NVIDIA's dcgm-exporter counted."""

from __future__ import annotations

from collections.abc import Mapping

from loadtest.results.schema import Energy, MetricSeries

COUNTER, POWER = "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "DCGM_FI_DEV_POWER_USAGE"
GPU_METRICS = (COUNTER, POWER, "DCGM_FI_DEV_GPU_UTIL")
"""Energy in millijoules since the driver was loaded, power in watts, percent of the time in which a kernel ran."""


def energy_of(series: Mapping[str, MetricSeries], output_tokens: int | None) -> tuple[Energy | None, list[str]]:
    """Return the energy of a stage, and notes.

    Args:
        series: all that was sampled from the begin of the stage to its end, labels merged.
        output_tokens: of the stage; None where not all were counted.

    Returns:
        None where no GPU was watched or its counter did not move forward.

    """
    counter, power = series.get(COUNTER), series.get(POWER)
    if counter is None:
        return None, []
    if counter.delta <= 0:
        return None, [
            "the GPUs' energy counter did not move forward; dcgm-exporter reads it every 30 s unless it is told "
            "otherwise (--collect-interval 1000)"
        ]
    joules = counter.delta / 1000
    return Energy(joules, power.mean if power else None, joules / output_tokens if output_tokens else None), []
