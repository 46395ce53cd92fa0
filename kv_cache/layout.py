"""Where the codes of a page lie.

vLLM hands a layer's cache to the backend as bytes of logical shape (blocks, KV heads, tokens, bytes per token): the
range of one block and head, ``block_size * bytes_per_token`` bytes, is this format's to fill. It holds planes, one
after the other, each a row-major (tokens, row bytes) matrix:

- the planes of the keys' codes (``formats.PLANES``), from the lowest bits to the highest;
- the planes of the values' codes;
- ``meta``: four bytes a token, the scale and the zero of its key, the scale and the zero of its value.

A plane of w bits has rows of D * w / 8 bytes. Bits k * w .. k * w + w - 1 of byte j are those of channel
``j + k * D * w / 8``: splitting by runs of channels lets one mask and one shift yield a run of consecutive channels.
The plane named ``key.0`` holds the lowest bits of the keys' codes, ``key.1`` those above them.

Rows are packed without padding, so that the bytes are exactly those of the format; planes start at multiples of 16
bytes when the block size is a multiple of 16, and rows do so wherever D * w / 8 is a multiple of 16.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from kv_cache.errors import ParetoError
from kv_cache.formats import META_BYTES, PLANES, KVFormat, unserved_head_size

LAYOUT = 1
"""Raised when the same keys and values become other bytes, here or in the codec. Pages may be kept where an engine of
another version of this package looks for them (vllm_ext/transfer.py)."""
TOKEN_MULTIPLE = 16
"""A page's tokens are a multiple of this, which keeps planes 16-byte aligned."""
META = "meta"
"""The name of the plane of scales and zeros."""


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets of the planes in the page of one KV head.

    Attributes:
        fmt: the format.
        head_dim: channels of a head.
        block_size: tokens of a page.

    Raises:
        ParetoError: a head size or block size that the formats do not serve.

    """

    fmt: KVFormat
    head_dim: int
    block_size: int

    def __post_init__(self) -> None:
        if reason := unserved_head_size(self.head_dim):
            raise ParetoError(f"{self.fmt.name} does not serve {reason}: use --kv-cache-dtype auto")
        # A row of a 1-bit plane is then a whole number of 32-bit words, as which the kernels read it.
        single = [bits for bits in (self.fmt.key_bits, self.fmt.value_bits) if 1 in PLANES[bits]]
        if self.head_dim % 32 and single:
            raise ParetoError(
                f"{self.fmt.name}: codes of {single[0]} bits need a head size that is a multiple of 32, not "
                f"{self.head_dim}: use int4_per_head"
            )
        if self.block_size % TOKEN_MULTIPLE:
            raise ParetoError(f"{self.fmt.name} needs a --block-size that is a multiple of {TOKEN_MULTIPLE}")
        taken = sum(self.row_bytes.values())
        if taken != self.bytes_per_token:
            raise ParetoError(
                f"{self.fmt.name}: planes take {taken} bytes of a token, which has {self.bytes_per_token}"
            )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value in the page of one head."""
        return self.fmt.bytes_per_token(self.head_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes of the page of one head."""
        return self.block_size * self.bytes_per_token

    @functools.cached_property
    def row_bytes(self) -> dict[str, int]:
        """The bytes of a token's row in each plane, in the planes' order."""
        rows = {
            f"{kind}.{index}": self.head_dim * width // 8
            for kind in ("key", "value")
            for index, width in enumerate(PLANES[self.fmt.bits(kind)])
        }
        return rows | {META: META_BYTES}

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """Each plane's offset in bytes from the start of the head's page."""
        result, offset = {}, 0
        for plane, row in self.row_bytes.items():
            result[plane] = offset
            offset += row * self.block_size
        return result
