import numpy as np
import pytest
import torch

from bench.recording import LogitFile, Recording, divergence

VOCABULARY = 50


def chunks(recording, logits, sizes):
    start = 0
    for size in sizes:
        count = min(size, recording.rows - start)
        if count > 0:
            recording.add(start, size, logits[start : start + count])
        start += size


def window(n=40, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()
    return tokens, (3 * torch.randn(n, VOCABULARY, generator=generator)).to(dtype)


@pytest.mark.parametrize("sizes", [[40], [16, 16, 8], [39, 1], [1] * 40])
def test_figures_do_not_depend_on_the_chunks(sizes):
    tokens, logits = window()
    recording = Recording(tokens)
    chunks(recording, logits, sizes)
    result = recording.finish()
    expected = torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(tokens[1:]), reduction="none")
    np.testing.assert_allclose(result["nll"], expected.numpy(), rtol=1e-5)
    assert result["max_chunk"] == max(size for size in sizes[: len(result["nll"])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_logits_come_back_exactly(tmp_path, dtype):
    tokens, logits = window(dtype=dtype)
    recording = Recording(tokens, store=str(tmp_path / "l.bin"))
    chunks(recording, logits, [16, 16, 8])
    result = recording.finish()
    assert (result["vocabulary"], result["dtype"]) == (VOCABULARY, str(dtype).removeprefix("torch."))
    back = LogitFile(tmp_path / "l.bin", 39, VOCABULARY, dtype, "r").read(7, 20, torch.device("cpu"))
    assert torch.equal(back, logits[7:27].float())


def test_comparison_with_itself_and_with_another(tmp_path):
    tokens, logits = window()
    path = tmp_path / "l.bin"
    first = Recording(tokens, store=str(path))
    chunks(first, logits, [16, 16, 8])
    first.finish()

    same = Recording(tokens, compare=(str(path), "bfloat16"))
    chunks(same, logits, [7] * 6)
    figures = same.finish()
    assert max(map(abs, figures["kl"])) < 1e-6
    assert all(figures["top1"])

    damaged = Recording(tokens, compare=(str(path), "bfloat16"))
    chunks(damaged, logits + torch.randn_like(logits), [16, 16, 8])
    figures = damaged.finish()
    assert min(figures["kl"]) > 0
    assert 0 < sum(figures["top1"]) < 39


def test_divergence_has_the_right_direction_and_unit():
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    kl, top1 = divergence(p.log(), q.log())
    assert kl.item() == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-5)
    assert top1.item() is True
    assert divergence(q.log(), p.log())[0].item() == pytest.approx(0.5 * np.log(2 / 3) + 0.5 * np.log(2), rel=1e-5)


def test_tokens_that_the_baseline_excludes_count_nothing():
    baseline = torch.tensor([[0.0, 0.0, -torch.inf]])
    kl, _ = divergence(baseline, torch.tensor([[0.0, 0.0, -torch.inf]]))
    assert kl.item() == 0
    assert divergence(baseline, torch.tensor([[0.0, 0.0, 0.0]]))[0].item() == pytest.approx(np.log(1.5), rel=1e-5)


def test_a_missing_position_is_an_error():
    tokens, logits = window()
    recording = Recording(tokens)
    recording.add(0, 16, logits[:16])
    recording.add(20, 20, logits[20:39])
    with pytest.raises(RuntimeError, match="4 of 39 positions have no likelihood, the first is 16"):
        recording.finish()


def test_another_vocabulary_is_an_error(tmp_path):
    tokens, logits = window()
    first = Recording(tokens, store=str(tmp_path / "l.bin"))
    chunks(first, logits, [40])
    first.finish()
    other = Recording(tokens, compare=(str(tmp_path / "l.bin"), "bfloat16"))
    with pytest.raises(ValueError, match="vocabulary differs"):
        other.add(0, 40, logits[:39, :-1])
