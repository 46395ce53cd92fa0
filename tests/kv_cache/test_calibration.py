"""Calibration of the KV-cache scales: the sums, the positions, and what the scales buy on a real model."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from kv_cache import codec
from kv_cache.calibration import KVCalibrator, LayerShape
from kv_cache.codec import reflect
from kv_cache.errors import ParetoError
from kv_cache.moments import average_over_positions, query_weights
from kv_cache.rotary import Rotary
from kv_cache.scales import TENSORS, KVScales, LayerScales
from kv_cache.tf32 import tf32
from kv_cache.transforms import balanced_transform, hadamard_sums, mirror_to_constant, mixing

INV_FREQ = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
LLAMA = Rotary.over(16, INV_FREQ, 4096)
ROTARIES = {
    "llama": LLAMA,
    "interleaved": Rotary.over(16, INV_FREQ, 4096, interleaved=True),
    "partial": Rotary.over(16, INV_FREQ[:4], 4096),
    "interleaved and partial": Rotary.over(16, INV_FREQ[:4], 4096, interleaved=True),
    "none": Rotary.over(16, None, 4096),
}
WIDE = Rotary.over(32, 1e6 ** (-torch.arange(0, 32, 2) / 32), 4096)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # problems so small are no work for two
    yield
    torch.set_num_threads(threads)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(tokens: int, seed: int = 0, heads: int = 4, kv_heads: int = 2, dim: int = 16):
    return (
        draws(tokens, heads, dim, seed=seed),
        draws(tokens, kv_heads, dim, seed=seed + 1000) * torch.linspace(0.5, 4, dim) + 1,
        draws(tokens, kv_heads, dim, seed=seed + 2000),
    )


def calibrated(sequences, layers: int = 1, **settings) -> KVScales:
    calibrator = KVCalibrator([LayerShape(2, 16, settings.pop("rotary", LLAMA))] * layers, **settings)
    for sequence in sequences:
        for layer in range(layers):
            calibrator.observe(layer, *sequence)
    return calibrator.finish()


def same(first: KVScales, second: KVScales) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(first.layers, second.layers, strict=True)
        for name in TENSORS
    )


def read_back(kind: str, bits: int, x: torch.Tensor, scales: LayerScales, start: int = 0) -> torch.Tensor:
    """Store and read back as kv_cache/codec.py defines it; x is [tokens, heads, head_dim], the first at ``start``."""
    positions = start + torch.arange(len(x))
    y = codec.even_keys(x, scales, positions) if kind == "key" else codec.even_values(x, scales)
    codes, scale, zero = codec.quantize(y, bits)
    read = codec.dequantize(codes, scale, zero, bits)
    return codec.uneven_keys(read, scales, positions) if kind == "key" else codec.uneven_values(read, scales)


# Positions.


def turned_average(root: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """The mean of ``R_p root root^T R_p^T``, one position after the other."""
    total = torch.zeros_like(root)
    for position in range(rotary.max_position):
        columns = rotary.turn(root.mT, position).mT
        total += columns @ columns.mT
    return total / rotary.max_position


@pytest.mark.parametrize("name", ROTARIES)
@pytest.mark.parametrize("count", [1, 2, 777])
def test_the_average_over_positions_is_that_of_turning(name, count):
    known = ROTARIES[name]
    rotary = Rotary(known.inv_freq, count, known.rotated, known.interleaved)
    root = draws(3, 16, 16, seed=1).double()
    expected = turned_average(root, rotary)
    # The embedding's own positions, or as many of another's.
    for found in (average_over_positions(root @ root.mT, rotary), average_over_positions(root @ root.mT, known, count)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_average_holds_near_angle_zero_and_around_full_turns():
    inv_freq = torch.tensor([2 * math.pi, math.pi, 1e-7, 1.01e-7, 1e-7, 0.0])
    rotary = Rotary.over(12, inv_freq, 1000)
    root = draws(1, 12, 12, seed=1).double()
    found = average_over_positions(root @ root.mT, rotary)
    torch.testing.assert_close(found, turned_average(root, rotary), rtol=1e-7, atol=1e-7)


# What errors of keys cost.


def a_window(tokens: int, window: int) -> torch.Tensor:
    """What each of some tokens sees: the last ones, itself included."""
    return torch.ones(tokens, tokens, dtype=torch.bool).tril() & torch.ones(tokens, tokens).triu(1 - window).bool()


SINKS = torch.tensor([1.5, -2.0, 0.3, 4.0])


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
@pytest.mark.parametrize("window", [7, 3])
def test_the_metric_is_the_curvature_of_attention(window, sinks):
    query, key, value = (x.double() for x in qkv(7, dim=8))
    positions = torch.tensor([0, 2, 5, 6])
    mask = a_window(7, window)
    more = {"seen": None if window == 7 else mask[positions], "sinks": sinks}

    def attention(keys):
        logits = torch.einsum("qhd,thd->hqt", query[positions], keys.repeat_interleave(2, 1)) / math.sqrt(8)
        weights = logits.masked_fill(~mask[positions], -math.inf).exp()
        weights = weights / (
            weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.double().exp()[:, None, None])
        )
        return weights @ value.repeat_interleave(2, 1).transpose(0, 1)

    jacobian = torch.autograd.functional.jacobian(attention, key).flatten(0, 2)[:, 1:]  # without the first key
    expected = torch.einsum("othc,othd->hcd", jacobian, jacobian)
    rows = query[positions].unflatten(1, (2, 2)).permute(1, 2, 0, 3).flatten(1, 2)
    weights = query_weights(positions, query[positions], key, value, **more)
    found = torch.einsum("hn,hnc,hnd->hcd", weights, rows, rows) / 8
    torch.testing.assert_close(found, expected)
    # Logits of another scale are those of other queries.
    torch.testing.assert_close(
        query_weights(positions, query[positions], key, value, 0.7, **more),
        query_weights(positions, query[positions] * (0.7 * math.sqrt(8)), key, value, **more),
    )


# Sums against the definition, in float64.

BIASED = torch.zeros(16)
BIASED[[1, 2, 5, 9, 10, 14]] = torch.tensor([60.0, -60.0, 60.0, -60.0, 60.0, -60.0])


def awkward(tokens: int, rotary: Rotary, seed: int):
    """A sequence with what pretrained models have: key biases, a far first key, outliers among the values."""
    query, key, value = qkv(tokens, seed=seed)
    key = draws(tokens, 2, 16, seed=seed + 1) * torch.linspace(0.3, 2, 16) + BIASED
    key[0] = -100.0
    value[tokens // 2, 1, 3] = 500.0
    value[0] *= 0.01
    positions = torch.arange(tokens)
    return rotary.turn(query, positions), rotary.turn(key, positions), value


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("name", ROTARIES)
def test_scales_are_those_of_the_definition(name, window, sinks):
    rotary = ROTARIES[name]
    sequences = [awkward(tokens, rotary, seed) for seed, tokens in enumerate((90, 33, 128))]
    calibrator = KVCalibrator([LayerShape(2, 16, rotary)], queries=128)
    masks = [a_window(len(key), window) if window else None for _, key, _ in sequences]
    for sequence, mask in zip(sequences, masks, strict=True):
        calibrator.observe(0, *sequence, None if mask is None else mask[None, None], sinks)
    found = calibrator.finish().layers[0]
    keys, metric = [], torch.zeros(2, 16, 16, dtype=torch.float64)
    for (query, key, value), mask in zip(sequences, masks, strict=True):
        positions = torch.arange(len(key))
        keys.append(rotary.turn(key.double(), -positions)[1:])
        tensors = (x.double() for x in (query, key, value))
        weights = query_weights(positions, *tensors, seen=mask, sinks=sinks)
        rows = rotary.turn(query.double(), -positions).unflatten(1, (2, 2)).permute(1, 2, 0, 3).flatten(1, 2)
        metric += torch.einsum("hn,hnc,hnd->hcd", weights, rows, rows)
    keys = torch.cat(keys)
    torch.testing.assert_close(found.key_mean, keys.mean(0).float(), rtol=1e-5, atol=1e-4)
    assert (found.key_mean - BIASED).abs().max() < 1
    first = torch.stack([key[0] for _, key, _ in sequences]).mean(0)
    torch.testing.assert_close(found.key_first, first)
    values = torch.cat([value[1:] for _, _, value in sequences])
    torch.testing.assert_close(found.value_size, values.square().mean((0, 2)).sqrt())
    rows = torch.nn.functional.normalize(values.double(), dim=-1)
    mirror = mirror_to_constant(torch.einsum("thc,thd->hcd", rows, rows) / len(rows)).float()
    torch.testing.assert_close(found.value_mirror, mirror, rtol=1e-3, atol=1e-4)
    scattered = keys - keys.mean(0)
    covariance = average_over_positions(torch.einsum("thc,thd->hcd", scattered, scattered) / len(keys), rotary)
    expected = balanced_transform(covariance, average_over_positions(metric, rotary))
    # A transform is known up to the signs and order of its axes before they are mixed; T^T T is not.
    transform, inverse = found.key_transform.double(), found.key_inverse.double()
    wanted = expected.mT @ expected
    error = (transform.mT @ transform - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert error.max() < 0.02
    assert torch.equal(found.key_transform, found.key_transform.bfloat16().float())
    torch.testing.assert_close(inverse @ transform, torch.eye(16).double().expand(2, 16, 16), atol=1e-5, rtol=0)
    spread = (transform @ covariance @ transform.mT).diagonal(dim1=1, dim2=2)
    assert spread.mean(-1).sub(1).abs().max() < 0.02


@pytest.mark.parametrize("name", ROTARIES)
def test_biases_outliers_and_the_first_token_cost_no_codes(name):
    rotary = ROTARIES[name]
    scales = calibrated([awkward(256, rotary, seed) for seed in range(4)], rotary=rotary).layers[0]
    _, key, value = awkward(200, rotary, 77)
    for start in (0, 3000):
        turned = rotary.turn(key, start)
        if start:
            turned = turned[1:]
        error = read_back("key", 4, turned, scales, start + int(start > 0)) - turned
        # Without centres the biases alone would make steps of 120 / 15 units.
        assert error[int(not start) :].square().mean().sqrt() < 0.35
        if not start:
            assert error[0].abs().max() < 1e-3  # the same in every text, so that its centre says all
    error = read_back("value", 4, value, scales) - value
    calm = value.abs().amax((1, 2)) < 400
    assert error[calm].square().mean().sqrt() < 0.2
    assert error[0].abs().max() < 0.02  # a small token's steps are small


def test_short_text_calibrates_long_contexts():
    raw = draws(64, 2, 16) * torch.logspace(-2, 0, 16) + draws(16, seed=5) * 3
    query, _, value = qkv(64)
    positions = torch.arange(64)
    sequence = (LLAMA.turn(query, positions), LLAMA.turn(raw, positions), value)
    errors = {}
    for longest in (64, 4096):
        scales = calibrated([sequence], rotary=Rotary.over(16, INV_FREQ, longest)).layers[0]
        later = LLAMA.turn(raw, positions + 3000)
        errors[longest] = (read_back("key", 4, later, scales, 3000) - later).norm()
    assert errors[4096] < 0.9 * errors[64]


# Transforms.


def correlated(*shape: int, dim: int, seed: int) -> torch.Tensor:
    """A positive definite matrix [*shape, dim, dim] with eigenvalues spread over four decades."""
    axes = torch.linalg.qr(draws(*shape, dim, dim, seed=seed).double()).Q
    return axes @ torch.diag(torch.logspace(-2, 2, dim, dtype=torch.float64)) @ axes.mT


@pytest.mark.parametrize("dim", [16, 80, 96])
def test_a_balanced_transform_evens_out_spread_and_importance(dim):
    assert torch.allclose(mixing(dim) @ mixing(dim).T, torch.eye(dim, dtype=torch.float64))
    assert mixing(dim).abs().max() <= 2**0.5 / dim**0.5 + 1e-12
    covariance, metric = correlated(3, dim=dim, seed=1), correlated(3, dim=dim, seed=2)
    transform = balanced_transform(covariance, metric)
    inverse = torch.linalg.inv(transform)
    spread = (transform @ covariance @ transform.mT).diagonal(dim1=1, dim2=2)
    importance = (inverse.mT @ metric @ inverse).diagonal(dim1=1, dim2=2)
    assert spread.mean(-1).sub(1).abs().max() < 0.02
    for even in (spread, importance):
        assert (even.amax(-1) < 3 * even.amin(-1)).all()
    # The cost of equal steps, against that of a step for each channel as it was.
    plain = (covariance.diagonal(dim1=1, dim2=2) * metric.diagonal(dim1=1, dim2=2)).sum(-1)
    assert ((spread * importance).sum(-1) < 0.7 * plain).all()
    # The widest spread moves all channels alike, which a token's zero takes.
    even, alike = transform @ covariance @ transform.mT, torch.full((dim,), dim**-0.5, dtype=torch.float64)
    torch.testing.assert_close(even @ alike, torch.linalg.eigvalsh(even)[:, -1:] * alike, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("dim", [16, 80, 96])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_main_direction_of_values_is_mixed_to_a_constant(dim, sign):
    main = torch.nn.functional.normalize(draws(3, dim, seed=dim).double(), dim=-1)
    # The last head's is mixed to a constant as it is: with one of its signs, no difference would be left.
    main[2] = torch.arange(dim) % (dim & -dim) == 0
    main[2] *= sign / main[2].norm()
    noise = correlated(3, dim=dim, seed=3)
    other = noise / noise.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
    mirror = mirror_to_constant(main[..., :, None] * main[:, None] + 1e-9 * other)
    torch.testing.assert_close(mirror.square().sum(-1), torch.full((3,), 2.0).double())
    mixed = hadamard_sums(reflect(main, mirror))
    size = ((dim & -dim) / dim) ** 0.5
    torch.testing.assert_close(mixed, (mixed[:, :1].sign() * size).expand_as(mixed), rtol=0, atol=1e-5)


def test_values_that_are_zeros_have_some_mirror():
    sequence = list(qkv(50))
    sequence[2] = torch.zeros_like(sequence[2])
    mirror = calibrated([tuple(sequence)]).layers[0].value_mirror
    torch.testing.assert_close(mirror.square().sum(-1), torch.full((2,), 2.0))


# What the calibrator takes, keeps and returns.


def test_shapes_and_dtypes():
    scales = calibrated([qkv(50)], layers=3)
    assert len(scales.layers) == 3
    assert scales.bits is None
    shapes = {"key_mean": (2, 16), "key_first": (2, 16), "value_size": (2,), "value_mirror": (2, 16)}
    for layer in scales.layers:
        assert layer.rotary is LLAMA
        for name in TENSORS:
            found = getattr(layer, name)
            assert found.shape == shapes.get(name, (2, 16, 16))
            assert found.dtype == torch.float32
            assert found.isfinite().all()


def test_sequences_of_one_token_alone_say_what_comes_first():
    sequences = [qkv(50, seed=seed) for seed in range(3)]
    alone = [qkv(1, seed=seed) for seed in range(10, 15)]
    without, found = calibrated(sequences), calibrated([*alone[:2], *sequences, *alone[2:]])
    torch.testing.assert_close(found.layers[0].key_first, torch.stack([key[0] for _, key, _ in alone]).mean(0))
    for name in TENSORS:
        if name != "key_first":
            assert torch.equal(getattr(without.layers[0], name), getattr(found.layers[0], name)), name


def test_metadata_is_carried():
    calibrator = KVCalibrator([LayerShape(2, 16, LLAMA)] * 1, seed=5)
    calibrator.observe(0, *qkv(20))
    calibrator.observe(0, *qkv(30))
    metadata = calibrator.finish({"recipe": "kv-scales"}).metadata
    assert metadata == {"recipe": "kv-scales", "calibration_tokens": 50, "calibration_seed": 5}


def test_the_seed_decides_and_the_order_of_layers_does_not():
    sequences = [qkv(200, seed=seed) for seed in range(12)]
    settings = {"layers": 2, "queries": 16}
    first = calibrated(sequences, seed=1, **settings)
    assert same(first, calibrated(sequences, seed=1, **settings))
    assert not same(first, calibrated(sequences, seed=2, **settings))
    calibrator = KVCalibrator([LayerShape(2, 16, LLAMA)] * 2, seed=1, queries=16)
    for layer in (1, 0):
        for sequence in sequences:
            calibrator.observe(layer, *sequence)
    assert same(first, calibrator.finish())


def test_sequences_may_come_together():
    together = KVCalibrator([LayerShape(2, 16, LLAMA)] * 1)
    for tokens, count in ((1, 5), (40, 3)):
        batch = [torch.stack(x) for x in zip(*(qkv(tokens, seed=seed) for seed in range(count)), strict=True)]
        together.observe(0, *batch)
    apart = calibrated([qkv(tokens, seed=seed) for tokens, count in ((1, 5), (40, 3)) for seed in range(count)])
    assert same(apart, together.finish())
    assert together.finish().metadata["calibration_tokens"] == 125


def test_long_sequences_are_looked_at_in_parts(monkeypatch):
    sequences = [qkv(200, seed=seed) for seed in range(3)]
    whole = calibrated(sequences).layers[0]
    monkeypatch.setattr("kv_cache.calibration.MAX_PROBABILITIES", 4 * 200 * 3)
    parts = calibrated(sequences).layers[0]
    torch.testing.assert_close(parts.key_transform, whole.key_transform, rtol=0.02, atol=0.02)


def test_caller_may_reuse_its_tensors():
    buffers = tuple(x.bfloat16() for x in qkv(100))
    expected = calibrated([tuple(x.clone() for x in buffers)])
    calibrator = KVCalibrator([LayerShape(2, 16, LLAMA)] * 1)
    calibrator.observe(0, *buffers)
    for buffer in buffers:
        buffer.zero_()
    assert same(expected, calibrator.finish())


def test_nothing_is_kept_but_sums():
    def kept(calibrator: KVCalibrator) -> int:
        found = [x for x in vars(calibrator._layers[0]).values() if isinstance(x, torch.Tensor)]
        return sum(x.untyped_storage().nbytes() for x in found)

    calibrator = KVCalibrator([LayerShape(2, 16, LLAMA)] * 1)
    calibrator.observe(0, *qkv(1000))
    size = kept(calibrator)
    assert 2 * 2 * 16 * 16 * 8 < size < 4 * 2 * 16 * 16 * 8
    calibrator.observe(0, *qkv(5000, seed=1))
    assert kept(calibrator) == size
    assert not any(isinstance(getattr(calibrator.finish(), f.name), torch.Tensor) for f in fields(KVScales))


def test_keys_that_never_vary_are_read_back():
    query, key, value = qkv(20)
    key[:] = 3.0
    key[0] = 5.0
    scales = calibrated([(query, key, value)], rotary=ROTARIES["none"]).layers[0]
    torch.testing.assert_close(read_back("key", 4, key, scales), key, rtol=1e-4, atol=1e-4)


def test_a_layer_without_data_is_named():
    calibrator = KVCalibrator([LayerShape(2, 16, LLAMA)] * 3)
    calibrator.observe(1, *qkv(10))
    calibrator.observe(2, *qkv(1))
    with pytest.raises(ParetoError, match=r"no keys and values of layer 0, 2 were observed; .* two tokens or more"):
        calibrator.finish()


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_tensors_must_be_finite(which, bad):
    sequence = qkv(10)
    sequence[which][3, 1, 2] = bad
    with pytest.raises(ParetoError, match=f"layer 0: the {('queries', 'keys', 'values')[which]} hold NaN"):
        KVCalibrator([LayerShape(2, 16, LLAMA)] * 1).observe(0, *sequence)


def test_wrong_shapes_are_refused():
    query, key, value = qkv(10)
    calibrator = KVCalibrator([LayerShape(2, 16, LLAMA)] * 1)
    for sequence, message in (
        ((query, key[:, :1], value), "keys"),
        ((query, key, value[:9]), "values"),
        ((query[:, :3], key, value), "multiple of 2 heads"),
        ((query[:9], key, value), "queries"),
        ((query[:0], key[:0], value[:0]), "at least one token"),
        ((query[None, None], key[None, None], value[None, None]), "several sequences"),
        ((query, key[None], value[None]), r"queries .* must be \[1, 10, num_heads, 16\]"),
    ):
        with pytest.raises(ParetoError, match=message):
            calibrator.observe(0, *sequence)
    with pytest.raises(ParetoError, match="no layer 1; the model has 1"):
        calibrator.observe(1, query, key, value)
    with pytest.raises(ParetoError, match="no layer -1"):
        calibrator.observe(-1, query, key, value)


def test_settings_that_cannot_work_are_refused():
    for make in (
        lambda: KVCalibrator([LayerShape(2, 16, LLAMA)], queries=0),
        lambda: KVCalibrator([None, None]),
        lambda: LayerShape(2, 16, Rotary.over(32, INV_FREQ, 100)),
        lambda: LayerShape(0, 16, LLAMA),
    ):
        with pytest.raises(ParetoError, match="KV calibration"):
            make()


def test_layers_may_differ_in_heads_and_rotary_embedding_or_have_none():
    """Each layer's scales are those that a model of such layers alone would have."""
    shapes = [LayerShape(2, 16, LLAMA), None, LayerShape(1, 16, ROTARIES["none"]), LayerShape(2, 32, WIDE)]
    calibrator = KVCalibrator(shapes)
    for index, shape in enumerate(shapes):
        if shape is not None:
            calibrator.observe(index, *qkv(60, kv_heads=shape.num_kv_heads, dim=shape.head_dim))
    found = calibrator.finish()
    assert [found.shape(index) for index in range(4)] == [(2, 16), None, (1, 16), (2, 32)]
    assert not found.uniform
    for index, shape in enumerate(shapes):
        if shape is None:
            continue
        alone = KVCalibrator([None] * index + [shape])
        alone.observe(index, *qkv(60, kv_heads=shape.num_kv_heads, dim=shape.head_dim))
        wanted = alone.finish().layer(index)
        assert found.layer(index).rotary is shape.rotary
        assert all(torch.equal(getattr(found.layer(index), name), getattr(wanted, name)) for name in TENSORS)
    with pytest.raises(ParetoError, match="layer 1 gets no scales, and was observed"):
        calibrator.observe(1, *qkv(9))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sums_as_a_cpu_does():
    """Also where matrices may be multiplied in TF32, and where a model's layers are split between devices."""
    sequences = [awkward(256, LLAMA, seed) for seed in range(4)]
    there = [tuple(x.cuda() for x in sequence) for sequence in sequences]
    expected = calibrated(sequences).layers[0]
    for given in (there, [*there[:2], *sequences[2:]]):
        with tf32(True):
            found = calibrated(given).layers[0]
            assert torch.backends.cuda.matmul.allow_tf32
        for name in ("key_mean", "key_first", "value_size", "value_mirror"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
        square, wanted = (x.key_transform.mT @ x.key_transform for x in (found, expected))
        assert (square - wanted).norm() < 0.01 * wanted.norm()


# A real model.

MODEL = Path(__file__).parents[2] / "quant_methods" / "models" / "ref-7m"


class Spy:
    """Attention that shows its tensors to ``observe`` or replaces keys and values by ``change``'s.

    ``bias`` [layers, KV heads, head_dim] is added to keys before rotary embedding, as Qwen2's key biases are.
    """

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary
        self.observe = self.change = self.bias = None
        self.start = 0

    def __call__(self, module, query, key, value, mask, scaling, **_):
        if self.bias is not None:
            positions = self.start + torch.arange(key.shape[2])
            turned = self.rotary.turn(self.bias[module.layer_idx].expand(len(positions), -1, -1), positions)
            key = key + turned.transpose(0, 1)
        if self.observe is not None:
            for sequence in zip(query, key, value, strict=True):
                self.observe(module.layer_idx, *(x.transpose(0, 1) for x in sequence))
        if self.change is not None:
            key, value = self.change(module.layer_idx, key, value)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None


@pytest.fixture(scope="module")
def model():
    rotary = Rotary.over(64, 500000.0 ** (-torch.arange(0, 64, 2) / 64), 8192)
    spy = Spy(rotary)
    AttentionInterface.register("calibration_spy", spy)
    AttentionMaskInterface.register("calibration_spy", lambda *args, **kwargs: None)
    loaded = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="calibration_spy")
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, rotary.inv_freq)
    with torch.no_grad():
        torch.manual_seed(0)
        llama = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        text = llama.generate(
            torch.zeros(4, 1, dtype=torch.long), max_new_tokens=255, do_sample=True, eos_token_id=None, pad_token_id=1
        )
    return loaded.eval(), spy, text


