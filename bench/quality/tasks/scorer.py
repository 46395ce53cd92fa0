"""lm-eval's model interface over a running engine, with contexts that are read back from the KV cache.

Multiple choice asks how likely an answer is after a context. A GPU prefills a prompt in full precision, so that a score
taken in one pass says nothing of what a KV-cache dtype does. Here a context less its last token is computed first, and
the scores take it from the prefix cache: all but the tokens after its last whole page are read from codes. On a CPU all
tokens are read from codes whichever way they come, so there the first pass is left out.

What comes from the cache predicts nothing. Where a context fills its pages exactly, or two answers begin alike and fill
one, the cache holds the very token at which an answer's first tokens are predicted; those are asked for once more, each
as the next token after a prompt, whose end vLLM computes in any case.

Answers of one token each are asked for in one request a context, others in one request each. Prompts that are answered
freely are computed ahead in the same way, so that their last tokens, and with them the first of the answer, read codes;
what is decoded does in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import truncate_tokens
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

Pair = tuple[Any, list[int], list[int]]
"""lm-eval's request: its strings, the context's tokens, the continuation's."""


ENCODED_AT_ONCE, MOST_AT_ONCE = 2048, 256
"""Texts, and contexts or prompts."""


class EngineScorer(TemplateLM):
    """lm-eval's model over a ``vllm.LLM`` with prefix caching.

    Args:
        llm: the engine; idle.
        warm: whether contexts are computed ahead, so that scores read them from the cache.
        capacity: tokens that the KV cache holds; contexts computed ahead take no more than half.
        note: told how far it is.

    Attributes:
        read: tokens of scored contexts and prompts that came from the cache.
        asked: tokens of scored contexts and prompts.
        cut: those that were too long for the engine and lost a part.

    """

    def __init__(self, llm: Any, warm: bool, capacity: int, note: Callable[[str], object] = lambda what: None) -> None:
        super().__init__()
        self.llm, self.warm, self.room, self.note = llm, warm, max(capacity // 2, 1), note
        self.tokenizer = llm.get_tokenizer()
        self.max_length = int(llm.llm_engine.vllm_config.model_config.max_model_len)
        self.read = self.asked = self.cut = self._done = 0
        self._encoded: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Return what stands before a text without a context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """Return the tokenizer's name, which lm-eval keys its caches by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return a text's tokens; a tokenizer adds what it adds by itself unless told."""
        if add_special_tokens is None and string in self._encoded:
            return list(self._encoded[string])
        if add_special_tokens is None and self._begun(string):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, **special).input_ids)

    def _begun(self, string: str) -> bool:
        """Return whether a chat template wrote already what the tokenizer adds before a text."""
        first = self.tokenizer.bos_token
        return bool(first) and string.startswith(first)

    def _encode_ahead(self, texts: Iterable[str]) -> None:
        """Encode texts together, each once: a tokenizer does so on all cores."""
        distinct = dict.fromkeys(texts)
        for begun in (False, True):
            group = [text for text in distinct if self._begun(text) == begun]
            for start in range(0, len(group), ENCODED_AT_ONCE):
                some = group[start : start + ENCODED_AT_ONCE]
                found = self.tokenizer(some, **({"add_special_tokens": False} if begun else {})).input_ids
                self._encoded.update(zip(some, found, strict=True))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability after its context, and whether greedy decoding would say it."""
        # A context's last blanks are the continuation's, as in lm-eval's _encode_pair.
        pairs = [request.args for request in requests]
        self._encode_ahead(text for context, rest in pairs if context for text in (context.rstrip(), context + rest))
        try:
            return list(super().loglikelihood(requests, disable_tqdm))
        finally:
            self._encoded.clear()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as the model's template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability, and whether it is what greedy decoding would say."""
        contexts: dict[tuple[int, ...], list[int]] = {}
        whole: list[tuple[list[int], list[int]]] = []
        for index, (_, before, continuation) in enumerate(requests):
            # As lm-eval does: what is too long loses its beginning; one token is kept for the engine to generate.
            kept = (before + continuation)[-(self.max_length - 1) :]
            self.cut += len(kept) < len(before) + len(continuation)
            cut = len(kept) - min(len(continuation), len(kept) - 1)
            whole.append((kept[:cut], kept[cut:]))
            contexts.setdefault(tuple(kept[:cut]), []).append(index)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Contexts with a common beginning, such as the same examples, stand together and share pages.
        ordered = sorted(contexts)
        for places in self._groups(ordered):
            group = [ordered[place] for place in places]
            self._compute_ahead(group)
            prompts, params, readers = [], [], []
            for context in group:
                asked = {index: whole[index][1] for index in contexts[context]}
                single = sorted({tokens[0] for tokens in asked.values() if len(tokens) == 1})
                if single:
                    prompts.append(list(context))
                    params.append(_params(logprob_token_ids=single))
                    readers.append([(index, tokens) for index, tokens in asked.items() if len(tokens) == 1])
                for index, tokens in asked.items():
                    if len(tokens) != 1:
                        prompts.append([*context, *tokens])
                        params.append(_params(prompt_logprobs=0))
                        readers.append([(index, tokens)])
            hidden: list[tuple[int, list[int], int]] = []
            for prompt, output, reader in zip(prompts, self._generate(prompts, params), readers, strict=True):
                length = len(whole[reader[0][0]][0])
                cached = output.num_cached_tokens or 0
                self.asked += length
                self.read += min(cached, length)
                for index, tokens in reader:
                    if len(prompt) == length:
                        answers[index] = _first(output, tokens[0])
                        continue
                    known = max(cached - (length - 1), 0)
                    answers[index] = _rest(output, tokens[known:])
                    hidden += [(index, [*prompt[:length], *tokens[:at]], tokens[at]) for at in range(known)]
                self._count(len(reader))
            again = self._generate(
                [prompt for _, prompt, _ in hidden], [_params(logprob_token_ids=[token]) for _, _, token in hidden]
            )
            for (index, _, token), output in zip(hidden, again, strict=True):
                value, greedy = _first(output, token)
                answers[index] = answers[index][0] + value, answers[index][1] and greedy
        return answers

    def _count(self, more: int) -> None:
        self._done += more
        self.note(f"{self._done:,} requests done")

    def _compute_ahead(self, contexts: Sequence[Sequence[int]]) -> None:
        """Compute contexts less their last tokens, from which vLLM predicts in any case, into the prefix cache."""
        if self.warm:
            prompts = [list(context[:-1]) for context in contexts if len(context) > 1]
            self._generate(prompts, [_params()] * len(prompts))

    def _groups(self, prompts: Sequence[Sequence[int]], answers: Sequence[int] = ()) -> list[list[int]]:
        """Return the places of sorted prompts in groups that the cache has room for.

        Args:
            prompts: their tokens; what one has in common with the one before it takes no more room.
            answers: tokens to be generated after each.

        """
        groups: list[list[int]] = []
        used = 0
        for place, prompt in enumerate(prompts):
            answer = answers[place] if answers else 0
            size = len(prompt) + answer - (_common(prompts[place - 1], prompt) if groups else 0)
            if not groups or used + size > self.room or len(groups[-1]) >= MOST_AT_ONCE:
                groups.append([])
                used, size = 0, len(prompt) + answer
            groups[-1].append(place)
            used += size
        return groups

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return each text's log-probability, in windows of the model's context that do not overlap."""
        made = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs: list[Pair] = [(None, *make_disjoint_window(window)) for window in windows]
            made.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return made

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return greedy or sampled answers, each cut where its task says.

        A prompt that is too long loses its beginning as in lm-eval, or what the task's ``truncation`` says: ``left``,
        ``middle`` or ``right``.
        """
        from vllm import SamplingParams

        prompts, params = [], []
        for context, settings in (request.args for request in requests):
            until = settings.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            most = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or 256)
            sampled = bool(settings.get("do_sample"))
            tokens, room = self.tok_encode(context), max(self.max_length - most, 1)
            if len(tokens) > room:
                self.cut += 1
                tokens = truncate_tokens(tokens, room, side=settings.get("truncation", "left"))
            prompts.append(tokens)
            params.append(
                SamplingParams(
                    max_tokens=min(most, self.max_length - 1),
                    temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
                    top_p=float(settings.get("top_p", 1.0)) if sampled else 1.0,
                    stop=stops,
                )
            )
        answers = [""] * len(prompts)
        # Prompts with a common beginning stand together and share pages.
        order = sorted(range(len(prompts)), key=prompts.__getitem__)
        sizes = [params[index].max_tokens for index in order]
        groups = self._groups([prompts[index] for index in order], sizes) if self.warm else [range(len(order))]
        for places in groups:
            group = [order[place] for place in places]
            asked = [prompts[index] for index in group]
            self._compute_ahead(asked)
            for index, output in zip(group, self._generate(asked, [params[index] for index in group]), strict=True):
                answers[index] = output.outputs[0].text
                self.asked += len(prompts[index])
                self.read += output.num_cached_tokens or 0
                self._count(1)
        return answers

    def _generate(self, prompts: list[list[int]], params: list[Any]) -> list[Any]:
        if not prompts:
            return []
        tokens = [{"prompt_token_ids": prompt} for prompt in prompts]
        return list(self.llm.generate(tokens, params, use_tqdm=False))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two prompts begin with in common."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _params(**more: Any) -> Any:
    """Return settings of a request that scores: vLLM reads the prefix cache for prompt_logprobs only if told to."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True, skip_reading_prefix_cache=False, **more
    )


def _first(output: Any, token: int) -> tuple[float, bool]:
    """Return what a request says of the token after its prompt."""
    completion = output.outputs[0]
    return float(completion.logprobs[0][token].logprob), completion.token_ids[0] == token


def _rest(output: Any, tokens: list[int]) -> tuple[float, bool]:
    """Return what a request says of its prompt's last tokens."""
    steps = output.prompt_logprobs[len(output.prompt_logprobs) - len(tokens) :]
    found = [step[token] for step, token in zip(steps, tokens, strict=True)]
    return float(sum(one.logprob for one in found)), all(one.rank == 1 for one in found)
