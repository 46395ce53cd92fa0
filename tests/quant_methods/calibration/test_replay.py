"""Outputs that are kept are those that would be computed anew, and are computed once."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quant_methods.calibration import calibrator, kv_observer, replay
from quant_methods.calibration.replay import Replay
from quant_methods.compress import compress
from quant_methods.methods.awq import AWQ
from quant_methods.methods.gptq import GPTQ
from quant_methods.recipe import Calibration, Recipe

W4 = GPTQ(bits=4, group_size=32, symmetric=False)


def recipe(*steps: Any) -> Recipe:
    return Recipe("test", steps=steps, calibration=Calibration(num_samples=6, length=32, seed=3), kv_scales=False)


@pytest.mark.parametrize(
    ("steps", "attentions"),
    [
        # Of each of three blocks, once to find its stages. Of each of three batches, once in the original and once in
        # the block that is solved, of the first once more when the output's layer is solved, to see what becomes of
        # its output; anew, once for each later stage of either, and to go on to the next block.
        ((W4,), (3 * (1 + 3 * (1 + 1) + 1), 3 * (1 + 3 * (3 + 3)) + 2 * 3 * 2)),
        ((dataclasses.replace(W4, upstream=False),), (3 * (1 + 3 + 1), 3 * (1 + 3 * 3) + 2 * 3)),
        ((AWQ(), W4), None),
    ],
    ids=["gptq", "not upstream", "awq"],
)
def test_a_kept_output_is_what_would_be_computed(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: Any, attentions: Any
) -> None:
    monkeypatch.setattr(calibrator, "TOKENS_PER_BATCH_CPU", 64)  # three batches
    count = 0
    attend = kv_observer.sdpa_attention_forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return attend(*args, **kwargs)

    monkeypatch.setattr(kv_observer, "sdpa_attention_forward", counted)
    written = {}
    for name, most in (("kept", replay.MOST_BYTES), ("anew", 0)):
        monkeypatch.setattr(replay, "MOST_BYTES", most)
        count = 0
        compress(tiny_model, recipe(*steps), tmp_path / name, text=text_file, device="cpu")
        written[name] = load_file(tmp_path / name / "model.safetensors"), count
    (kept, few), (anew, many) = written["kept"], written["anew"]
    assert kept.keys() == anew.keys()
    assert all(torch.equal(kept[name], anew[name]) for name in kept)
    assert few < many
    assert attentions in (None, (few, many))


class Block(nn.Module):
    """Two parts; what the first puts out is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.second = nn.Sequential(nn.Linear(4, 4))
        self.runs = 0
        self.first[1].register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.runs += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).mul_(2)) + x


FIRST = {"first.0", "first.2"}


@torch.no_grad()
@pytest.mark.parametrize("more", [False, True], ids=["ends with its layer", "changes its layer's output"])
def test_a_parts_last_layer_runs_on_what_it_was_fed(more: bool) -> None:
    block, batches = Block(), torch.randn(3, 5, 4).unbind()
    if more:
        block.first.append(nn.ReLU())
    kept = Replay(block, constant=False, joining={"first.2"})
    with kept.passing({"first.0"}):
        for batch in batches:
            kept.feed("first", "first.2", block.first[:2](batch))
    block.first[2].weight.mul_(1.5)  # solved
    wanted = [(block(batch), block.first[:3](batch)) for batch in batches]
    block.runs = 0
    joined: list[Tensor] = []
    with kept.passing(FIRST, lambda name, output: joined.append(output.clone()), last=True):
        for batch, (output, _) in zip(batches, wanted, strict=True):
            assert torch.equal(block(batch), output)
    assert block.runs == (3 if more else 1), "the first batch shows what becomes of the layer's output"
    assert all(torch.equal(found, output) for found, (_, output) in zip(joined, wanted, strict=True))
    assert kept._bytes == 0, "nothing is kept when no other pass comes"


@torch.no_grad()
@pytest.mark.parametrize("constant", [False, True])
def test_only_what_is_solved_is_kept_and_nobody_writes_to_it(constant: bool) -> None:
    block, batches = Block(), torch.randn(3, 5, 4).unbind()
    kept = Replay(block, constant=constant, joining={"first.2"})
    assert kept.part_of("first.2") == "first"
    wanted = [(block(batch), block.first(batch)) for batch in batches]
    for solved, runs in ((set(), 3), (FIRST, 0 if constant else 3), (FIRST, 0), ({"first.0"}, 3), (FIRST, 0)):
        joined: list[Tensor] = []
        block.runs = 0
        with kept.passing(solved, lambda name, output, joined=joined: joined.append(output.clone())):
            for batch, (output, _) in zip(batches, wanted, strict=True):
                assert torch.equal(block(batch), output)
        assert block.runs == runs
        assert all(torch.equal(found, first) for found, (_, first) in zip(joined, wanted, strict=True))
    assert "forward" not in vars(block.first)


@torch.no_grad()
def test_more_than_there_is_room_for_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_BYTES", 100)  # one output of 80 bytes
    block = Block()
    kept = Replay(block, constant=False)
    for _ in range(2):
        with kept.passing(FIRST):
            block(torch.randn(5, 4)), block(torch.randn(5, 4))
    assert block.runs == 2 + 1
