"""Calibration of the KV-cache scales: the searches, the positions, what is kept, and what it buys on a real model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from kv_cache import codec
from kv_cache.calibration import KVCalibrator
from kv_cache.clip_search import KeyImportance, affine, read_back, search_range
from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS
from kv_cache.rotary import Rotary
from kv_cache.scales import PARTS, TENSORS, KVScales, LayerScales
from kv_cache.transforms import balanced_transform, feedback, mixing

STATIC = [name for name, fmt in FORMATS.items() if fmt.static]
INV_FREQ = 10000.0 ** (-torch.arange(0, 16, 2) / 16)


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


def stored(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Store and read back as kv_cache/formats.py defines it; x is [tokens, heads, head_dim]."""
    return ((x / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale


def read_back_side(scales: KVScales, fmt: str, kind: str, layer: int, x: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Store and read back as kv_cache/codec.py defines it; x is [tokens, heads, head_dim], the first at ``start``."""
    mine, positions = scales.layer(FORMATS[fmt], layer), start + torch.arange(len(x))
    codes = codec.quantize_side(x, mine, kind, getattr(FORMATS[fmt], f"{kind}_bits"), positions)
    return codec.dequantize_side(codes, mine, kind, positions)


def calibrated(sequences, layers: int = 1, **settings) -> KVScales:
    calibrator = KVCalibrator(layers, 2, 16, **settings)
    for sequence in sequences:
        for layer in range(layers):
            calibrator.observe(layer, *sequence)
    return calibrator.finish()


def same(first: KVScales, second: KVScales) -> bool:
    return all(
        torch.equal(getattr(a, tensor), getattr(b, tensor))
        for name in STATIC
        for a, b in zip(first.layers[name], second.layers[name], strict=True)
        for tensor in (*TENSORS, *PARTS)
        if getattr(a, tensor) is not None or getattr(b, tensor) is not None
    )


# The search for a range.


def cubes(sample, weight, low, high, bits):
    return ((read_back(sample, low, high, bits) - sample).abs() ** 3 * weight).sum(0)


@pytest.mark.parametrize("bits", [4, 6])
def test_a_search_beats_the_minimum_and_maximum_of_heavy_tails(bits):
    sample = draws(4000, 8) * draws(4000, 8, seed=1).abs()
    weight = draws(4000, 8, seed=2).square()
    low, high = sample.amin(0), sample.amax(0)
    found = search_range(sample, weight, low, high, bits)
    assert (found[0] >= low).all()
    assert (found[1] <= high).all()
    before, after = cubes(sample, weight, low, high, bits), cubes(sample, weight, *found, bits)
    assert (after <= before * 1.0001).all()
    if bits == 4:
        assert after.sum() < 0.8 * before.sum()


def test_the_ends_are_cut_independently():
    sample = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    sample[7] = 2.0
    low, high = search_range(sample, None, sample.amin(0), sample.amax(0), 4)
    assert 0 <= low.item() < 0.1
    assert 0.9 < high.item() < 1.9


def test_an_important_outlier_is_kept():
    sample = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    sample[7] = 2.0
    weight = torch.ones_like(sample)
    weight[7] = 1e6
    _, high = search_range(sample, weight, sample.amin(0), sample.amax(0), 4)
    assert high.item() > 1.9


def test_channels_without_weight_or_spread_keep_their_range():
    sample = torch.stack([draws(100), torch.full((100,), 3.5), torch.zeros(100)], 1)
    low, high = sample.amin(0), sample.amax(0)
    found = search_range(sample, torch.zeros_like(sample), low, high, 4)
    assert torch.equal(found[0], low)
    assert torch.equal(found[1], high)
    found = search_range(sample, None, low, high, 4)
    assert torch.equal(found[0][1:], low[1:])
    assert torch.equal(found[1][1:], high[1:])


@pytest.mark.parametrize("value", [0.0, 3.5, -1e4, 1e-9])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_constant_channel_reads_back(value, bits):
    x = torch.full((3, 1, 1), value)
    scale, zero = affine(x[0], x[0], bits)
    assert scale.item() > 0
    assert stored(x, scale, zero, bits).sub(x).abs().max() <= 2e-4 * abs(value) + 1e-9


def test_importance_is_the_squared_derivative_of_attention():
    query, key, value = (x.double() for x in qkv(6, dim=8))
    positions = torch.tensor([2, 3, 5])

    def attention(keys):
        expanded = keys.repeat_interleave(2, 1)
        logits = torch.einsum("qhd,thd->hqt", query[positions], expanded) / math.sqrt(8)
        future = torch.arange(6) > positions[:, None]
        return logits.masked_fill(future, -math.inf).softmax(-1) @ value.repeat_interleave(2, 1).transpose(0, 1)

    jacobian = torch.autograd.functional.jacobian(attention, key)
    # The weights leave out the constant 1 / head_dim.
    expected = jacobian.square().sum((0, 1, 2)) * 8
    found = KeyImportance(positions, query[positions], key, value).weight(query[positions])
    torch.testing.assert_close(found, expected)


# Positions.


def embedded(x: torch.Tensor, positions: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding from complex numbers: pair i times exp(1j * position * inv_freq[i])."""
    count = 2 * len(INV_FREQ)
    rotated = x[..., :count].double()
    pairs = rotated.unflatten(-1, (-1, 2)) if interleaved else rotated.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones(len(positions), 1, len(INV_FREQ)).double(), positions[:, None, None] * INV_FREQ.double()
    )
    pairs = torch.view_as_real(turned)
    flat = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat((flat.float(), x[..., count:]), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [16, 24])
def test_turning_is_rotary_embedding_at_later_positions(interleaved, dim):
    raw, positions = draws(10, 2, dim), torch.arange(10)
    rotary = Rotary(INV_FREQ, 8192, interleaved)
    turned = rotary.turn(embedded(raw, positions, interleaved), 5000)
    torch.testing.assert_close(turned, embedded(raw, positions + 5000, interleaved), atol=1e-4, rtol=1e-4)


def test_short_text_calibrates_long_contexts_when_rotary_is_known():
    raw = draws(64, 2, 16) * 0.1 + draws(16, seed=5) * 3
    query, _, value = qkv(64)
    sequence = (query, embedded(raw, torch.arange(64), False), value)
    later = embedded(raw, torch.arange(64) + 3000, False)
    errors = {}
    for rotary in (None, Rotary(INV_FREQ, 4096)):
        scales = calibrated([sequence], rotary=rotary)
        errors[rotary is None] = (read_back_side(scales, "int6_per_head", "key", 0, later, 3000) - later).norm()
        errors[rotary is None, 4] = (read_back_side(scales, "int4_per_head", "key", 0, later, 3000) - later).norm()
        assert scales.metadata["calibration_positions"] == (64 if rotary is None else 4096)
    assert errors[True] > 3 * errors[False]
    assert errors[True, 4] > 3 * errors[False, 4]
    assert errors[False, 4] < errors[False]  # centred, four bits do better than six here


def test_first_tokens_are_not_turned():
    # A sink's key, far outside all others, stays on the side where it is.
    key = draws(64, 2, 16) * 0.1
    key[0] = 20.0
    query, _, value = qkv(64)
    scales = calibrated([(query, key, value)], rotary=Rotary(INV_FREQ, 4096))
    layer = scales.layers["int6_per_head"][0]
    low = -layer.key_zero * layer.key_scale
    assert low.min() > -1
    assert (low + 63 * layer.key_scale).min() > 19


@pytest.mark.parametrize("interleaved", [False, True])
def test_centres_follow_the_turned_mean(interleaved):
    rotary, mean = Rotary(INV_FREQ, 9000, interleaved), draws(2, 24, seed=3)
    mean[:, 16:] = 0
    positions = torch.tensor([0, 1, 255, 256, 300, 8191, 8999])
    found = rotary.table(9000).centre(mean, positions)
    expected = torch.cat([embedded(mean[None], positions[i : i + 1], interleaved) for i in range(len(positions))])
    # Cosines and sines of one byte are off by up to 1/254 each.
    assert ((found - expected).abs() <= mean.abs().max() * 2**0.5 / 254 * 2).all()
    assert (found[..., 16:] == 0).all()


# Transforms and feedback.


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


def test_feedback_lowers_the_cost_of_rounding():
    dim, bits = 64, 4
    x, metric = draws(2000, 2, dim), correlated(2, dim=dim, seed=4).float()
    scale, zero = affine(x.amin(0), x.amax(0), bits)
    scaled = x / scale + zero

    def cost(codes: torch.Tensor) -> float:
        error = codec.dequantize(codes, scale, zero) - x
        return torch.einsum("thc,hcd,thd->", error, metric, error).item()

    fed = codec.quantize_with_feedback(scaled, feedback(metric, scale), bits)
    assert cost(fed) < 0.5 * cost(codec.quantize(x, scale, zero, bits))
    nothing = torch.zeros(2, dim, dim)
    assert torch.equal(codec.quantize_with_feedback(scaled, nothing, bits), codec.quantize(x, scale, zero, bits))


def test_the_metric_of_keys_is_the_curvature_of_attention():
    query, key, value = qkv(20, dim=8)
    positions = torch.tensor([4, 11, 19])
    importance = KeyImportance(positions, query[positions], key, value)
    found = importance.metric(query[positions])
    torch.testing.assert_close(
        found.diagonal(dim1=1, dim2=2), importance.weight(query[positions]).sum(0), rtol=1e-4, atol=1e-6
    )
    assert (torch.linalg.eigvalsh(found.double()) > -1e-6).all()
    assert found.triu(1).abs().max() > 1e-3  # channels do matter together


# What the calibrator takes, keeps and returns.


def test_every_static_format_gets_scales():
    scales = calibrated([qkv(50)], layers=3)
    assert set(scales.layers) == set(STATIC)
    for name, layers in scales.layers.items():
        assert len(layers) == 3
        for layer in layers:
            for tensor in TENSORS:
                found = getattr(layer, tensor)
                assert found.shape == (2, 16)
                assert found.dtype == torch.float32
                assert found.isfinite().all()
                if FORMATS[name].granularity == "tensor":
                    assert (found == found[0, 0]).all()
            refined = name == "int4_per_head"
            assert (layer.key_transform is not None) == (layer.key_feedback is not None) == refined
            assert layer.key_mean is None  # without a rotary embedding there is no centre
            assert layer.value_feedback is None  # nor feedback without a metric
            assert (layer.key_scale > 0).all()
            assert (layer.value_scale > 0).all()
            if FORMATS[name].granularity == "head":
                assert layer.key_scale.unique().numel() > 16


def test_values_of_4_bits_get_feedback_from_their_metric():
    calibrator = KVCalibrator(1, 2, 16, rotary=Rotary(INV_FREQ, 512))
    calibrator.observe(0, *qkv(50))
    calibrator.weigh_values(0, correlated(2, dim=16, seed=1))
    scales = calibrator.finish()
    for name in STATIC:
        layer = scales.layers[name][0]
        assert (layer.value_feedback is not None) == (name in ("int4_per_head", "k8v4_per_head"))
        assert (layer.key_mean is not None) == (name == "int4_per_head")
    with pytest.raises(ParetoError, match=r"takes a metric of shape \(2, 16, 16\)"):
        calibrator.weigh_values(0, torch.eye(16))
    with pytest.raises(ParetoError, match="layer 1 of 1"):
        calibrator.weigh_values(1, torch.eye(16).expand(2, 16, 16))


def test_8_bit_codes_cover_everything_seen():
    sequences = [qkv(300, seed=seed) for seed in range(40)]
    sequences[3][1][200, 1, 5] = 90.0
    scales = calibrated(sequences, max_tokens=600)  # most sequences are not kept
    layer: LayerScales = scales.layers["int8_per_head"][0]
    for _, key, value in sequences:
        for x, scale, zero in ((key, layer.key_scale, layer.key_zero), (value, layer.value_scale, layer.value_zero)):
            assert ((stored(x, scale, zero, 8) - x).abs() <= 0.501 * scale + 1e-5).all()


def test_8_bit_codes_leave_room_for_what_little_text_did_not_show():
    seen, unseen = qkv(100), qkv(100_000, seed=50)
    layer = calibrated([seen]).layers["int8_per_head"][0]
    beyond = []
    for x, scale, zero in (
        (unseen[1], layer.key_scale, layer.key_zero),
        (unseen[2], layer.value_scale, layer.value_zero),
    ):
        beyond.append(((stored(x, scale, zero, 8) - x).abs() > 0.51 * scale).float().mean().item())
    outside = [((x < y.amin(0)) | (x > y.amax(0))).float().mean().item() for x, y in zip(unseen, seen, strict=True)]
    assert all(share < 0.002 for share in beyond)
    assert all(share > 0.01 for share in outside)  # what the minimum and maximum would have clipped


def test_metadata_is_carried():
    calibrator = KVCalibrator(1, 2, 16, seed=5)
    calibrator.observe(0, *qkv(20))
    calibrator.observe(0, *qkv(30))
    metadata = calibrator.finish({"recipe": "kv-scales"}).metadata
    assert metadata == {
        "recipe": "kv-scales",
        "calibration_tokens": 50,
        "calibration_seed": 5,
        "calibration_positions": 30,
    }


def test_the_seed_decides_and_the_order_of_layers_does_not():
    sequences = [qkv(200, seed=seed) for seed in range(12)]
    settings = {"layers": 2, "max_tokens": 800, "max_queries": 16}
    first = calibrated(sequences, seed=1, **settings)
    assert same(first, calibrated(sequences, seed=1, **settings))
    assert not same(first, calibrated(sequences, seed=2, **settings))
    calibrator = KVCalibrator(2, 2, 16, seed=1, max_tokens=800, max_queries=16)
    for layer in (1, 0):
        for sequence in sequences:
            calibrator.observe(layer, *sequence)
    assert same(first, calibrator.finish())


def test_caller_may_reuse_its_tensors():
    sequence = qkv(100)
    expected = calibrated([sequence])
    buffers = tuple(x.bfloat16() for x in sequence)
    exact = calibrated([tuple(x.clone() for x in buffers)])
    calibrator = KVCalibrator(1, 2, 16)
    calibrator.observe(0, *buffers)
    for buffer in buffers:
        buffer.zero_()
    assert same(exact, calibrator.finish())
    assert not same(expected, exact)


@pytest.mark.parametrize("rotary", [None, Rotary(INV_FREQ, 4096)])
def test_memory_is_bounded_and_first_tokens_stay(rotary):
    calibrator = KVCalibrator(1, 2, 16, max_tokens=256, max_queries=8, rotary=rotary)
    for seed, tokens in enumerate((100, 5000, 30, 256, 900, 257, 64)):
        sequence = qkv(tokens, seed=seed)
        sequence[1][:4] = 1000.0 + seed
        calibrator.observe(0, *sequence)
        kept = calibrator._layers[0].sequences
        assert 0 < sum(len(s.key) for s in kept) <= 256
        assert all(len(s.query) <= 8 for s in kept)
        assert all((s.key[:4] > 900).all() for s in kept)


def test_one_token_is_enough():
    query, key, value = (x.bfloat16().float() for x in qkv(1))  # as the calibrator keeps them
    scales = calibrated([(query, key, value)], rotary=Rotary(INV_FREQ, 1))
    for name in ("int4_per_head", "k8v4_per_head"):
        torch.testing.assert_close(read_back_side(scales, name, "key", 0, key), key, rtol=1e-3, atol=1e-4)


def test_a_layer_without_data_is_named():
    calibrator = KVCalibrator(3, 2, 16)
    calibrator.observe(1, *qkv(10))
    with pytest.raises(ParetoError, match=r"no keys and values of layer 0, 2 were observed"):
        calibrator.finish()


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_tensors_must_be_finite(which, bad):
    sequence = qkv(10)
    sequence[which][3, 1, 2] = bad
    with pytest.raises(ParetoError, match=f"layer 0: the {('queries', 'keys', 'values')[which]} hold NaN"):
        KVCalibrator(1, 2, 16).observe(0, *sequence)


def test_wrong_shapes_are_refused():
    query, key, value = qkv(10)
    calibrator = KVCalibrator(1, 2, 16)
    for sequence, message in (
        ((query, key[:, :1], value), "keys"),
        ((query, key, value[:9]), "values"),
        ((query[:, :3], key, value), "multiple of 2 heads"),
        ((query[:9], key, value), "queries"),
        ((query[:0], key[:0], value[:0]), "at least one token"),
    ):
        with pytest.raises(ParetoError, match=message):
            calibrator.observe(0, *sequence)
    with pytest.raises(ParetoError, match="no layer 1; the model has 1"):
        calibrator.observe(1, query, key, value)
    with pytest.raises(ParetoError, match="no layer -1"):
        calibrator.observe(-1, query, key, value)


@pytest.mark.parametrize("settings", [{"max_tokens": 4}, {"max_queries": 0}, {"rotary": Rotary(torch.ones(9), 100)}])
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ParetoError, match="KV calibration"):
        KVCalibrator(1, 2, 16, **settings)


# A real model.

MODEL = Path(__file__).parents[2] / "quant_methods" / "models" / "ref-7m"


class Spy:
    """Attention that shows its tensors to ``observe`` or replaces keys and values by ``change``'s."""

    def __init__(self) -> None:
        self.observe = self.change = None

    def __call__(self, module, query, key, value, mask, scaling, **_):
        if self.observe is not None:
            self.observe(module.layer_idx, *(x[0].transpose(0, 1) for x in (query, key, value)))
        if self.change is not None:
            key, value = self.change(module.layer_idx, key, value)
        causal = query.shape[2] == key.shape[2]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None


@pytest.fixture(scope="module")
def model():
    spy = Spy()
    AttentionInterface.register("calibration_spy", spy)
    AttentionMaskInterface.register("calibration_spy", lambda *args, **kwargs: None)
    loaded = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="calibration_spy")
    return loaded.eval(), spy


