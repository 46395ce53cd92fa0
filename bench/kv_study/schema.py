"""What ``kv-study.json`` holds: typed results, apart from the code that measures them. ``None`` is never zero."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bench.schema import Estimate

SCHEMA = "vllm-pareto/kv-study/1"


@dataclass(frozen=True)
class WindowLoss:
    """One coder on one window of text.

    Attributes:
        text: the text's file name, or ``samples`` for text that the model wrote itself.
        kl: KL divergence (full precision || coded) over the full vocabulary, nats per token.
        top1: share of positions where both put the same token first.
        nll: negative log-likelihood of the window, nats per token.

    """

    text: str
    kl: float
    top1: float
    nll: float


@dataclass(frozen=True)
class CoderResult:
    """One coder.

    Attributes:
        name: of the coder (kv_cache/simulate/registry.py).
        family: ``ours``, ``ours, varied``, ``vLLM's``, ``papers`` or ``uncompressed``.
        error: one line why it could not be measured; then the figures are None.
        bits: of an element of keys and values, all metadata included, at the end of a window.
        kl: mean over windows, nats per token.
        top1_agreement: mean over windows.
        perplexity_change: perplexity divided by full precision's, minus 1; paired by window.
        windows: what the estimates are made of.
        fit_seconds: time of fitting on calibration text. What the project's own coders share is in the first one's.
        run_seconds: time of all windows.

    """

    name: str
    family: str
    error: str | None
    bits: float | None
    kl: Estimate | None
    top1_agreement: Estimate | None
    perplexity_change: Estimate | None
    windows: list[WindowLoss]
    fit_seconds: float | None
    run_seconds: float | None


@dataclass(frozen=True)
class KVStudyReport:
    """A whole run.

    Attributes:
        status: ``complete``, or ``partial`` while chosen coders are missing.
        created_at: ISO 8601, of the last write.
        command: what was typed, the last time, files without their folders.
        settings: what the figures depend on; a run continues a file of the same settings only.
        environment: versions, machine, commit; with ``device``.
        perplexity: of the full-precision model.
        reference_nll: negative log-likelihood of each window in full precision, nats per token.
        coders: those measured so far.

    """

    status: str
    created_at: str
    command: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    perplexity: Estimate
    reference_nll: list[float]
    coders: list[CoderResult]
    schema: str = field(default=SCHEMA)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document, its ``schema`` first."""
        document = asdict(self)
        return {"schema": document.pop("schema"), **document}


def _estimate(data: dict[str, Any] | None) -> Estimate | None:
    return None if data is None else Estimate(**data)


def from_dict(document: dict[str, Any]) -> KVStudyReport:
    """Undo `KVStudyReport.to_dict`.

    Raises:
        KeyError, TypeError: it is no such document.

    """
    data = dict(document)
    coders = []
    for coder in data.pop("coders"):
        figures = {name: _estimate(coder[name]) for name in ("kl", "top1_agreement", "perplexity_change")}
        windows = [WindowLoss(**window) for window in coder["windows"]]
        coders.append(CoderResult(**coder | figures | {"windows": windows}))
    return KVStudyReport(**data | {"perplexity": Estimate(**data["perplexity"])}, coders=coders)
