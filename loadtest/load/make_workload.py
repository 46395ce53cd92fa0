"""The workload of a run, from its settings and what the server says of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from loadtest.endpoint.apis.registry import APIS
from loadtest.endpoint.calibration import calibrate
from loadtest.endpoint.client import Client
from loadtest.endpoint.token_count import LocalCounter, ServerCounter, read_tokenizer
from loadtest.request_settings import RequestSettings
from loadtest.results.schema import Server
from loadtest.workloads.datasets import DatasetPrompts, load_prompts
from loadtest.workloads.made_up_images import PicturedPrompts
from loadtest.workloads.prompt import PromptSource
from loadtest.workloads.prompts import ConversationPrompts, TokenCost, TokenIdPrompts, WordPrompts
from loadtest.workloads.traces.prompts import TracePrompts
from loadtest.workloads.traces.registry import read_trace
from loadtest.workloads.workload import Workload


def token_cost(client: Client, server: Server, settings: RequestSettings, tokenizer: Any = None) -> TokenCost | None:
    """Return what text costs on the server, or by a ``tokenizer`` that is read; None where no prompt is made of text.

    Raises:
        LoadTestError: the tokenizer is no good, or the server refuses the calibration.

    """
    if settings.prompts or settings.prompt_token_ids:
        return None
    if tokenizer is None and settings.tokenizer:
        tokenizer = read_tokenizer(settings.tokenizer)
    return calibrate(client, server.model, APIS[settings.endpoint], tokenizer)


def make_workload(
    client: Client, server: Server, settings: RequestSettings, cost: TokenCost | None = None
) -> tuple[Workload, dict[str, Any]]:
    """Return the workload, and how the lengths of its prompts were calibrated.

    ``cost`` is what text costs, where another process has asked the server already.

    Raises:
        LoadTestError: a file is no good, or the server refuses the calibration.

    """
    api = APIS[settings.endpoint]
    tokenizer = read_tokenizer(settings.tokenizer) if settings.tokenizer else None
    entries = read_trace(settings.trace, settings.trace_format) if settings.trace else None
    seed, ids = settings.seed, settings.prompt_token_ids
    cost = cost or token_cost(client, server, settings, tokenizer)
    calibration: dict[str, Any]
    if settings.prompts:
        calibration = {"how": "none: prompts from a data set"}
    elif ids:
        calibration = {"how": "none: prompts are token ids"}
    else:
        assert cost is not None
        calibration = {
            "how": cost.how,
            "tokens_per_word": cost.per_word,
            "overhead_tokens": cost.overhead,
            "words": len(cost.words),
        }
    source: PromptSource
    times: Sequence[float] | None = None
    if settings.prompts:
        prompts = load_prompts(
            settings.prompts,
            api,
            settings.columns,
            subset=settings.subset,
            split=settings.split,
            turns=settings.turns is not None,
        )
        source = DatasetPrompts(prompts, settings.turns, settings.think_ms)
    elif entries is not None:
        source = TracePrompts(entries, seed, cost, ids)
        times = source.times
    elif ids:
        source = TokenIdPrompts(settings.prompt_tokens, settings.prefixes, *ids, seed)
    else:
        assert cost is not None
        source = words = WordPrompts(settings.prompt_tokens, settings.prefixes, cost, seed)
        if settings.turns:
            source = ConversationPrompts(words, settings.turns, settings.turn_tokens, settings.think_ms)
        if settings.images:
            source = PicturedPrompts(source, settings.images, api)
    ignore_eos = server.is_vllm if settings.ignore_eos is None else settings.ignore_eos
    counter: Callable[[str], int | None] = LocalCounter(tokenizer) if tokenizer else ServerCounter(client, server.model)
    workload = Workload(
        api,
        server.model,
        source,
        settings.output_tokens,
        ignore_eos,
        settings.temperature,
        settings.extra_body,
        seed,
        times=times,
        count_tokens=counter,
        # Asking the server for every recorded answer before it is sent would be a load of its own.
        recorded_lengths=tokenizer is not None,
    )
    return workload, {**calibration, "ignore_eos": ignore_eos}
