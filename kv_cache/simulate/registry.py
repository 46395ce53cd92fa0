"""The coders that the study knows, by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS, PLANES, KVFormat
from kv_cache.simulate.aqua import AquaKV
from kv_cache.simulate.coder import Coder
from kv_cache.simulate.fp4 import NvFp4, UltraQuant
from kv_cache.simulate.kivi import Kivi
from kv_cache.simulate.kvarn import KVarN
from kv_cache.simulate.kvquant import KVQuant
from kv_cache.simulate.low_rank import LowRank, PairedLowRank
from kv_cache.simulate.ours import Ours
from kv_cache.simulate.per_token_head import Int4PerTokenHead, PerTokenHead
from kv_cache.simulate.plain import Plain
from kv_cache.simulate.turboquant import TurboQuant
from kv_cache.simulate.varied import Options, Varied
from kv_cache.simulate.wkvquant import WKVQuant

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


VARIATIONS: list[tuple[int, str, Options]] = [
    (bits, name, options)
    for bits in (4, 3, 2)
    for name, options in (
        ("first1", Options(first=1)),
        ("first4", Options(first=4)),
        ("own_coded", Options(own_coded=True)),
        ("newest128", Options(newest=128)),
        ("no_first_centre", Options(first_centre=False)),
        ("no_transform", Options(transform=False)),
        ("hadamard_only", Options(transform=False, centre=False)),
        ("symmetric", Options(symmetric=True)),
        ("full_range", Options(full_range=True)),
        ("keep_product", Options(keep_product=True)),
        ("lloyd_max", Options(levels=True)),
        ("widest_last", Options(widest_last=True)),
        ("no_mirror", Options(no_mirror=True)),
        ("feedback", Options(feedback=True)),
        ("feedback+first1", Options(feedback=True, first=1)),
    )
]
"""This project's formats done differently: bits, name, options."""


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
    found |= {
        "nvfp4": Entry(VLLM, NvFp4),
        "nvfp4_4over6": Entry(VLLM, partial(NvFp4, four_over_six=True)),
        "ultraquant_4bit": Entry(VLLM, UltraQuant),
    }
    for bits in (2, 4):
        found |= {f"kivi{bits}_g{group}": Entry(PAPERS, partial(Kivi, bits, group)) for group in (32, 64, 128)}
    for bits in (2, 3, 4):
        found[f"kvquant_nuq{bits}"] = Entry(PAPERS, partial(KVQuant, bits, outliers=False))
        found[f"kvquant_nuq{bits}_1%"] = Entry(PAPERS, partial(KVQuant, bits, outliers=True))
    for key_bits, value_bits in ((4, 4), (4, 2), (3, 3), (2, 2)):
        found[f"kvarn_k{key_bits}v{value_bits}_g128"] = Entry(PAPERS, partial(KVarN, key_bits, value_bits))
    found |= {f"wkvquant_{bits}": Entry(PAPERS, partial(WKVQuant, bits)) for bits in (4, 3)}
    found |= {f"aqua_kv_{bits}": Entry(PAPERS, partial(AquaKV, bits)) for bits in (2, 3, 4)}
    for rank in (64, 128):
        found[f"low_rank_{rank}"] = Entry(PAPERS, partial(LowRank, rank))
        found[f"low_rank_{rank}_int4"] = Entry(PAPERS, partial(LowRank, rank, bits=4))
        found[f"low_rank_{rank}_of_pairs"] = Entry(PAPERS, partial(PairedLowRank, rank))
    for bits, name, options in VARIATIONS:
        fmt = KVFormat(f"int{bits}", bits, bits)
        found[f"int{bits}+{name}"] = Entry(VARIED, partial(Varied, fmt, options))
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
