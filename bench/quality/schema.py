"""What ``eval.json`` holds: typed results, apart from the code that computes them.

``None`` means that the value is undefined for this run, never zero. ``EvalReport.to_dict`` gives the JSON document.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bench.schema import Estimate, KVCache, ModelInfo

SCHEMA = "vllm-pareto/eval/1"


@dataclass(frozen=True)
class TextQuality:
    """Quality on windows of text, measured token by token with teacher forcing.

    Attributes:
        name: the text's file name, ``samples`` for text that the baseline wrote itself, or ``all``.
        windows: windows of text.
        tokens: positions scored: a window of n tokens has n - 1.
        nll: negative log-likelihood of the text, nats per token.
        perplexity: exp(nll). Depends on the tokenizer: compare only models that share one.
        perplexity_change: perplexity divided by the baseline's, minus 1; paired by window. None for the baseline.
        kl: KL divergence (baseline || tested) over the full vocabulary, nats per token. Logits are compared as served
            (bfloat16 for a bfloat16 head), whose rounding alone gives some 1e-5 to 1e-4. None for the baseline.
        kl_p99: 99th percentile of the per-token divergence: the tail that a mean hides. None for the baseline.
        top1_agreement: fraction of positions where both put the same token first. None for the baseline.
        kl_by_position: mean divergence in each of 16 equal parts of the windows, first positions first. None for the
            baseline, and in results of earlier versions.

    """

    name: str
    windows: int
    tokens: int
    nll: Estimate
    perplexity: Estimate
    perplexity_change: Estimate | None
    kl: Estimate | None
    kl_p99: float | None
    top1_agreement: Estimate | None
    kl_by_position: list[float] | None = None


@dataclass(frozen=True)
class NeedleCell:
    """Retrieval at one context length and depth.

    Attributes:
        length: tokens of prompt and answer together.
        depth: where the needle lies: 0 is the start of the filler, 1 its end.
        accuracy: fraction of trials whose greedy answer was the planted number, Wilson interval.

    """

    length: int
    depth: float
    accuracy: Estimate


@dataclass(frozen=True)
class Needle:
    """Retrieval of a planted number. Says nothing about damage when the baseline itself cannot do the task."""

    accuracy: Estimate
    cells: list[NeedleCell]


def shown_p(p: float | None) -> str:
    """Return a p-value as text; empty for None."""
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


@dataclass(frozen=True)
class Flips:
    """Questions of multiple choice whose chosen answer is not the baseline's.

    Attributes:
        right_to_wrong: the baseline was right.
        wrong_to_right: the tested configuration is.
        wrong_to_wrong: neither is, in another way; accuracy does not see them.

    """

    right_to_wrong: int
    wrong_to_right: int
    wrong_to_wrong: int


@dataclass(frozen=True)
class TaskResult:
    """A metric of a task, or of a group of tasks with all their questions together.

    Attributes:
        task: lm-eval's name.
        metric: lm-eval's name, with the filter of answers behind a comma where there is one; of multiple choice with
            one right answer also ``ece`` (expected calibration error, debiased, 15 bins of equally many questions),
            ``brier`` (0 to 2) and ``flips`` (share of questions whose chosen answer is not the baseline's).
        better: ``more`` or ``less``.
        questions: how many; 0 where the value is no mean over questions, which then has no error.
        value: over all questions. Its ``n`` counts documents where questions share them, else questions: they are what
            the error takes for independent. The interval of a share of right answers is Wilson's.
        change: mean difference from the baseline, question by question. None for the baseline.
        p: of no change: McNemar's exact test for scores of 0 and 1, else, and where questions share documents, the
            paired bootstrap. None for the baseline, and for ``flips``. Results of earlier versions had a paired t-test.
        gained: questions with a better score than the baseline's; None for the baseline.
        lost: questions with a worse one.
        read: share of the contexts' tokens that were read back from the KV cache: on a CPU all, on a GPU what the
            prefix cache held.
        p_holm: ``p`` adjusted for all configurations and tasks of the evaluation (Holm); for the tasks of a group, and
            for ``brier`` and ``ece``, for those alone.
        smallest: smallest true change that this sample would have shown with 80% power at two-sided 5%.
        margin: the loss that ``verdict`` is about, in the value's unit.
        verdict: ``non-inferior`` if the change's 95% interval loses less than the margin, ``inferior`` if all of it
            loses more, else ``undecided``; of scores between 0 and 1 that are lm-eval's. State it with its margin.
        flips: of the metric ``flips``. This and the four above are None in results of earlier versions.

    """

    task: str
    metric: str
    better: str
    questions: int
    value: Estimate
    change: Estimate | None
    p: float | None
    gained: int | None
    lost: int | None
    read: float
    p_holm: float | None = None
    smallest: float | None = None
    margin: float | None = None
    verdict: str | None = None
    flips: Flips | None = None

    @property
    def judged(self) -> str:
        """Return the verdict with its margin; empty without one."""
        return "" if self.verdict is None or self.margin is None else f"{self.verdict} ({self.margin * 100:g} pt)"

    @property
    def agreement(self) -> float | None:
        """Return the share of questions whose score is the baseline's, such as its verdict of a refusal."""
        if self.gained is None or self.lost is None:
            return None
        return 1 - (self.gained + self.lost) / self.questions


@dataclass(frozen=True)
class ConfigurationResult:
    """One model with one KV-cache dtype.

    Attributes:
        name: unique within the report.
        is_baseline: the others' reference; its ``perplexity_change``, ``kl`` and ``top1_agreement`` are None.
        overall: all windows of all texts together; None when no text was measured.
        max_chunk_tokens: the longest prefill chunk that was seen: everything before it was read back from the cache.
        tasks: of lm-eval; none in results of earlier versions.

    """

    name: str
    is_baseline: bool
    model: ModelInfo
    kv_cache: KVCache
    texts: list[TextQuality]
    overall: TextQuality | None
    needle: Needle | None
    max_chunk_tokens: int
    tasks: list[TaskResult] = field(default_factory=list)


@dataclass(frozen=True)
class FailedConfiguration:
    """A configuration that could not be measured.

    Attributes:
        name: unique within the report.
        model: its weights.
        kv_cache_dtype: what ``--kv-cache-dtype`` was.
        error: one line why: the engine did not start or died, or what it computed is not defined.

    """

    name: str
    model: ModelInfo
    kv_cache_dtype: str
    error: str


@dataclass(frozen=True)
class EvalReport:
    """A whole evaluation.

    Attributes:
        status: ``complete`` when every configuration is in one of the two lists, ``partial`` before.
        created_at: ISO 8601, UTC.
        settings: the user's choices.
        environment: versions and machine.
        configurations: what was measured.
        failed: what could not be; measured again when the evaluation is started again. Results of earlier versions do
            not have it.

    """

    status: str
    created_at: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    configurations: list[ConfigurationResult]
    failed: list[FailedConfiguration] = field(default_factory=list)
    schema: str = field(default=SCHEMA)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document, its ``schema`` first."""
        document = asdict(self)
        return {"schema": document.pop("schema"), **document}
