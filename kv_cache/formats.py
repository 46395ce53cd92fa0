"""The quantized KV-cache dtypes: names, bits, granularity of their scales, and bytes per token.

A code is an unsigned integer of ``bits`` bits. An element x of a key or value is stored as
``code = clamp(round(x / scale + zero), 0, 2**bits - 1)`` and read as ``(code - zero) * scale``, where ``zero`` is a
real number (it is folded into queries and outputs, so it need not be an integer). Where scale and zero come from is
the format's granularity:

- ``head``: one vector over the channels for each KV head of each layer, calibrated offline, kept outside the page; for
  4-bit keys with a transform, a centre and feedback on top (kv_cache/scales.py).
- ``tensor``: one number for a layer's keys and one for its values, calibrated offline; the ablation's coarse end.
- ``group``: computed when a token is written, for each group of ``group_size`` channels, kept inside the page as
  float16 scale and float16 minimum; the ablation's fine end.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from kv_cache.errors import ParetoError

Granularity = Literal["head", "tensor", "group"]
HEAD_SIZES = (64, 80, 96, 128, 256)
GROUP_META_BYTES = 4
"""Bytes of one group's float16 scale and float16 minimum."""


@dataclass(frozen=True)
class KVFormat:
    """One KV-cache dtype.

    Attributes:
        name: what ``--kv-cache-dtype`` takes.
        key_bits: bits of a key element's code: 4, 6 or 8.
        value_bits: bits of a value element's code: 4, 6 or 8.
        granularity: what shares a scale (see the module's docstring).
        group_size: channels that share a scale when granularity is ``group``; 0 otherwise.

    """

    name: str
    key_bits: int
    value_bits: int
    granularity: Granularity
    group_size: int = 0

    @property
    def static(self) -> bool:
        """Whether scales are calibrated offline and kept outside the page."""
        return self.granularity != "group"

    def groups(self, head_dim: int) -> int:
        """Return how many scales one token's key (or value) of one head keeps in the page."""
        return 0 if self.static else -(-head_dim // self.group_size)

    def bytes_per_token(self, head_dim: int) -> int:
        """Return the bytes that one token's key and value take in the page of one KV head."""
        codes = head_dim * (self.key_bits + self.value_bits) // 8
        return codes + 2 * self.groups(head_dim) * GROUP_META_BYTES

    def bits_per_element(self, head_dim: int) -> float:
        """Return the bits that one element costs in the page, scales kept in the page included."""
        return float(Fraction(self.bytes_per_token(head_dim) * 8, 2 * head_dim))

    def compression_ratio(self, head_dim: int, element_bytes: int = 2) -> float:
        """Return how many times smaller a page is than one of ``element_bytes`` per element."""
        return 2 * head_dim * element_bytes / self.bytes_per_token(head_dim)


FORMATS: dict[str, KVFormat] = {
    fmt.name: fmt
    for fmt in (
        KVFormat("int8_per_head", 8, 8, "head"),
        KVFormat("int6_per_head", 6, 6, "head"),
        KVFormat("int4_per_head", 4, 4, "head"),
        KVFormat("k8v4_per_head", 8, 4, "head"),
        KVFormat("int8_per_tensor", 8, 8, "tensor"),
        KVFormat("int4_per_tensor", 4, 4, "tensor"),
        KVFormat("int8_per_group", 8, 8, "group", 32),
        KVFormat("int4_per_group", 4, 4, "group", 32),
    )
}


def get_format(name: str) -> KVFormat:
    """Return the format of that name.

    Raises:
        ParetoError: there is none; the message lists the valid names.

    """
    try:
        return FORMATS[name]
    except KeyError:
        raise ParetoError(f"unknown KV-cache format {name!r}; valid formats: {', '.join(FORMATS)}") from None
