"""What all tests of CUDA kernels share."""

import pytest


@pytest.fixture(autouse=True)
def compiled_kernels_of_these_tests(tmp_path_factory, monkeypatch):
    """Kernels that tests compile are not kept in the user's cache folder."""
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path_factory.getbasetemp() / "pareto-cache"))
