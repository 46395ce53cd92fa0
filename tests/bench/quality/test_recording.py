import numpy as np
import pytest
import torch

from bench.quality.recording import Block, LogitFile, Recording, add, divergence

VOCABULARY = 50


def chunks(recording, logits, sizes):
    start = 0
    for size in sizes:
        count = min(size, recording.rows - start)
        if count > 0:
            add([Block(recording, start, count, size)], logits[start : start + count])
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
    add([Block(recording, 0, 16, 16)], logits[:16])
    add([Block(recording, 20, 19, 20)], logits[20:39])
    with pytest.raises(RuntimeError, match="4 of 39 positions never came by, the first is 16"):
        recording.finish()


def test_an_infinite_divergence_is_no_figure(tmp_path):
    """It once reached eval.json, which JSON cannot hold, and ended the run."""
    logits = torch.zeros(3, 8)
    stored = Recording([1, 2, 3, 4], str(tmp_path / "logits"))
    add([Block(stored, 0, 3, 3)], logits)
    stored.finish()
    compared = Recording([1, 2, 3, 4], None, (str(tmp_path / "logits"), "float32"))
    logits[1, 7] = -torch.inf
    add([Block(compared, 0, 3, 3)], logits)
    with pytest.raises(RuntimeError, match="1 of 3 positions have an infinite loss or divergence, the first is 1"):
        compared.finish()


def test_an_undefined_logit_is_another_error():
    tokens, logits = window()
    recording = Recording(tokens)
    logits[7, 3] = torch.nan
    chunks(recording, logits, [40])
    with pytest.raises(RuntimeError, match=r"1 of 39 positions have undefined logits \(NaN\), the first is 7"):
        recording.finish()


def test_another_vocabulary_is_an_error(tmp_path):
    tokens, logits = window()
    first = Recording(tokens, store=str(tmp_path / "l.bin"))
    chunks(first, logits, [40])
    first.finish()
    other = Recording(tokens, compare=(str(tmp_path / "l.bin"), "bfloat16"))
    with pytest.raises(ValueError, match="vocabulary differs"):
        add([Block(other, 0, 39, 40)], logits[:39, :-1])


def test_windows_that_share_steps_have_the_figures_of_windows_alone(tmp_path):
    """One is stored, one compared with the baseline, one ends early: rows must go where they belong."""
    texts = [window(40, seed=seed) for seed in range(3)]
    path = str(tmp_path / "l.bin")
    base = Recording(texts[1][0], store=path)
    chunks(base, texts[1][1], [40])
    base.finish()
    noisy = texts[1][1] + torch.randn_like(texts[1][1])
    logits = [texts[0][1], noisy, texts[2][1][:20]]

    def recordings(folder):
        folder.mkdir()
        return [
            Recording(texts[0][0], store=str(folder / "s.bin")),
            Recording(texts[1][0], compare=(path, "bfloat16")),
            Recording(texts[2][0][:20]),
        ]

    alone, together = recordings(tmp_path / "alone"), recordings(tmp_path / "together")
    for recording, rows in zip(alone, logits, strict=True):
        chunks(recording, rows, [3] * 13)
    for start in range(0, 39, 3):
        blocks = [Block(r, start, min(3, r.rows - start), 3) for r in together if r.rows > start]
        rows = [x[start : start + b.count] for x, b in zip(logits, blocks, strict=False)]
        add(blocks, torch.cat(rows))
    for one, other in zip(alone, together, strict=True):
        assert one.finish() == other.finish()
    assert (tmp_path / "alone/s.bin").read_bytes() == (tmp_path / "together/s.bin").read_bytes()
