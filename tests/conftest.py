"""What tests of several rooms share."""

import gc
import random

import pytest


@pytest.fixture(scope="module", autouse=True)
def what_stays_is_no_garbage():
    """Let collections of garbage pass over what is there before a module: hundreds of thousands of objects of imports.

    vLLM and statsmodels collect whenever they are called, which otherwise takes most of the time of a small test.
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
