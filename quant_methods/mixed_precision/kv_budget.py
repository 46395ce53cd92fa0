"""Chooses the bits of every layer's keys and values under a budget of bits an element."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS, META_BYTES, PLANES, layer_format, unserved_head_size
from kv_cache.layout import TOKEN_MULTIPLE, PageLayout
from quant_methods.calibration.kv_codes import KINDS
from quant_methods.mixed_precision.knapsack import solve

Losses = dict[str, dict[int, float]]
"""What one layer loses by codes: by "key" and "value", then by bits."""


@dataclass(frozen=True)
class KVBudget:
    """What the KV cache may take.

    Attributes:
        text: as the user wrote it.
        bits: of an element of keys and values, scales and zeros included, the mean over the layers.

    """

    text: str
    bits: float

    @staticmethod
    def parse(text: str) -> KVBudget:
        """Return the budget that ``3.5bits`` means.

        Raises:
            ParetoError: it means none.

        """
        match = re.fullmatch(r"([0-9]*\.?[0-9]+) ?bits?", text.strip(), re.IGNORECASE)
        if not match:
            raise ParetoError(f"--kv-budget {text!r}: expected the mean bits of a cached element, such as 3.5bits")
        return KVBudget(text.strip(), float(match[1]))

    def check(self, head_dim: int) -> None:
        """Refuse what no choice of bits can meet, or what leaves nothing to choose.

        Raises:
            ParetoError: so, with the budgets that are possible; or the formats do not serve heads of that size.

        """
        found = widths(head_dim)
        low, high = (layer_format(bits, bits).bits_per_element(head_dim) for bits in (found[0], found[-1]))
        if not low <= self.bits <= high:
            raise ParetoError(
                f"--kv-budget {self.text} cannot be met: heads of {head_dim} channels take {low:g}bits to {high:g}bits "
                f"({low - found[0]:g} of them for scales and zeros)"
            )


def widths(head_dim: int) -> tuple[int, ...]:
    """Return the bits that codes of heads of this size can have, in rising order.

    Raises:
        ParetoError: the formats do not serve the size.

    """
    if reason := unserved_head_size(head_dim):
        raise ParetoError(f"--kv-budget: a quantized KV cache does not serve {reason}")
    return tuple(bits for bits in sorted(PLANES) if _served(bits, head_dim))


def _served(bits: int, head_dim: int) -> bool:
    try:
        PageLayout(layer_format(bits, bits), head_dim, TOKEN_MULTIPLE)
    except ParetoError:
        return False
    return True


@dataclass(frozen=True)
class KVAssignment:
    """The chosen bits of every layer.

    Attributes:
        bits: (of keys, of values) of each layer.
        losses: what each layer loses at each width.
        head_dim: channels of a head.

    """

    bits: list[tuple[int, int]]
    losses: list[Losses]
    head_dim: int

    @property
    def bits_per_element(self) -> float:
        """Bits of an element, scales and zeros included, the mean over the layers."""
        return sum(layer_format(*pair).bits_per_element(self.head_dim) for pair in self.bits) / len(self.bits)

    @property
    def predicted(self) -> float:
        """What the choice loses if losses add up, nats a token."""
        return sum(found[kind][bits] for found, pair in zip(self.losses, self.bits, strict=True)
                   for kind, bits in zip(KINDS, pair, strict=True))  # fmt: skip

    def uniform(self) -> dict[str, KVAssignment]:
        """Return the dtypes that give all layers the same bits, as far as they were measured, by name."""
        measured = self.losses[0]["key"]
        return {
            name: KVAssignment([(fmt.key_bits, fmt.value_bits)] * len(self.bits), self.losses, self.head_dim)
            for name, fmt in FORMATS.items()
            if {fmt.key_bits, fmt.value_bits} <= set(measured)
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "bits_per_element": self.bits_per_element,
            "predicted_kl": self.predicted,
            "uniform": {
                name: {"bits_per_element": each.bits_per_element, "predicted_kl": each.predicted}
                for name, each in self.uniform().items()
            },
            "layers": [
                {
                    kind: {"bits": bits, "kl": {str(width): loss for width, loss in found[kind].items()}}
                    for kind, bits in zip(KINDS, pair, strict=True)
                }
                for found, pair in zip(self.losses, self.bits, strict=True)
            ],
        }


def assign(losses: list[Losses], head_dim: int, budget: KVBudget) -> KVAssignment:
    """Choose bits whose losses add up to the least.

    Args:
        losses: of each layer, at all of `widths`.
        head_dim: channels of a head.
        budget: the limit.

    Raises:
        ParetoError: no choice meets the budget.

    """
    budget.check(head_dim)
    # In bytes of a token in one head's page, which are whole: keys and values of a layer are two units.
    capacity = int(budget.bits * 2 * head_dim * len(losses) / 8 + 1e-6) - META_BYTES * len(losses)
    units = [found[kind] for found in losses for kind in KINDS]
    sizes = [[head_dim * bits // 8 for bits in unit] for unit in units]
    picks = solve(sizes, [list(unit.values()) for unit in units], capacity)
    chosen = [list(unit)[pick] for unit, pick in zip(units, picks, strict=True)]
    return KVAssignment(list(zip(chosen[::2], chosen[1::2], strict=True)), losses, head_dim)
