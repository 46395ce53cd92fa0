"""Statistics of every room: estimates with their errors, comparisons, runs with seeds, calibration of probabilities."""

from bench.statistics.calibration import Calibration, brier, calibrated, expected_calibration_error
from bench.statistics.comparison import MARGIN, Paired, holm, non_inferior, paired
from bench.statistics.estimates import exp_estimate, mean_estimate, proportion
from bench.statistics.runs import Variance, between_and_within

__all__ = [
    "MARGIN",
    "Calibration",
    "Paired",
    "Variance",
    "between_and_within",
    "brier",
    "calibrated",
    "exp_estimate",
    "expected_calibration_error",
    "holm",
    "mean_estimate",
    "non_inferior",
    "paired",
    "proportion",
]
