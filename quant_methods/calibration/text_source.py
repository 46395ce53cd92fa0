"""Token sequences for calibration and evaluation: from a text file, or sampled from the model itself.

Text: each document is encoded with the special tokens that the model's tokenizer adds by itself (for most, a
beginning-of-sequence token in front), the documents are concatenated in file order and cut into windows of ``length``
tokens, of which the first ``num`` are taken. Only a window that starts with a document therefore starts with that
token. Both splits read a file alike: give calibration and evaluation two different files.

No text: the model writes its own. Sequences start from the beginning-of-sequence token and are sampled at
temperature 1 with a seed that depends on the split, so calibration and evaluation differ. Text that a model finds
likely is what its quantized version must reproduce (Liu et al., "LLM-QAT", 2023, section 3.1, calibrates so), and it
needs no data set. The samples are cached under the model's fingerprint.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from kv_cache.atomic import write_bytes
from kv_cache.errors import ParetoError
from kv_cache.user_cache import cache_dir
from quant_methods.model_source import fingerprint, read_config
from quant_methods.progress import Lines
from quant_methods.threads import few_threads

Split = Literal["calibration", "evaluation"]
SPLITS: tuple[Split, ...] = ("calibration", "evaluation")
SAMPLED = "sampled from the model"
"""What checkpoints call text that the model wrote."""
# Sequences sampled side by side. Part of what determines the samples: each batch has its own seed.
SAMPLE_BATCH = 32

Progress = Callable[[int, int], None]
"""Called with (positions sampled, positions in all)."""


def load_sequences(
    model_dir: Path,
    text: Path | None,
    num: int,
    length: int,
    seed: int = 0,
    split: Split = "calibration",
    device: str = "cpu",
    progress: Progress | None = None,
) -> torch.Tensor:
    """Return token sequences.

    Args:
        model_dir: the model's directory (its tokenizer encodes the text; it samples when there is none).
        text: a ``.txt`` file, or a ``.jsonl`` file whose lines have a ``text`` or a ``messages`` field; None to sample.
        num: number of sequences.
        length: tokens in each.
        seed: seed of the sampling. With a text, 0 takes its beginning, for evaluation always; any other seed takes the
            documents in another order, or the text from another place on, so that runs differ by their calibration.
        split: which of two disjoint sets of samples.
        device: where to sample.
        progress: told how far the sampling is; None shows a progress bar.

    Returns:
        int64 [num, length], on the CPU.

    Raises:
        ParetoError: the file is missing, empty, malformed, or too short.

    """
    if split not in SPLITS:
        raise ParetoError(f"unknown split {split!r}; splits: {', '.join(SPLITS)}")
    if num < 1 or length < 2:
        raise ParetoError(f"need at least 1 sequence of at least 2 tokens, got {num} of {length}")
    context = read_config(model_dir).get("max_position_embeddings")
    if split == "calibration" and isinstance(context, int) and length > context:
        raise ParetoError(
            f"{model_dir}: sequences of {length} tokens exceed the model's context of {context}; give "
            f"--calibration-length {context} or less"
        )
    if text is None:
        return _sampled(model_dir, num, length, seed, split=split, device=device, progress=progress)
    return _windows(model_dir, Path(text), num, length, split, seed if split == "calibration" else 0)


def read_documents(text: Path) -> Iterator[str | list[dict[str, Any]]]:
    """Yield the documents of a text file in file order (a ``.txt`` file is one document): strings, or chats' messages.

    A byte order mark, which some editors write first, is no part of the text.

    Raises:
        ParetoError: the file cannot be read, is of another type, or has a line with neither a ``text`` nor a
            ``messages`` field.

    """
    if text.suffix not in (".txt", ".jsonl"):
        raise ParetoError(f"{text}: expected a .txt file, or a .jsonl file with a 'text' or a 'messages' field")
    try:
        with text.open(encoding="utf-8-sig") as file:
            if text.suffix == ".txt":
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    given = json.loads(line)
                    document = given["text"] if "text" in given else given["messages"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ParetoError(
                        f"{text}, line {number}: not a JSON object with a 'text' or a 'messages' field"
                    ) from error
                if "text" not in given:
                    if not _is_chat(document):
                        raise ParetoError(
                            f"{text}, line {number}: 'messages' is not a list of objects with 'role' and 'content'"
                        )
                elif not isinstance(document, str):
                    raise ParetoError(f"{text}, line {number}: 'text' is not a string")
                yield document
    except OSError as error:
        raise ParetoError(f"{text}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ParetoError(f"{text}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _is_chat(document: Any) -> bool:
    """Return whether a value is a list of messages."""
    return (
        isinstance(document, list)
        and bool(document)
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in document)
    )


def _encode_chat(tokenizer: Any, messages: list[dict[str, Any]], text: Path) -> list[int]:
    """Return a chat's tokens as the model's template writes it; the template adds special tokens, so nothing else does.

    Raises:
        ParetoError: there is no template, or it refuses the messages.

    """
    if not tokenizer.chat_template:
        raise ParetoError(
            f"{text} holds chats ('messages'), and the model has no chat template to write them with; give lines with "
            "a 'text' field"
        )
    try:
        written = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # A template is a program of the model's, and may raise anything.
        reason = " ".join(str(error).split())[:160]
        raise ParetoError(
            f"{text}: the model's chat template refuses the chat {str(messages)[:60]}: {reason}"
        ) from error
    return list(tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"])


def load_tokenizer(model_dir: Path) -> Any:
    """Return the model's tokenizer.

    Raises:
        ParetoError: the directory has none.

    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError, KeyError) as error:
        raise ParetoError(f"{model_dir}: no usable tokenizer ({' '.join(str(error).split())[:160]})") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' notices and progress bars off the terminal, where this project draws its own."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _windows(model_dir: Path, text: Path, num: int, length: int, split: Split, seed: int) -> torch.Tensor:
    tokenizer = load_tokenizer(model_dir)
    needed = num * length
    ids: list[int] = []
    content = False
    documents = read_documents(text)
    if seed and text.suffix == ".jsonl":
        documents = iter(random.Random(seed).sample(known := list(documents), len(known)))
    for document in documents:
        if isinstance(document, str):
            content = content or bool(document.strip())
            ids += tokenizer(document, verbose=False)["input_ids"]
        else:
            content = True
            ids += _encode_chat(tokenizer, document, text)
        if len(ids) >= needed:
            break
    if not content:
        raise ParetoError(f"{text} is empty: no tokens to use for {split}")
    if len(ids) < needed:
        raise ParetoError(f"{text} has {len(ids):,} tokens; {num} x {length} = {needed:,} are needed for {split}")
    start = random.Random(seed).randrange(len(ids) - needed + 1) if seed and text.suffix == ".txt" else 0
    return torch.tensor(ids[start : start + needed], dtype=torch.int64).view(num, length)


