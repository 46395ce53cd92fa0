"""What a training's settings become for transformers' Trainer."""

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.distillation.settings import Settings
from quant_methods.training.arguments import process_share


@pytest.fixture
def processes(monkeypatch):
    """Let so many processes be there."""

    def there(number):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: number)

    return there


@pytest.mark.parametrize(
    ("number", "batch", "micro_batch", "share"),
    [(1, 8, 2, (2, 4)), (2, 8, 2, (2, 2)), (4, 8, 4, (2, 1)), (3, 24, 6, (4, 2)), (8, 8, 8, (1, 1))],
)
def test_processes_share_the_sequences_of_a_step(processes, number, batch, micro_batch, share):
    processes(number)
    assert process_share(Settings(batch=batch, micro_batch=micro_batch)) == share
    assert share[0] * share[1] * number == batch


def test_a_batch_that_cannot_be_shared_is_refused(processes):
    processes(3)
    with pytest.raises(ParetoError, match="--batch 8 is shared by 3 processes; give a multiple of 3"):
        process_share(Settings(batch=8, micro_batch=2))


def test_alone_a_process_does_the_whole_batch():
    assert process_share(Settings(batch=8, micro_batch=4)) == (4, 2)
