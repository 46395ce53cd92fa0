"""Where the codes of a page lie.

vLLM hands a layer's cache to the backend as bytes of logical shape (blocks, KV heads, tokens, bytes per token): the
range of one block and head, ``block_size * bytes_per_token`` bytes, is this format's to fill. It holds planes, one
after the other, each a row-major (tokens, row bytes) matrix:

====================  =========================  =======================================================
plane                 bytes of a token's row     content
====================  =========================  =======================================================
key codes             D or D/2                   8 bits: channel j in byte j. 4 bits: channel j in the low
                                                 nibble of byte j, channel j + D/2 in its high nibble
key high bits         D/4, 6-bit codes only      bits 4 and 5 of the code: channels j, j + D/4, j + D/2,
                                                 j + 3D/4 in bits 0-1, 2-3, 4-5, 6-7 of byte j
value codes           as for keys
value high bits       as for keys
key groups            4 a group, ``group`` only  float16 scale and float16 minimum of each group of channels
value groups          as for keys
====================  =========================  =======================================================

Rows are packed without padding, so that the bytes are exactly those the format's name promises; planes start at
multiples of 16 bytes when the block size is a multiple of 16, and rows do so wherever D * bits / 8 is a multiple of 16.
Splitting nibbles by channel halves lets one mask and one shift yield two runs of consecutive channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_cache.errors import ParetoError
from kv_cache.formats import GROUP_META_BYTES, HEAD_SIZES, KVFormat

TOKEN_MULTIPLE = 16
"""A page's tokens are a multiple of this, which keeps planes 16-byte aligned."""


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
        if self.head_dim not in HEAD_SIZES:
            raise ParetoError(
                f"{self.fmt.name} does not serve head size {self.head_dim} (it serves "
                f"{', '.join(map(str, HEAD_SIZES))}): use --kv-cache-dtype auto"
            )
        if self.block_size % TOKEN_MULTIPLE:
            raise ParetoError(f"{self.fmt.name} needs a --block-size that is a multiple of {TOKEN_MULTIPLE}")

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value in the page of one head."""
        return self.fmt.bytes_per_token(self.head_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes of the page of one head."""
        return self.block_size * self.bytes_per_token

    def row_bytes(self) -> dict[str, int]:
        """Return the bytes of a token's row in each plane, in the planes' order; 0 for a plane that is not there."""
        d, meta = self.head_dim, self.fmt.groups(self.head_dim) * GROUP_META_BYTES
        rows = {}
        for kind, bits in (("key", self.fmt.key_bits), ("value", self.fmt.value_bits)):
            rows[kind] = d if bits == 8 else d // 2
            rows[f"{kind}_high"] = d // 4 if bits == 6 else 0
        return rows | {"key_meta": meta, "value_meta": meta}

    def offsets(self) -> dict[str, int]:
        """Return each plane's offset in bytes from the start of the head's page."""
        result, offset = {}, 0
        for plane, row in self.row_bytes().items():
            result[plane] = offset
            offset += row * self.block_size
        return result
