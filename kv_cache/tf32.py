"""Whether CUDA multiplies float32 matrices in TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let CUDA multiply float32 matrices in TF32, or not, for the duration of the context.

    TF32 keeps 11 bits of each factor and sums in float32: more than a bfloat16 model's own 8, too few for the second
    moments of keys.
    """
    settings = torch.backends.cuda.matmul
    before, settings.allow_tf32 = settings.allow_tf32, allowed
    try:
        yield
    finally:
        settings.allow_tf32 = before
