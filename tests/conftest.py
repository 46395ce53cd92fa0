"""What tests of several rooms share."""

import random

import pytest


@pytest.fixture
def fresh_numbers():
    """Other random numbers in each run; pytest prints the seed if a test fails."""
    import torch

    value = random.SystemRandom().randrange(2**31)
    random.seed(value)
    torch.manual_seed(value)
    print(f"seed {value}")
