"""How far a model's next-token distributions are from its teacher's, and the text's own loss, chunk by chunk of tokens.

Every divergence takes log-probabilities over the same outcomes, in any float dtype, and returns nats, one number a
token. Outcomes are the vocabulary, or its most likely tokens and one outcome for all others (``buckets``): merging
outcomes never makes a divergence larger, so that the second is a lower bound of the first.

A large vocabulary's probabilities take more memory than the model. ``over_chunks`` keeps those of one chunk of tokens
at a time: each chunk is computed again on the way back instead of being kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed

from kv_cache.errors import ParetoError

FLOOR = -1e4
"""Log-probabilities of what cannot happen: ``exp`` makes 0 of it, and 0 times a finite number is 0."""


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Return ``KL(teacher || student)``, [...], of log-probabilities [..., outcomes]."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Return ``KL(student || teacher)``; it makes the student leave out what it cannot say well.

    Gu et al., "MiniLLM" (2023), https://arxiv.org/abs/2306.08543, section 2.1.
    """
    return forward_kl(student, teacher)


def skew_kl(teacher: Tensor, student: Tensor, alpha: float = 0.1) -> Tensor:
    """Return ``KL(teacher || alpha teacher + (1 - alpha) student)``, whose gradients stay bounded.

    Ko et al., "DistiLLM" (2024), https://arxiv.org/abs/2402.03898, section 3.1.
    """
    return forward_kl(teacher, _mixed(teacher, student, alpha))


def skew_reverse_kl(teacher: Tensor, student: Tensor, alpha: float = 0.1) -> Tensor:
    """Return ``KL(student || alpha student + (1 - alpha) teacher)``; see :func:`skew_kl`."""
    return forward_kl(student, _mixed(student, teacher, alpha))


def jsd(teacher: Tensor, student: Tensor, alpha: float = 0.5) -> Tensor:
    """Return the generalized Jensen-Shannon divergence, ``alpha KL(teacher || m) + (1 - alpha) KL(student || m)``.

    ``m = alpha teacher + (1 - alpha) student``; Agarwal et al., "On-Policy Distillation of Language Models" (GKD,
    2023), https://arxiv.org/abs/2306.13649, equation 1. Bounded, and the usual one for what a student writes itself.
    """
    middle = _mixed(teacher, student, alpha)
    return alpha * forward_kl(teacher, middle) + (1 - alpha) * forward_kl(student, middle)


def _mixed(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """Return the log of ``alpha exp(first) + (1 - alpha) exp(second)``, 0 < alpha < 1."""
    weights = torch.tensor([alpha, 1 - alpha], dtype=torch.float64).log().tolist()
    return torch.logaddexp(first + weights[0], second + weights[1])


Divergence = Callable[[Tensor, Tensor], Tensor]
DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "skew": skew_kl,
    "skew-reverse": skew_reverse_kl,
    "jsd": jsd,
}
"""By the name that a user gives; those of ``MIXING`` take ``alpha`` too."""
MIXING = ("skew", "skew-reverse", "jsd")
"""Names of those that hold a mixture of both against one or both of them."""


def divergence(name: str, alpha: float = 0.1) -> Divergence:
    """Return the divergence of a name.

    Args:
        name: a key of ``DIVERGENCES``.
        alpha: of those that mix.

    Raises:
        ParetoError: there is none of that name, or alpha is not between 0 and 1.

    """
    if name not in DIVERGENCES:
        raise ParetoError(f"unknown divergence {name!r}; there are: {', '.join(DIVERGENCES)}")
    if not 0 < alpha < 1:
        raise ParetoError(f"a skew of {alpha:g} is not between 0 and 1; 0.1 is usual")
    found = DIVERGENCES[name]
    return (lambda teacher, student: found(teacher, student, alpha)) if name in MIXING else found


def total_kl(found: Tensor, expected: Tensor) -> Tensor:
    """Return the sum over tokens of ``KL(expected || found)`` of log-probabilities, by PyTorch's own kernel."""
    return functional.kl_div(found, expected, log_target=True, reduction="sum")


def buckets(log_probabilities: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probabilities of some tokens, and of all others together.

    Args:
        log_probabilities: [..., vocabulary].
        ids: int64 [..., k], different ones.

    Returns:
        [..., k + 1]; nothing is below ``FLOOR``.

    """
    # The rest is summed itself: 1 less the sum of the chosen would be rounding error where they have nearly all.
    rest = log_probabilities.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probabilities.gather(-1, ids), rest], -1).clamp_min(FLOOR)


def text_loss(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of tokens, [...], of log-probabilities [..., vocabulary] and labels int64 [...]."""
    return -log_probabilities.gather(-1, labels[..., None]).squeeze(-1)


def hidden_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the squared distance of hidden states [..., width], [...], in units of the teacher's mean square.

    Jiao et al., "TinyBERT" (2019), https://arxiv.org/abs/1909.10351, section 3.1; the units make one weight fit all
    layers, whose states grow from the first to the last.
    """
    teacher, student = teacher.float(), student.float()
    return (student - teacher).square().mean(-1) / teacher.square().mean().clamp_min(1e-12)


def over_chunks(loss: Callable[..., Tensor], rows: tuple[Tensor, ...], chunk: int) -> Tensor:
    """Return the sum of ``loss`` over chunks of rows; what a chunk computes inside is not kept for the way back.

    Args:
        loss: takes a chunk of each tensor and returns a tensor, summed over the chunk's rows.
        rows: tensors of one length.
        chunk: rows at a time.

    Raises:
        ParetoError: a chunk has no rows.

    """
    if chunk < 1:
        raise ParetoError(f"a chunk of {chunk} tokens is none; give 1 or more")
    total: Tensor | None = None
    for parts in zip(*(tensor.split(chunk) for tensor in rows), strict=True):
        if torch.is_grad_enabled():
            found = recomputed(loss, *parts, use_reentrant=False, preserve_rng_state=False)
        else:
            found = loss(*parts)
        total = found if total is None else total + found
    if total is None:
        raise ParetoError("no tokens to take the loss of")
    return total
