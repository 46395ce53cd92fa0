"""What a training's settings become for transformers' Trainer."""

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.distillation.settings import Settings
from quant_methods.training.arguments import on_one_device, process_share, shared_arguments


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


def test_a_process_that_sees_several_gpus_uses_its_own_alone(tmp_path):
    """transformers would share each part of a batch among them, which neither trl nor a model in codes stands."""
    from transformers import TrainingArguments

    arguments = TrainingArguments(**shared_arguments(Settings(), tmp_path, steps=2, look=1, device="cpu"))
    arguments._n_gpu = 2
    assert on_one_device(arguments).n_gpu == 1
    assert arguments.train_batch_size == Settings().micro_batch