@torch.no_grad()
def test_quality_on_a_real_model_and_its_own_text(model):
    """Text sampled from the model calibrates; other such text, near and far from position 0, measures."""
    llama, spy = model
    torch.manual_seed(0)
    text = llama.generate(
        torch.zeros(4, 1, dtype=torch.long), max_new_tokens=255, do_sample=True, eos_token_id=None, pad_token_id=1
    )
    calibration, measured = text[:2], text[2:]
    rotary = Rotary(llama.model.rotary_emb.inv_freq, 8192)
    scales = {}
    for name, known in (("here", None), ("everywhere", rotary)):
        calibrator = KVCalibrator(6, 2, 64, rotary=known)
        spy.observe = calibrator.observe
        for row in calibration:
            llama.model(row[None], use_cache=False)
        spy.observe = None
        for index, block in enumerate(llama.model.layers):
            weight = block.self_attn.o_proj.weight.detach().view(256, 2, 2, 64)
            calibrator.weigh_values(index, torch.einsum("ohgc,ohgd->hcd", weight, weight))
        scales[name] = calibrator.finish()
    reference = [llama(row[None], use_cache=False).logits[0].log_softmax(-1) for row in measured]

    def divergence(name: str, fmt: str, start: int) -> float:
        def change(layer, key, value):
            sides = {"key": key, "value": value}
            return tuple(
                read_back_side(scales[name], fmt, kind, layer, x[0].transpose(0, 1), start).transpose(0, 1)[None]
                for kind, x in sides.items()
            )

        spy.change, total = change, 0.0
        for row, expected in zip(measured, reference, strict=True):
            where = start + torch.arange(len(row))[None]
            found = llama(row[None], position_ids=where, use_cache=False).logits[0].log_softmax(-1)
            total += (expected.exp() * (expected - found)).sum(-1).mean().item() / len(measured)
        spy.change = None
        return total

    far = {fmt: divergence("everywhere", fmt, 6000) for fmt in STATIC}
    assert far["int8_per_head"] < 0.001
    assert far["int6_per_head"] < 0.01
    assert far["k8v4_per_head"] < 0.025
    assert far["int4_per_head"] < 0.03
    assert far["int8_per_head"] < far["int6_per_head"] < far["k8v4_per_head"] < far["int4_per_head"]
    assert far["int4_per_head"] < far["int4_per_tensor"]
    assert divergence("everywhere", "int4_per_head", 0) < 0.03
    assert divergence("here", "int4_per_head", 6000) > 2 * far["int4_per_head"]
