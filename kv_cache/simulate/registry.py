"""The coders that the study knows, by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS, PLANES, KVFormat
from kv_cache.simulate.coder import Coder
from kv_cache.simulate.ours import Ours
from kv_cache.simulate.per_token_head import Int4PerTokenHead, PerTokenHead
from kv_cache.simulate.plain import Plain
from kv_cache.simulate.turboquant import TurboQuant

OURS, VARIED, VLLM, PAPERS, PLAIN = "ours", "ours, varied", "vLLM's", "papers", "uncompressed"


@dataclass(frozen=True)
class Entry:
    """A coder that can be made.

    Attributes:
        family: one of the five above.
        make: makes a fresh one.

    """

    family: str
    make: Callable[[], Coder]


def _entries() -> dict[str, Entry]:
    found = {"bf16": Entry(PLAIN, partial(Plain, torch.bfloat16))}
    found |= {fmt.name: Entry(OURS, partial(Ours, fmt)) for fmt in all_formats()}
    found |= {
        "fp8": Entry(VLLM, partial(Plain, torch.float8_e4m3fn)),
        "fp8_per_token_head": Entry(VLLM, partial(PerTokenHead, torch.float8_e4m3fn)),
        "int8_per_token_head": Entry(VLLM, partial(PerTokenHead, torch.int8)),
        "int4_per_token_head": Entry(VLLM, Int4PerTokenHead),
    }
    for name, key_bits, value_bits in (("k8v4", 8, 4), ("4bit_nc", 4, 4), ("k3v4_nc", 3, 4), ("3bit_nc", 3, 3)):
        found[f"turboquant_{name}"] = Entry(VLLM, partial(TurboQuant, key_bits, value_bits))
        found[f"turboquant_{name}_all"] = Entry(VLLM, partial(TurboQuant, key_bits, value_bits, boundary=0))
    return found


def all_formats() -> list[KVFormat]:
    """Return a format for each pair of bits, the served dtypes under their own names."""
    served = {(fmt.key_bits, fmt.value_bits): fmt for fmt in FORMATS.values()}
    pairs = [(key, value) for key in PLANES for value in PLANES]
    return [served.get(pair) or KVFormat("k{}v{}_per_head".format(*pair), *pair) for pair in pairs]


ENTRIES: dict[str, Entry] = _entries()


def chosen(patterns: list[str]) -> list[str]:
    """Return the names that match any of some shell patterns, in the registry's order.

    Raises:
        ParetoError: a pattern matches none; the message lists the names.

    """
    for pattern in patterns:
        if not fnmatch.filter(ENTRIES, pattern):
            raise ParetoError(f"no coder is named {pattern!r}; coders: {', '.join(ENTRIES)}")
    return [name for name in ENTRIES if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
