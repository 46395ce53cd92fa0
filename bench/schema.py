"""Parts of results that several rooms write. ``None`` means that a value is undefined for this run, never zero."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A figure with its uncertainty.

    Attributes:
        value: the point estimate.
        standard_error: its standard error, in the same unit; None when ``n`` is 1.
        low: lower end of the 95% interval; None when ``n`` is 1.
        high: upper end of the 95% interval; None when ``n`` is 1.
        n: independent units behind it: windows of text, or retrieval trials.

    """

    value: float
    standard_error: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class ModelInfo:
    """A checkpoint.

    Attributes:
        name: as the user gave it.
        fingerprint: SHA-256 over its configuration, tokenizer and weights.
        weight_bytes: bytes of all tensors on disk.
        parameters: elements of the unquantized model's tensors; None when no unquantized baseline is known.
        bits_per_weight: ``8 * weight_bytes / parameters``: embeddings, norms and scales count too, so a "4-bit" small
            model is well above 4. None when ``parameters`` is.
        quantization: the checkpoint's own quantization method; None for an unquantized one.

    """

    name: str
    fingerprint: str
    weight_bytes: int
    parameters: int | None
    bits_per_weight: float | None
    quantization: str | None


@dataclass(frozen=True)
class KVCache:
    """The KV cache as vLLM allocated it.

    Attributes:
        dtype: what ``--kv-cache-dtype`` was.
        memory_bytes: bytes of the allocated cache tensors, all layers, all ranks.
        tokens: tokens that vLLM reports to fit. Compare between dtypes only at the same ``budget_bytes``.
        budget_bytes: the memory that vLLM was told to use.
        bytes_per_token: of one token in the pages of all layers and ranks, by the pages' shape: ``tokens`` are whole
            windows, so that ``memory_bytes / tokens`` depends on the window's length.
        bits_per_element: the same for one element of a key or value; None when the model's geometry is unknown.
        block_size: tokens in a page.

    """

    dtype: str
    memory_bytes: int
    tokens: int
    budget_bytes: int
    bytes_per_token: float
    bits_per_element: float | None
    block_size: int
