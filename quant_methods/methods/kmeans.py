"""Weighted k-means of many rows of numbers at once, near the exact optimum.

In one dimension the clusters of the best k-means are runs of the sorted numbers, which dynamic programming finds
exactly (Wang, Song: "Ckmeans.1d.dp", The R Journal 3(2), 2011) at a cost of n^2. Here the sorted numbers of a row are
first cut into at most BINS runs, evenly in the measure in which an optimal quantizer's points are spread (density to
the power 1/3: Panter, Dite, "Quantization distortion in pulse-count modulation with nonuniform spacing of levels",
1951); dynamic programming is exact over the runs; then Lloyd's iterations move the borders to single numbers. Prefix
sums make an iteration cost k log n a row. With n up to BINS the start is the optimum itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_methods.threads import few_threads

BINS = 128
LLOYD_STEPS = 100
# Elements of the largest intermediate, rows x BINS x BINS: what a CPU's cache holds; a GPU wants more at once.
ELEMENTS, ELEMENTS_GPU = 1 << 18, 1 << 24


def kmeans(values: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """Return the centres that leave the least ``sum_j weights_j (values_j - nearest centre)^2`` in every row.

    Args:
        values: [rows, n] floating point.
        weights: [rows, n], not negative.
        clusters: k.

    Returns:
        Centres [rows, k], rising, in ``values``' dtype.

    """
    step = max(1, (ELEMENTS_GPU if values.is_cuda else ELEMENTS) // (BINS + 1) ** 2)
    chunks = zip(values.split(step), weights.split(step), strict=True)
    with few_threads(step):
        return torch.cat([_Rows(v, w).solve(clusters) for v, w in chunks]).to(values.dtype)


class _Rows:
    """Sorted rows and their prefix sums, float64."""

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        self.sorted, order = values.double().sort(dim=1)
        weights = weights.double().gather(1, order)
        # Numbers of no weight still get a centre nearby, after all others.
        mean = weights.mean(1, keepdim=True)
        weights = torch.where(mean > 0, weights / mean, torch.ones_like(weights)).clamp(min=1e-9)
        self.weights = weights
        # About each row's middle, so that squares lose few digits.
        self.middle = self.sorted.mean(1, keepdim=True)
        centred = self.sorted - self.middle
        self.sums = [_prefix(weights), _prefix(weights * centred), _prefix(weights * centred.square())]

    def solve(self, clusters: int) -> Tensor:
        """Return the centres [rows, clusters]."""
        edges = self._bins()
        starts = edges.gather(1, self._divide(edges, clusters))
        centres = self._centres(starts)
        for _ in range(LLOYD_STEPS):
            moved = torch.searchsorted(self.sorted, (centres[:, 1:] + centres[:, :-1]) / 2)
            moved = torch.cat([starts[:, :1], moved, starts[:, -1:]], 1)
            if torch.equal(moved, starts):
                break
            starts = moved
            centres = self._centres(starts)
        return centres

    def _bins(self) -> Tensor:
        """Return where runs begin and the last one ends, int64 [rows, BINS + 1] (or n + 1)."""
        rows, n = self.sorted.shape
        if n <= BINS:
            return torch.arange(n + 1, device=self.sorted.device).expand(rows, n + 1).contiguous()
        gaps = self.sorted.diff(dim=1)
        measure = ((self.weights[:, 1:] + self.weights[:, :-1]) / 2).pow(1 / 3) * gaps.pow(2 / 3)
        measure = measure.cumsum(1)
        parts = torch.arange(1, BINS, device=gaps.device, dtype=torch.float64) / BINS
        inner = torch.searchsorted(measure, measure[:, -1:] * parts) + 1
        ends = inner.new_tensor([0, n]).expand(rows, 2)
        return torch.cat([ends[:, :1], inner.clamp(max=n), ends[:, 1:]], 1)

    def _divide(self, edges: Tensor, clusters: int) -> Tensor:
        """Return which edges begin the best clusters and end the last one, int64 [rows, clusters + 1]."""
        zeroth, first, second = (prefix.gather(1, edges) for prefix in self.sums)
        weight = zeroth[:, :, None] - zeroth[:, None, :]  # [rows, to, from]
        cost = (second[:, :, None] - second[:, None, :]) - (first[:, :, None] - first[:, None, :]).square() / weight
        bins = edges.shape[1]
        backwards = torch.ones(bins, bins, dtype=torch.bool, device=edges.device).triu(1)
        cost = torch.where(weight > 0, cost, 0).float().masked_fill_(backwards, torch.inf)
        least = [cost[:, :, 0]]
        sums = torch.empty_like(cost)
        for _ in range(1, clusters):
            torch.add(cost, least[-1][:, None, :], out=sums)
            least.append(sums.amin(2))
        end = edges.new_full((len(edges), 1), bins - 1)
        found = [end]
        rows = torch.arange(len(edges), device=edges.device)
        for before in least[-2::-1]:
            end = (before + cost[rows, end[:, 0]]).argmin(1, keepdim=True)
            found.append(end)
        found.append(torch.zeros_like(end))
        return torch.cat(found[::-1], 1)

    def _centres(self, starts: Tensor) -> Tensor:
        """Return the clusters' means [rows, clusters]; an empty cluster sits on the number where it would begin."""
        zeroth, first = (prefix.gather(1, starts).diff(dim=1) for prefix in self.sums[:2])
        here = self.sorted.gather(1, starts[:, :-1].clamp(max=self.sorted.shape[1] - 1))
        means = torch.where(zeroth > 0, first / zeroth + self.middle, here)
        return means.cummax(1).values  # Rounding must not put neighbours out of order.


def _prefix(values: Tensor) -> Tensor:
    """Return sums before each element and of all, [rows, n + 1]."""
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def nearest(values: Tensor, centres: Tensor) -> Tensor:
    """Return the index of the nearest centre, int64 in the shape of ``values``.

    Args:
        values: [rows, n].
        centres: [rows, k], rising.

    """
    return torch.searchsorted((centres[:, 1:] + centres[:, :-1]) / 2, values)
