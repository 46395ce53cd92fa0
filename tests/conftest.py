"""What tests of several rooms share."""

import gc
import random

import pytest


def pytest_collection_finish():
    """Let collections of garbage pass over what importing everything left: hundreds of thousands of objects that stay.

    vLLM, statsmodels and others collect when they are called, which otherwise takes most of the time of a small test.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def fresh_numbers():
    """Other random numbers in each run; pytest prints the seed if a test fails."""
    import torch

    value = random.SystemRandom().randrange(2**31)
    random.seed(value)
    torch.manual_seed(value)
    print(f"seed {value}")
