import math

import pytest
import torch

from kv_cache.errors import ParetoError
from quant_methods.training import losses


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(7, 50, generator=generator, dtype=torch.float64) for _ in range(2)]


def by_hand(name, p, q, alpha):
    """The papers' sums, outcome by outcome, in Python's floats."""
    if name == "jsd":
        middle = alpha * p + (1 - alpha) * q
        halves = by_hand("forward", p, middle, alpha), by_hand("forward", q, middle, alpha)
        return [alpha * a + (1 - alpha) * b for a, b in zip(*halves, strict=True)]
    mixes = {
        "forward": q,
        "reverse": p,
        "skew": alpha * p + (1 - alpha) * q,
        "skew-reverse": alpha * q + (1 - alpha) * p,
    }
    first, second = (q if "reverse" in name else p), mixes[name]
    return [
        math.fsum(a * math.log(a / b) for a, b in zip(*rows, strict=True))
        for rows in zip(first.tolist(), second.tolist(), strict=True)
    ]


@pytest.mark.parametrize("name", losses.DIVERGENCES)
@pytest.mark.parametrize("alpha", [0.1, 0.6])
def test_divergences_are_the_papers(pair, name, alpha):
    p, q = (x.softmax(-1) for x in pair)
    found = losses.divergence(name, alpha)(p.log(), q.log())
    torch.testing.assert_close(found, torch.tensor(by_hand(name, p, q, alpha), dtype=torch.float64))
    # Float32 is what training has.
    logits = [x.float().log_softmax(-1) for x in pair]
    torch.testing.assert_close(losses.divergence(name, alpha)(*logits).double(), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", losses.DIVERGENCES)
def test_a_divergence_is_zero_only_where_both_agree(pair, name):
    p, q = (x.log_softmax(-1) for x in pair)
    measure = losses.divergence(name)
    torch.testing.assert_close(measure(p, p), torch.zeros(7, dtype=torch.float64))
    assert (measure(p, q) > 0).all()


@pytest.mark.parametrize("k", [1, 5, 49, 50])
@pytest.mark.parametrize("name", losses.DIVERGENCES)
def test_buckets_keep_all_mass_and_bound_the_divergence_from_below(pair, name, k):
    p, q = (x.log_softmax(-1) for x in pair)
    ids = p.topk(k).indices
    merged = [losses.buckets(x, ids) for x in (p, q)]
    for x in merged:
        torch.testing.assert_close(x.exp().sum(-1), torch.ones(7, dtype=torch.float64))
    whole, bound = (losses.divergence(name)(*both) for both in ((p, q), merged))
    assert (bound <= whole + 1e-12).all()
    if k >= 49:
        torch.testing.assert_close(bound, whole)


def test_a_rest_that_rounding_would_lose_is_kept():
    logits = torch.tensor([[40.0, 0.0, -1.0]])
    rest = losses.buckets(logits.log_softmax(-1), torch.tensor([[0]]))[0, 1]
    assert rest.item() == pytest.approx(math.log(1 + math.exp(-1)) - 40, rel=1e-6)


def test_gradients_stay_finite_where_the_student_or_the_teacher_says_never():
    teacher = losses.buckets(torch.tensor([[0.0, -torch.inf, -torch.inf]]), torch.tensor([[0, 1]]))
    logits = torch.tensor([[-200.0, 90.0, 3.0]], requires_grad=True)
    for name in losses.DIVERGENCES:
        student = losses.buckets(logits.log_softmax(-1), torch.tensor([[0, 1]]))
        found = losses.divergence(name)(teacher, student).sum()
        (gradient,) = torch.autograd.grad(found, logits)
        assert found.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_neither_loss_nor_gradient(pair, chunk):
    teacher, hidden = pair[0].log_softmax(-1), pair[1][:, :8].clone().requires_grad_()
    head = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.arange(7)

    def loss(teacher, hidden, labels):
        student = (hidden @ head.T).log_softmax(-1)
        each = losses.forward_kl(teacher, student), losses.text_loss(student, labels)
        return torch.stack([x.sum() for x in each])

    whole = loss(teacher, hidden, labels)
    found = losses.over_chunks(loss, (teacher, hidden, labels), chunk)
    torch.testing.assert_close(found, whole)
    expected = torch.autograd.grad(whole.sum(), (hidden, head))
    torch.testing.assert_close(torch.autograd.grad(found.sum(), (hidden, head)), expected)


def test_chunks_keep_no_probabilities_for_the_way_back():
    hidden, head = torch.randn(64, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses.over_chunks(lambda h: (h @ head.T).log_softmax(-1)[:, 0].sum(), (hidden,), 16)
    assert max(kept, default=0) <= head.numel()


def test_the_texts_loss_is_pytorchs(pair):
    labels = torch.arange(7) * 3
    expected = torch.nn.functional.cross_entropy(pair[0], labels, reduction="none")
    torch.testing.assert_close(losses.text_loss(pair[0].log_softmax(-1), labels), expected)


def test_hidden_states_are_measured_in_the_teachers_size():
    teacher = torch.full((3, 4), 10.0)
    torch.testing.assert_close(losses.hidden_loss(teacher, 0 * teacher), torch.ones(3))
    torch.testing.assert_close(losses.hidden_loss(teacher, 1.1 * teacher), torch.full((3,), 0.01))


def test_what_is_wrong_gets_one_line():
    with pytest.raises(ParetoError, match="unknown divergence 'js'; there are: forward"):
        losses.divergence("js")
    with pytest.raises(ParetoError, match="a skew of 1 is not between 0 and 1"):
        losses.divergence("skew", 1.0)
    with pytest.raises(ParetoError, match="a chunk of 0 tokens"):
        losses.over_chunks(torch.sum, (torch.ones(2),), 0)