@torch.no_grad()
def divergences(model, formats: dict[str, tuple[int, int]], start: int) -> dict[str, float]:
    """Return each format's KL divergence, calibrated and measured on text of the model's own, from ``start`` on."""
    llama, spy, text = model
    calibrator = KVCalibrator([LayerShape(2, 64, spy.rotary)] * 6)
    spy.observe, spy.start = calibrator.observe, 0
    llama.model(text[:2], use_cache=False)
    spy.observe, spy.start = None, start
    scales = calibrator.finish()
    where = (start + torch.arange(text.shape[1]))[None].expand(2, -1)

    def run() -> torch.Tensor:
        return llama(text[2:], position_ids=where, use_cache=False).logits.log_softmax(-1)

    expected, found = run(), {}
    for name, (key_bits, value_bits) in formats.items():

        def change(layer, key, value, bits={"key": key_bits, "value": value_bits}):  # noqa: B006
            sides = {"key": key, "value": value}
            return tuple(
                torch.stack(
                    [
                        read_back(kind, bits[kind], one.transpose(0, 1), scales.layer(layer), start).transpose(0, 1)
                        for one in x
                    ]
                )
                for kind, x in sides.items()
            )

        spy.change = change
        found[name] = (expected.exp() * (expected - run())).sum(-1).mean().item()
        spy.change = None
    return found


