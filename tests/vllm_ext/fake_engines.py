"""Engines' configurations that no engine was started with, and scales for them."""

import dataclasses
from types import SimpleNamespace

from kv_cache.scales import KVScales
from tests.kv_cache.random_scales import random_scales


def some_scales(layers=3, heads=4, dim=64):
    made = [random_scales(heads, dim) for _ in range(layers)]
    return KVScales([dataclasses.replace(layer, rotary=made[0].rotary) for layer in made])


def arch(heads, dim, count):
    return [SimpleNamespace(total_num_kv_heads=heads, head_size=dim)] * count


def fake_config(**extra):
    model = SimpleNamespace(get_total_num_hidden_layers=lambda: 3, model_arch_config=arch(4, 64, 3))
    return SimpleNamespace(model_config=model, additional_config=dict(extra))