def _sampled(
    model_dir: Path, num: int, length: int, seed: int, *, split: Split, device: str, progress: Progress | None
) -> torch.Tensor:
    from safetensors.torch import load_file, save

    # The device and the library version are part of the key: both change which tokens a seed draws.
    key = f"{fingerprint(model_dir)} {num} {length} {seed} {split} {torch.device(device).type} {torch.__version__}"
    path = cache_dir() / "samples" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if path.is_file():
        # A damaged cache entry is sampled again.
        with contextlib.suppress(Exception):
            cached = load_file(path)["tokens"]
            if cached.shape == (num, length):
                return cached
    with contextlib.ExitStack() as stack:
        if progress is None:
            progress = stack.enter_context(_shown(f"sampling {num} x {length} {split} tokens"))
        tokens = sample_sequences(model_dir, num, length, seed, split=split, device=device, progress=progress)
    # A cache that cannot be written costs time, not correctness.
    with contextlib.suppress(OSError):
        write_bytes(path, save({"tokens": tokens}))
    return tokens


@contextlib.contextmanager
def _shown(name: str) -> Iterator[Progress]:
    """Show progress as a bar on a terminal, else as a line every ten seconds."""
    if not sys.stderr.isatty():
        with Lines(name, functools.partial(print, file=sys.stderr, flush=True)) as lines:
            yield lambda done, total: lines.note(f"{done} of {total} steps")
        return
    from rich.progress import Progress as Bar

    from kv_cache.terminal import console

    with Bar(transient=True, console=console(stderr=True)) as bar:
        task = bar.add_task(name)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@torch.no_grad()