def test_quality_on_a_real_model_and_its_own_text(model):
    far = divergences(model, {"8": (8, 8), "6": (6, 6), "4": (4, 4), "k4v3": (4, 3), "3": (3, 3)}, 6000)
    near = divergences(model, {"4": (4, 4)}, 0)
    print(far, near)
    assert far["8"] < 0.001
    assert far["6"] < 0.004
    assert far["4"] < 0.02
    assert far["3"] < 0.08
    assert far["8"] < far["6"] < far["4"] < far["k4v3"] < far["3"]
    assert near["4"] < 0.02


def test_key_biases_cost_next_to_nothing(model):
    _, spy, _ = model
    formats = {"8": (8, 8), "6": (6, 6), "4": (4, 4), "3": (3, 3)}
    plain = divergences(model, formats, 0)
    spy.bias = torch.zeros(6, 2, 64)
    # In pairs that turn slowly, where models have them: a constant in the logits then, which softmax takes out.
    spy.bias[..., [27, 29, 31, 59, 61, 63]] = torch.tensor([60.0, -60.0, 60.0, -60.0, 60.0, -60.0])
    biased = divergences(model, formats, 0)
    spy.bias = None
    print(plain, biased)
    for name in formats:
        assert biased[name] < 3 * plain[name] + 1e-4, name
