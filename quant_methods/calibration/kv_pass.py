"""One pass through a model that calibrates the scales of its KV cache: which text, and block after block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kv_cache.calibration import KVCalibrator
from kv_cache.errors import ParetoError
from kv_cache.rotary import Rotary
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.kv_observer import kv_shapes
from quant_methods.calibration.text_source import load_sequences, load_tokenizer

SHIPPED = Path(__file__).parent / "text"
"""The text that ships with this package; NOTICE there says whence each part is."""
FIRST_TOKENS = 256
"""Sequences of one token that say what keys at position 0 are like."""


def first_of_completions(tokenizer: Any) -> int | None:
    """Return the token that a tokenizer puts before every text, None if it puts none."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return int(whole[0]) if len(whole) > len(plain) and whole[0] != plain[0] else None


def first_of_chats(tokenizer: Any) -> int | None:
    """Return the token that a chat starts with, None if there is no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    # A template is a program; one that refuses so short a chat says nothing about its first token.
    with contextlib.suppress(Exception):
        text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        return int(tokenizer(text, add_special_tokens=False)["input_ids"][0])
    return None


def first_tokens(tokenizer: Any, tokens: Tensor, seed: int) -> Tensor:
    """Return which tokens requests start with, int64 [FIRST_TOKENS, 1].

    The key of a sequence's first token depends on that token alone. It is a constant where the tokenizer adds a token,
    and for chats; a completion without an added token may start with any. Half of the tokens stand for completions,
    half for chats, if the model has a chat template.

    Args:
        tokenizer: the model's.
        tokens: int64, calibration text, which completions' first tokens are drawn from.
        seed: of the draw.

    """
    chosen = torch.randint(tokens.numel(), (FIRST_TOKENS,), generator=torch.Generator().manual_seed(seed))
    found = tokens.flatten()[chosen]
    if (added := first_of_completions(tokenizer)) is not None:
        found[:] = added
    if (chat := first_of_chats(tokenizer)) is not None:
        found[: FIRST_TOKENS // 2] = chat
    return found[:, None]


def shipped_sequences(tokenizer: Any, num: int, length: int) -> Tensor:
    """Return windows of the text that ships with this package, taken from its kinds in turn, spread over each evenly.

    Args:
        tokenizer: the model's.
        num: how many windows, if the text has as many.
        length: tokens of each, with the token that the tokenizer adds in front, if any.

    Returns:
        int64 [at most num, length].

    """
    added = first_of_completions(tokenizer)
    front = [] if added is None else [added]
    step = length - len(front)
    kinds = []
    for path in sorted(SHIPPED.glob("*.txt")):
        ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
        count, room = round(len(ids) / step), len(ids) - step
        starts = [turn * room // max(1, count - 1) for turn in range(count)] if room >= 0 else []
        kinds.append([front + ids[at : at + step] for at in starts])
    rows = [kind[turn] for turn in range(max(map(len, kinds))) for kind in kinds if turn < len(kind)]
    if not rows:
        raise ParetoError(f"the text that ships with this package has no {length} tokens in a row; give --text")
    return torch.tensor(rows[:num], dtype=torch.int64)


def kv_sequences(model_dir: Path, text: Path | None, num: int, length: int, seed: int = 0) -> Tensor:
    """Return the sequences that KV scales are calibrated on, int64 [n, length], each as a request would start.

    Args:
        model_dir: the model's directory.
        text: a text of the user's (``load_sequences``); None: the one that ships with this package.
        num: how many; of the shipped text at most as many as there are.
        length: tokens of each.
        seed: which part of a text of the user's (``load_sequences``); the shipped one is small and taken as it is.

    Raises:
        ParetoError: there is no usable tokenizer, or the text is too short.

    """
    tokenizer = load_tokenizer(model_dir)
    if text is None:
        return shipped_sequences(tokenizer, num, length)
    tokens = load_sequences(model_dir, text, num, length, seed)
    if (added := first_of_completions(tokenizer)) is not None:
        tokens[:, 0] = added
    return tokens


class KVPass:
    """What a pass through a model's blocks carries along for its KV scales."""

    def __init__(self, decoder: Decoder, model_dir: Path, tokens: Tensor, seed: int) -> None:
        """Prepare for a model.

        Args:
            decoder: the model.
            model_dir: its directory, for the tokenizer.
            tokens: int64, the calibration sequences, [sequences, length].
            seed: of what is drawn.

        """
        self.decoder = decoder
        self.calibrator = KVCalibrator(kv_shapes(decoder.base, decoder.config), seed=seed)
        self.firsts = decoder.embed(first_tokens(load_tokenizer(model_dir), tokens, seed))
        self.last = max(index for index, shape in enumerate(self.calibrator.shapes) if shape is not None)
        self._variants: dict[Rotary, tuple[Rotary, ...]] = {}

    def advance(self, index: int, block: torch.nn.Module, hidden: Tensor) -> None:
        """Run a block as ``Decoder.advance`` does, seen by the calibrator; the last one no further than needed.

        A layer without scales, of linear attention for example, runs unseen.
        """
        shape = self.calibrator.shapes[index]
        if shape is None:
            for states in (hidden, self.firsts):
                self.decoder.advance(index, block, states)
            return
        self.calibrator.turned_by(index, self._rotary_of(index, block, shape.rotary))
        step = self.decoder.watch if index == len(self.decoder.blocks) - 1 else self.decoder.advance
        for states in (hidden, self.firsts):
            step(index, block, states, self.calibrator)

    def _rotary_of(self, index: int, block: torch.nn.Module, known: Rotary) -> Rotary:
        """Return how a layer turns its keys: of what may be, what makes one token's keys alike wherever it stands.

        Configurations do not say in one way which layers turn nothing (Cohere 2, SmolLM3), nor which pairs of channels
        turn together. A token that is repeated has the same key everywhere but for its position, in any layer.
        """
        if known not in self._variants:
            other = replace(known, interleaved=not known.interleaved)
            nothing = Rotary.over(2 * known.inv_freq.numel(), None, known.max_position)
            self._variants[known] = (known, other, nothing) if known.rotated else (known,)
        if len(self._variants[known]) == 1:
            return known
        seen = _Keys()
        self.decoder.watch(index, block, self.firsts[:1].expand(1, PROBED, -1).contiguous(), seen)
        positions = torch.arange(PROBED, device=seen.key.device)

        def spread(rotary: Rotary) -> float:
            back = rotary.turn(seen.key, -positions)
            return float((back - back[:1]).square().mean())

        return min(self._variants[known], key=spread)


