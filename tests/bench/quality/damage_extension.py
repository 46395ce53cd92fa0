"""A worker extension that damages the model in place, so that a test sees whether the measured quality follows."""

import torch

from bench.quality.worker_tap import LogitsTap


class DamagingTap(LogitsTap):
    def pareto_test_damage(self, amount: float) -> None:
        """Multiply the norm weights of every layer by 1 + amount * noise, from the same original each time."""
        layers = self.model_runner.model.model.layers
        generator = torch.Generator().manual_seed(0)
        for layer in layers:
            weight = layer.input_layernorm.weight
            if not hasattr(layer, "pareto_test_original"):
                layer.pareto_test_original = weight.detach().clone()
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.data.copy_(layer.pareto_test_original * (1 + amount * noise))