def sample_sequences(
    model_dir: Path,
    num: int,
    length: int,
    seed: int,
    *,
    split: Split,
    device: str = "cpu",
    progress: Progress = lambda done, total: None,
) -> torch.Tensor:
    """Sample sequences from the model at temperature 1, end-of-sequence never drawn so that all are full.

    The whole model is loaded in the dtype of its checkpoint; decoding is batched and uses the KV cache.

    Args:
        model_dir: the model's directory.
        num: number of sequences.
        length: tokens in each, the beginning-of-sequence token included.
        seed: together with the split, determines the samples.
        split: ``calibration`` or ``evaluation``.
        device: torch device.
        progress: told how far it is.

    Returns:
        int64 [num, length], on the CPU.

    Raises:
        ParetoError: ``length`` exceeds the model's context, or the model cannot be loaded.

    """
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    config = AutoConfig.from_pretrained(model_dir)
    context = getattr(config, "max_position_embeddings", None)
    if context and length > context:
        raise ParetoError(f"{model_dir}: sequences of {length} tokens exceed the model's context of {context}")
    # bf16 without hardware support is slow on CPUs; float32 samples the same distribution.
    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(device).eval()
    start, banned = _special_tokens(config)
    rows: list[torch.Tensor] = []
    batches = -(-num // SAMPLE_BATCH)
    with few_threads(8 * config.hidden_size):
        for batch in range(batches):
            size = min(SAMPLE_BATCH, num - batch * SAMPLE_BATCH)
            generator = torch.Generator().manual_seed(_derive(seed, split, batch))
            tokens = torch.empty((size, length), dtype=torch.int64)
            tokens[:, 0] = start
            cache = DynamicCache(config=config)
            cache.layers = [_reserved(layer, length) for layer in cache.layers]
            for position in range(1, length):
                latest = tokens[:, position - 1 : position].to(device)
                logits = model(latest, past_key_values=cache, use_cache=True).logits[:, -1].float()
                if banned:
                    logits[:, banned] = -torch.inf
                # Inverse of the distribution function at a number drawn on the CPU, whose generator is the same on
                # every machine; torch.multinomial draws one number a vocabulary entry, most of a small model's time.
                mass = torch.softmax(logits, -1).double().cumsum(-1).cpu()
                drawn = torch.rand((size, 1), generator=generator, dtype=torch.float64) * mass[:, -1:]
                tokens[:, position] = (
                    torch.searchsorted(mass, drawn, right=True).squeeze(1).clamp_(max=mass.shape[1] - 1)
                )
                progress(batch * length + position, batches * length)
            rows.append(tokens)
    return torch.cat(rows)


def _reserved(layer: Any, length: int) -> Any:
    """Return a cache layer that writes into room for ``length`` tokens instead of copying itself for each token.

    Layers of other kinds than transformers' plain one (sliding windows) are returned as they are.
    """
    from transformers.cache_utils import DynamicLayer

    class Reserved(DynamicLayer):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                shape = (*key_states.shape[:2], length)
                self.room = (
                    key_states.new_empty((*shape, key_states.shape[-1])),
                    value_states.new_empty((*shape, value_states.shape[-1])),
                )
            start = self.get_seq_length()
            stop = start + key_states.shape[-2]
            self.room[0][:, :, start:stop] = key_states
            self.room[1][:, :, start:stop] = value_states
            self.keys, self.values = (room[:, :, :stop] for room in self.room)
            return self.keys, self.values

    return Reserved() if type(layer) is DynamicLayer else layer


def _special_tokens(config: Any) -> tuple[int, list[int]]:
    """Return the token to start from and the tokens never to draw."""
    end = config.eos_token_id if config.eos_token_id is not None else []
    banned = list(end) if isinstance(end, (list, tuple)) else [end]
    # Models without a beginning-of-sequence token (Qwen) separate documents by an end token: start from that.
    start = config.bos_token_id if config.bos_token_id is not None else (banned[0] if banned else 0)
    return int(start), [int(token) for token in banned]


def _derive(seed: int, split: Split, batch: int) -> int:
    digest = hashlib.sha256(f"{seed} {split} {batch}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def describe(tokens: torch.Tensor, source: str, seed: int) -> dict[str, Any]:
    """Return what a checkpoint says of its sequences [num, length]: their source, number, length, seed and SHA-256."""
    return {
        "source": source,
        "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "num_samples": tokens.shape[0],
        "length": tokens.shape[1],
        "seed": seed,
    }
