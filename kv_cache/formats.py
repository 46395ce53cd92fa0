"""The quantized KV-cache dtypes: names, bits, how a code's bits lie in planes, and bytes per token.

All dtypes code alike and differ in bits only. A token's key or value of one head is first made even by what is static
(kv_cache/scales.py): keys lose their centre and are transformed, values are mixed by a Hadamard matrix. Its channels
then share one scale and one zero, which the token's own range determines and which lie in the page, a byte each.
Two dimensions of scales, static ones across channels and dynamic ones across tokens, are what WKVQuant (Yue et al.
2024, section 3.3) calls two-dimensional quantization. kv_cache/codec.py has the arithmetic.

A code of b bits is split into bit planes (`PLANES`), each of 1, 2, 4 or 8 bits, so that every plane unpacks with shifts
and masks. Layout, codec, C and CUDA follow from that table.
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_cache.errors import ParetoError

HEAD_SIZES = (64, 80, 96, 128, 256)
"""The head sizes that there are kernels for."""

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}
"""The widths of the planes that a code of so many bits is split into, from its lowest bits to its highest."""

RANGE_SHARE = {2: 0.8, 3: 0.92, 4: 0.98, 6: 1.0, 8: 1.0}
"""The share of a token's range that codes of so many bits cover: few bits spend better what a rare clip costs."""

GAIN = {2: 1.028, 3: 1.01, 4: 1.0025, 6: 1.0, 8: 1.0}
"""What numbers are multiplied by before they are rounded to codes of so many bits, and not divided by afterwards.

Clipped numbers are read too small. With the others read too large by as much, a vector's product with what is read of
it is on average its square, as EDEN (Vargaftik et al. 2022) asks of each vector. The figures are those of normally
distributed numbers, between head sizes 64 and 128. KL of 3-bit codes on SmolLM2, 12 windows of 1,024 tokens: 0.0456
without, 0.0431 with 1.012, 0.0528 with 1.03, 0.0413 with an exact gain for each token, which no byte can hold.
"""

META_BYTES = 4
"""Bytes that a token of one head keeps beside its codes: scale and zero of its key, scale and zero of its value."""


def unserved_head_size(size: int) -> str | None:
    """Return what to call heads of a size that no kernel serves, for the end of "... does not serve"; else None."""
    return None if size in HEAD_SIZES else f"head size {size} (it serves {', '.join(map(str, HEAD_SIZES))})"


@dataclass(frozen=True)
class KVFormat:
    """One KV-cache dtype, or what one layer of ``mixed_per_head`` has.

    Attributes:
        name: what ``--kv-cache-dtype`` takes.
        key_bits: bits of a key element's code, one of ``PLANES``.
        value_bits: bits of a value element's code, one of ``PLANES``.

    Raises:
        ParetoError: a number of bits that no planes are there for.

    """

    name: str
    key_bits: int
    value_bits: int

    def __post_init__(self) -> None:
        for bits in (self.key_bits, self.value_bits):
            if bits not in PLANES:
                raise ParetoError(
                    f"{self.name}: codes of {bits} bits are not served (only {', '.join(map(str, PLANES))})"
                )

    def bits(self, kind: str) -> int:
        """Return the bits of a code of "key" or "value"."""
        return self.key_bits if kind == "key" else self.value_bits

    def bytes_per_token(self, head_dim: int) -> int:
        """Return the bytes that one token's key and value take in the page of one KV head."""
        return head_dim * (self.key_bits + self.value_bits) // 8 + META_BYTES

    def bits_per_element(self, head_dim: int) -> float:
        """Return the bits that one element costs in the page, scales and zeros included."""
        return self.bytes_per_token(head_dim) * 8 / (2 * head_dim)

    def compression_ratio(self, head_dim: int, element_bytes: int = 2) -> float:
        """Return how many times smaller a page is than one of ``element_bytes`` per element."""
        return 2 * head_dim * element_bytes / self.bytes_per_token(head_dim)


FORMATS: dict[str, KVFormat] = {
    fmt.name: fmt
    for fmt in (
        KVFormat("int8_per_head", 8, 8),
        KVFormat("int6_per_head", 6, 6),
        KVFormat("int4_per_head", 4, 4),
        KVFormat("k4v3_per_head", 4, 3),
        KVFormat("int3_per_head", 3, 3),
    )
}
"""The dtypes whose layers all have the same bits."""

MIXED = "mixed_per_head"
"""The dtype whose layers have bits of their own, which the checkpoint's KV scales name."""

DTYPES = (*FORMATS, MIXED)
"""Every name that ``--kv-cache-dtype`` gains."""


def layer_format(key_bits: int, value_bits: int) -> KVFormat:
    """Return the format of a layer of ``mixed_per_head``, whose name says its bits: ``mixed_k4v3``.

    Raises:
        ParetoError: a number of bits that no planes are there for.

    """
    return KVFormat(f"mixed_k{key_bits}v{value_bits}", key_bits, value_bits)


LAYER_FORMATS: dict[str, KVFormat] = {
    fmt.name: fmt for fmt in (layer_format(key_bits, value_bits) for key_bits in PLANES for value_bits in PLANES)
}
"""What the layers of ``mixed_per_head`` can have."""

CODED = frozenset((*DTYPES, *LAYER_FORMATS))
"""Every name that an engine, or one of its layers, can have for a dtype of ours."""


def get_format(name: str) -> KVFormat:
    """Return the format of that name, or of a layer of ``mixed_per_head``.

    Raises:
        ParetoError: there is none, or its layers differ; the message lists the valid names.

    """
    if name == MIXED:
        raise ParetoError(f"{MIXED} has bits of its own for each layer: ask KVScales.format for a layer's")
    found = FORMATS.get(name) or LAYER_FORMATS.get(name)
    if found is None:
        raise ParetoError(f"unknown KV-cache format {name!r}; valid formats: {', '.join(DTYPES)}")
    return found
