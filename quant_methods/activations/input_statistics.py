"""What the inputs of linear layers look like: ranges, outlier channels, and what rounding them to 8 bits loses.

For every stage of every block (layers that share an input, see ``calibrator.py``), before and after the steps of a
recipe that prepare the rounding: whether a model has outliers, where, and whether the recipe takes them away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.stages import Ranges, find_stages, stage_statistics
from quant_methods.formats.grid import round_tokens
from quant_methods.methods.scaling import ScaledBlock, scale_block
from quant_methods.mixed_precision.units import common_name
from quant_methods.plan import Plan

# Dettmers et al., "LLM.int8()" (2022), https://arxiv.org/abs/2208.07339, section 3.3: outliers are features of
# magnitude 6 or more.
LLM_INT8_THRESHOLD = 6.0
TOP = 127  # The largest code of symmetric 8 bits, as serving rounds activations.


@dataclass(frozen=True)
class Criteria:
    """What counts as an outlier, and how static scales are chosen.

    Attributes:
        factor: a channel whose largest |x| exceeds this many times the median channel's is an outlier.
        percentile: of |x|, over all elements of one half of the tokens: what static int8 just covers.

    """

    factor: float = 10.0
    percentile: float = 99.99


@dataclass(frozen=True)
class InputStatistics:
    """The inputs x [tokens, channels] of layers that share them.

    Largest values are over all calibration tokens, everything else over an evenly spread sample.

    Attributes:
        name: the layers' common name.
        channels: input channels.
        largest: the largest |x|.
        median_largest: the largest |x| of the median channel.
        percentile: the criteria's percentile of |x|.
        outlier_channels: channels above ``factor`` times ``median_largest``.
        llm_int8_channels: channels with an |x| of 6 or more (LLM.int8's criterion).
        kurtosis: ``E (x - mean)^4 / variance^2`` over all elements; 3 for a normal distribution.
        static_saturated: fraction of |x| that is clipped by one int8 scale for the tensor, chosen on the other half of
            the tokens.
        static_error: what that rounding loses, ``||x - Q(x)|| / ||x||``.
        static_zeros: fraction of the nonzero x that it rounds to zero.
        token_saturated: fraction of |x| on the largest code with one int8 scale for each token; such a scale covers
            the token's largest, so nothing is clipped, and little else comes close where it is an outlier.
        token_error: as ``static_error``, with one scale for each token.
        token_zeros: as ``static_zeros``.

    """

    name: str
    channels: int
    largest: float
    median_largest: float
    percentile: float
    outlier_channels: int
    llm_int8_channels: int
    kurtosis: float
    static_saturated: float
    static_error: float
    static_zeros: float
    token_saturated: float
    token_error: float
    token_zeros: float


def describe(name: str, ranges: Ranges, criteria: Criteria) -> InputStatistics:
    """Return the statistics of one stage's inputs; ``ranges`` comes from the calibrator."""
    x = ranges.sample
    size = x.abs()
    median = ranges.largest.median().item()
    # The scale comes from every other token, and is tried on the rest: on the same ones, the fraction clipped would be
    # the percentile's by definition.
    half = quantile(size[::2], criteria.percentile / 100)
    scale = half / TOP
    test = x[1::2] if len(x) > 1 else x
    static = torch.round(test / scale).clamp(-TOP - 1, TOP) * scale if scale > 0 else test
    per_token = round_tokens(x, 8)
    steps = (size.amax(-1, keepdim=True) / TOP).clamp(min=torch.finfo(x.dtype).tiny)
    return InputStatistics(
        name=name,
        channels=x.shape[1],
        largest=ranges.largest.max().item(),
        median_largest=median,
        percentile=quantile(size, criteria.percentile / 100),
        outlier_channels=int((ranges.largest > criteria.factor * median).sum()),
        llm_int8_channels=int((ranges.largest >= LLM_INT8_THRESHOLD).sum()),
        kurtosis=kurtosis(x),
        static_saturated=(test.abs() > half).float().mean().item(),
        static_error=_lost(test, static),
        static_zeros=_zeros(test, static),
        token_saturated=(torch.round(size / steps) >= TOP).float().mean().item(),
        token_error=_lost(x, per_token),
        token_zeros=_zeros(x, per_token),
    )


def quantile(values: Tensor, fraction: float) -> float:
    """Return the smallest value that at least ``fraction`` of the values do not exceed."""
    # torch.quantile takes 16 million values at most.
    flat = values.flatten()
    return flat.kthvalue(min(max(math.ceil(fraction * len(flat)), 1), len(flat))).values.item()


def kurtosis(x: Tensor) -> float:
    """Return ``E (x - mean)^4 / variance^2`` over all elements, in float64."""
    centred = x.double() - x.double().mean()
    variance = centred.square().mean()
    return (centred.pow(4).mean() / variance.square()).item() if variance > 0 else 0.0


def _lost(x: Tensor, rounded: Tensor) -> float:
    return ((x - rounded).norm() / x.norm().clamp(min=1e-30)).item()


def _zeros(x: Tensor, rounded: Tensor) -> float:
    nonzero = x != 0
    return ((rounded == 0) & nonzero).sum().item() / max(int(nonzero.sum()), 1)


def measure(
    decoder: Decoder,
    tokens: Tensor,
    plan: Plan | None,
    criteria: Criteria,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[InputStatistics]:
    """Return the statistics of every stage of a model, in model order.

    Args:
        decoder: the model, rotated or not.
        tokens: int64 [sequences, length].
        plan: its transform steps are carried out on each block first; None leaves the model as it is.
        criteria: what to count.
        progress: called with (blocks done, blocks in all).

    """
    hidden = decoder.embed(tokens)
    found: list[InputStatistics] = []
    total = len(decoder.blocks)
    for index in range(total):
        with decoder.loaded(index) as block:
            if plan is not None and plan.transforms:
                scale_block(ScaledBlock(decoder, index, block, hidden, plan))
            stages = find_stages(decoder, index, block, hidden)
            for position, stage in enumerate(stages):
                if stage.wave is not None:
                    continue  # Experts: their inputs are some tokens of what is seen before the layers of attention.
                seen = stage_statistics(decoder, index, block, hidden, stages=stages, position=position, ranges=True)
                assert seen.ranges is not None
                name = common_name(tuple(decoder.name(index, local) for local in stage.names))
                found.append(describe(name, seen.ranges, criteria))
            if index < total - 1:
                decoder.advance(index, block, hidden)
        progress(index + 1, total)
    return found


def document(
    model: str, recipe: str | None, criteria: Criteria, **rows: list[InputStatistics] | None
) -> dict[str, Any]:
    """Return the statistics as plain data; ``before`` and ``after`` (None if the recipe changes nothing)."""
    return {
        "schema": "vllm-pareto/activation-statistics/1",
        "model": model,
        "recipe": recipe,
        "criteria": {**asdict(criteria), "llm_int8_threshold": LLM_INT8_THRESHOLD},
        **{name: None if found is None else [asdict(row) for row in found] for name, found in rows.items()},
    }


def markdown(before: list[InputStatistics], after: list[InputStatistics] | None, criteria: Criteria) -> str:
    """Return a table; with ``after``, cells read ``before -> after``."""
    headings = (
        "inputs of", "channels", "largest", "median channel's", f"outliers (> {criteria.factor:g}x)",
        f"LLM.int8 (>= {LLM_INT8_THRESHOLD:g})", "kurtosis", "static int8: clipped", "static: error",
        "per token: zeros", "per token: error",
    )  # fmt: skip
    lines = ["| " + " | ".join(headings) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
    for number, old in enumerate(before):
        sides = [_cells(old)] if after is None else [_cells(old), _cells(after[number])]
        cells = [" -> ".join(dict.fromkeys(pair)) for pair in zip(*sides, strict=True)]
        lines.append(f"| {old.name} | {old.channels} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(row: InputStatistics) -> list[str]:
    return [
        f"{row.largest:.1f}",
        f"{row.median_largest:.2f}",
        str(row.outlier_channels),
        str(row.llm_int8_channels),
        f"{row.kurtosis:.1f}",
        f"{100 * row.static_saturated:.3f}%",
        f"{100 * row.static_error:.2f}%",
        f"{100 * row.token_zeros:.1f}%",
        f"{100 * row.token_error:.2f}%",
    ]
