"""The prototypes that multiply by a bitmap on a CPU are the product that they are timed as."""

import pytest
import torch

from bench.lab import bitmap_on_cpu
from kv_cache.errors import ParetoError


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 1.0])
def test_a_prototype_is_the_product(rounds: bool, zeros: float) -> None:
    try:
        library = bitmap_on_cpu.compiled()
    except ParetoError as error:
        pytest.skip(str(error))
    grid = bitmap_on_cpu.matrix(64, 384, zeros)
    one = bitmap_on_cpu.Prototype(library, grid, rounds)
    x = torch.randn(1, 384).bfloat16()
    wanted = (x.double() @ grid.read().double().T)[0]
    assert (one.apply(x).double() - wanted).norm() <= (0.03 if rounds else 1e-5) * wanted.norm() + (zeros == 1.0) * 1e-3
    assert one.stored() * 8 / grid.codes.numel() == pytest.approx(1 + 4 * (1 - zeros) + 16 / 128, abs=0.15)


def test_sizes_that_the_prototypes_have_not_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bitmap_on_cpu.main(["--columns", "100"]) == 2
    assert "expected rows in 32s and columns in groups of 128" in capsys.readouterr().err
