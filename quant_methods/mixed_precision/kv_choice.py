"""``KVChoice``: what a compression does to give each layer's KV cache bits of its own, once the scales are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kv_cache.errors import ParetoError
from kv_cache.scales import KVScales
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.kv_observer import kv_geometry, kv_shapes, unserved_kv
from quant_methods.calibration.served import Served
from quant_methods.mixed_precision.kv_budget import KVAssignment, KVBudget, assign, widths
from quant_methods.mixed_precision.kv_plot import plot
from quant_methods.mixed_precision.kv_sensitivity import KVSensitivity, KVSettings
from quant_methods.recipe import Recipe

SCHEMA = "vllm-pareto/kv-bits/1"
JSON_FILE, PLOT_FILE = "pareto_kv_bits.json", "pareto_kv_bits.png"


@dataclass(frozen=True)
class KVChoice:
    """A budget of the KV cache, and how it is spent.

    Attributes:
        budget: the limit.
        settings: how losses are measured.
        chosen: told the assignment, and the KL divergence that was measured with it in the median sequence, nats a
            token.

    """

    budget: KVBudget
    settings: KVSettings = field(default_factory=KVSettings)
    chosen: Callable[[KVAssignment, float], None] = lambda assignment, kl: None

    def check(self, decoder: Decoder, recipe: Recipe) -> None:
        """Refuse, before any work, what cannot be.

        Args:
            decoder: the model.
            recipe: what is carried out.

        Raises:
            ParetoError: the recipe makes no KV scales, no quantized KV cache serves the model, or the budget cannot be
                met.

        """
        if not recipe.kv_scales:
            raise ParetoError(
                f"--kv-budget chooses bits for KV scales, and recipe {recipe.name} makes none: it has kv_scales: false"
            )
        if reason := unserved_kv(decoder.base, decoder.config):
            raise ParetoError(f"--kv-budget {self.budget.text}: a quantized KV cache does not serve {reason}")
        shapes = {shape and (shape.num_kv_heads, shape.head_dim) for shape in kv_shapes(decoder.base, decoder.config)}
        if len(shapes) > 1:
            raise ParetoError(
                f"--kv-budget {self.budget.text} needs layers that are alike, and some of this model's have other "
                "heads or no keys of their own: serve it in a dtype of the same bits for all, such as int4_per_head"
            )
        self.budget.check(kv_geometry(decoder.config)[2])

    def __call__(self, model: Served, scales: KVScales, name: str, folder: Path, key: str) -> dict[str, bytes]:
        """Choose the bits and enter them into the scales.

        Args:
            model: as it will be served.
            scales: its KV scales, which gain bits.
            name: of the model and its recipe, for the plot and the record.
            folder: for what an interrupted measurement left.
            key: SHA-256 of what the model was made from.

        Returns:
            Files to put beside the weights, by name.

        """
        measuring = KVSensitivity(
            model, scales, widths(scales.head_dim), settings=self.settings, folder=folder, key=key
        )
        assignment = assign(measuring.measure(), scales.head_dim, self.budget)
        measured = measuring.joint(assignment.bits)
        scales.bits = assignment.bits
        scales.metadata["kv_budget"] = self.budget.text
        self.chosen(assignment, measured)
        document = {
            "schema": SCHEMA,
            "model": name,
            "budget": self.budget.text,
            "settings": asdict(self.settings),
            "tokens": measuring.tokens.numel(),
            "measured_kl": measured,
            **assignment.to_dict(),
        }
        return {
            JSON_FILE: (json.dumps(document, indent=2) + "\n").encode(),
            PLOT_FILE: plot(assignment, f"{name}, KV budget {self.budget.text}"),
        }
