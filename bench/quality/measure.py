"""Passes windows of text and retrieval prompts through a running engine, and sums up what windows gave."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from bench.quality.needle import Trial
from bench.quality.schema import TextQuality
from bench.quality.store import Arrays
from bench.statistics import exp_estimate, mean_estimate

Window = tuple[list[int], str | None, list[str] | None]
"""A window's tokens, the file to write its logits to, and the baseline's logits: file, and name of their dtype."""


MARGIN_STEPS = 64
"""Steps for which the request beside others lasts longer than they: so late may the last of them come."""


def chunked(prompts: list[list[int]], params: list[Any], chunk_tokens: int | None) -> tuple[list[Any], list[Any], int]:
    """Return prompts and their settings for vLLM, and how many outputs come before theirs.

    vLLM cuts prompts into chunks only while there are other requests; requests reach it one after the other, the first
    would take the whole first step, and the last that runs all that is left of it. So a request that decodes all the
    while is there before them.

    Args:
        prompts: tokens.
        params: of each.
        chunk_tokens: longest chunk; None where a step holds one only, so that nothing has to be cut.

    """
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    if chunk_tokens is None:
        return asked, params, 0
    longest = max(map(len, prompts))
    steps = math.ceil(longest / chunk_tokens) + max(one.max_tokens for one in params) + MARGIN_STEPS
    beside = SamplingParams(max_tokens=min(steps, longest), ignore_eos=True, temperature=0.0, detokenize=False)
    return [{"prompt_token_ids": prompts[0][:1]}, *asked], [beside, *params], 1


def measure_windows(llm: Any, windows: list[Window], chunk_tokens: int | None = None) -> list[dict[str, Any]]:
    """Pass windows through an engine, all at once, and return each one's per-token figures.

    Args:
        llm: an engine of :func:`bench.engine.build_llm`, idle, whose steps hold a chunk of every window.
        windows: what to measure.
        chunk_tokens: longest chunk; None where a step holds one only.

    Returns:
        Of each window ``nll``, ``kl``, ``top1`` (lists with one entry a predicted position; the last two empty without
        a baseline), ``max_chunk``, ``vocabulary`` and ``dtype`` of the logits.

    """
    from vllm import SamplingParams

    for _, store, _ in windows:
        if store:
            Path(store).parent.mkdir(parents=True, exist_ok=True)
    each = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    prompts, params, before = chunked([tokens for tokens, _, _ in windows], [each] * len(windows), chunk_tokens)
    llm.collective_rpc("pareto_tap_begin", args=(windows, before))
    llm.generate(prompts, params, use_tqdm=False)
    figures = [result for result in llm.collective_rpc("pareto_tap_end") if result is not None]
    if len(figures) != 1:
        raise RuntimeError(f"{len(figures)} workers recorded logits, expected one")
    return [dict(one) for one in figures[0]]


POSITIONS = 16
"""Equal parts of a window whose divergence is stated apart, to show whether it grows along a sequence."""


def by_position(rows: list[np.ndarray]) -> list[float]:
    """Return the means over equally long windows of POSITIONS parts, from the first positions to the last."""
    parts = np.array_split(np.stack([row.astype(np.float64) for row in rows]).mean(0), POSITIONS)
    return [float(part.mean()) for part in parts if len(part)]


def text_quality(name: str, tested: list[Arrays], baseline: list[Arrays] | None) -> TextQuality:
    """Return the figures of some windows, each an equally long one; ``baseline`` is None for the baseline itself."""
    nll = mean_estimate([float(a["nll"].astype(np.float64).mean()) for a in tested])
    change = kl = top1 = p99 = along = None
    if baseline is not None:
        differences = [
            float((a["nll"].astype(np.float64) - b["nll"]).mean()) for a, b in zip(tested, baseline, strict=True)
        ]
        change = exp_estimate(mean_estimate(differences), shift=-1.0)
        kl = mean_estimate([float(a["kl"].astype(np.float64).mean()) for a in tested])
        p99 = float(np.percentile(np.concatenate([a["kl"] for a in tested]), 99))
        top1 = mean_estimate([float(a["top1"].mean()) for a in tested])
        along = by_position([a["kl"] for a in tested])
    return TextQuality(
        name=name,
        windows=len(tested),
        tokens=sum(len(a["nll"]) for a in tested),
        nll=nll,
        perplexity=exp_estimate(nll),
        perplexity_change=change,
        kl=kl,
        kl_p99=p99,
        top1_agreement=top1,
        kl_by_position=along,
    )


def ask_trials(llm: Any, trials: list[Trial], indices: list[int], chunk_tokens: int | None) -> dict[int, str]:
    """Return the answers to retrieval prompts, asked all at once, by their indices."""
    from vllm import SamplingParams

    each = [SamplingParams(max_tokens=trial.answer_tokens, temperature=0.0) for trial in trials]
    prompts, params, before = chunked([trial.prompt for trial in trials], each, chunk_tokens)
    outputs = llm.generate(prompts, params, use_tqdm=False)[before:]
    return {index: output.outputs[0].text for index, output in zip(indices, outputs, strict=True)}
