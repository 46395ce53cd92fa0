"""Weighted k-means against exhaustive search and exact dynamic programming."""

import itertools

import pytest
import torch

from quant_methods.methods.kmeans import kmeans, nearest


def loss(values: torch.Tensor, weights: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return each row's weighted squared error, by trying every centre."""
    return ((values[:, :, None] - centres[:, None, :]).square().amin(-1) * weights).sum(1)


def exact(values: torch.Tensor, weights: torch.Tensor, clusters: int) -> float:
    """Return the least error of one row, over every way to cut its sorted numbers."""
    order = values.argsort()
    values, weights = values[order].double(), weights[order].double()
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(values)), clusters - 1):
        total = 0.0
        for start, stop in itertools.pairwise((0, *cuts, len(values))):
            v, w = values[start:stop], weights[start:stop]
            total += ((v - (v * w).sum() / w.sum()).square() * w).sum().item()
        best = min(best, total)
    return best


def test_few_numbers_are_clustered_as_exhaustive_search_would() -> None:
    torch.manual_seed(0)
    values, weights = torch.randn(6, 11), torch.rand(6, 11) ** 3
    found = loss(values, weights, kmeans(values, weights, 4))
    for row in range(6):
        assert found[row].item() == pytest.approx(exact(values[row], weights[row], 4), rel=1e-4)


def dynamic_programming(values: torch.Tensor, weights: torch.Tensor, clusters: int) -> float:
    """Return the least error of one row, cost n^2."""
    order = values.argsort()
    v, w = values[order].double(), weights[order].double()
    pad = torch.zeros(1, dtype=torch.float64)
    s0, s1, s2 = (torch.cat([pad, x.cumsum(0)]) for x in (w, w * v, w * v * v))
    cost = (s2[None] - s2[:, None]) - (s1[None] - s1[:, None]).square() / (s0[None] - s0[:, None]).clamp(min=1e-30)
    cost = cost.masked_fill(torch.ones_like(cost).tril(-1).bool(), torch.inf)
    least = cost[0]
    for _ in range(1, clusters):
        least = (least[:, None] + cost).amin(0)
    return least[-1].item()


@pytest.mark.parametrize("clusters", [8, 16])
@pytest.mark.parametrize("tails", [False, True])
def test_many_numbers_come_within_a_percent_of_the_optimum(clusters: int, tails: bool) -> None:
    torch.manual_seed(1)
    values = torch.randn(5, 1000)
    if tails:
        values[:, ::50] *= 6
    weights = torch.exp(torch.randn(1000)).expand(5, 1000)
    found = loss(values.double(), weights.double(), kmeans(values, weights, clusters).double())
    for row in range(5):
        best = dynamic_programming(values[row], weights[row], clusters)
        assert best * (1 - 1e-6) <= found[row].item() <= 1.01 * best


def test_numbers_without_weight_do_not_move_centres() -> None:
    values = torch.tensor([[0.0, 1.0, 5.0, 50.0, 60.0]])
    weights = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])
    centres = kmeans(values, weights, 4)
    assert torch.allclose(centres[0, :3], torch.tensor([0.0, 1.0, 5.0]), atol=1e-5)


def test_fewer_numbers_than_clusters_are_all_hit() -> None:
    values = torch.tensor([[3.0, -1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    centres = kmeans(values, torch.ones_like(values), 8)
    assert torch.isfinite(centres).all()
    assert torch.allclose(centres.gather(1, nearest(values, centres)), values)
    assert (centres.diff(dim=1) >= 0).all()