PROBED = 32
"""Tokens of the sequence that shows how a layer turns its keys."""


class _Keys:
    """Keeps the keys of the first sequence that it is shown, float32 [tokens, heads, head_dim]."""

    key: Tensor

    def observe(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> None:
        self.key = key[0].float()


def calibrate(
    decoder: Decoder,
    model_dir: Path,
    tokens: Tensor,
    seed: int,
    progress: Callable[[int, str], object] = lambda done, what: None,
) -> KVCalibrator:
    """Show a calibrator the attention of all blocks and return it.

    Args:
        decoder: the model.
        model_dir: its directory, for the tokenizer.
        tokens: int64 [sequences, length].
        seed: of what is drawn.
        progress: told how many blocks are finished, and what happens now.

    """
    progress(0, "embedding")
    hidden = decoder.embed(tokens)
    found = KVPass(decoder, model_dir, tokens, seed)
    total = found.last + 1  # what comes behind has no scales to make
    # The next block is read while this one runs: from a disk, reading takes the longer time of the two.
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(decoder.read_block, 0)
        for index in range(total):
            progress(index, f"block {index + 1}/{total}")
            state = coming.result()
            if index + 1 < total:
                coming = reader.submit(decoder.read_block, index + 1)
            with decoder.loaded(index, state) as block:
                del state
                found.advance(index, block, hidden)
    return found.calibrator
