"""``--kv-budget`` from the measures to the checkpoint: right measures, resumed ones, stored bits, refused flags."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kv_cache import codec
from kv_cache.formats import FORMATS, MIXED
from kv_cache.scales import KVScales, LayerScales
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.kv_codes import KINDS, LayerCodes
from quant_methods.calibration.kv_observer import ATTENTION, AttentionCall, observing
from quant_methods.calibration.served import Served
from quant_methods.calibration.text_source import load_sequences
from quant_methods.checkpoints.checkpoint import Source
from quant_methods.checkpoints.quality import divergence
from quant_methods.checkpoints.reference import load_reference
from quant_methods.compress import compress, prepare
from quant_methods.embedded import MODELS
from quant_methods.methods.rtn import RTN
from quant_methods.mixed_precision.budget import Budget
from quant_methods.mixed_precision.kv_budget import KVAssignment, KVBudget, Losses
from quant_methods.mixed_precision.kv_choice import JSON_FILE, PLOT_FILE, KVChoice
from quant_methods.mixed_precision.kv_sensitivity import KVSensitivity, KVSettings, probe, typical
from quant_methods.mixed_precision.mixed import compress_to_budget
from quant_methods.mixed_precision.sensitivity import Settings
from quant_methods.mixed_precision.units import Width
from quant_methods.recipe import Calibration, Recipe
from quant_methods.steps import Step
from quant_methods.training.tuning import Tune
from tests.kv_cache.random_scales import random_scales
from vllm_ext.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

CALIBRATION = Calibration(8, 64, 3)
WIDTHS = (2, 3, 4, 6, 8)
REF = MODELS / "ref-7m"


def recipe(*steps: Step, kv_scales: bool = True) -> Recipe:
    return Recipe("kv", steps=steps, calibration=CALIBRATION, kv_scales=kv_scales)


class Interrupted(Exception):
    """Stands for Ctrl-C."""


def read_by_the_specification(kind: str, x: Tensor, scales: LayerScales, bits: int) -> Tensor:
    """Return what a page gives back of [tokens, heads, head_dim]."""
    positions = torch.arange(len(x))
    even = codec.even_keys(x, scales, positions) if kind == "key" else codec.even_values(x, scales)
    read = codec.dequantize(*codec.quantize(even, bits), bits)
    return codec.uneven_keys(read, scales, positions) if kind == "key" else codec.uneven_values(read, scales)


class OneSide:
    """Reads one layer's keys, or values, from codes."""

    def __init__(self, layer: int, kind: str, bits: int, scales: KVScales) -> None:
        self.layer, self.kind, self.bits, self.scales = layer, kind, bits, scales.layer(layer)

    def attend(self, call: AttentionCall) -> Tensor:
        both = {"key": call.key, "value": call.value}
        if call.layer == self.layer:
            parts = [
                read_by_the_specification(self.kind, x.transpose(0, 1), self.scales, self.bits).transpose(0, 1)
                for x in both[self.kind]
            ]
            both[self.kind] = torch.stack(parts)
        return call.sdpa(**both)


@dataclasses.dataclass
class Measured:
    """ref-7m with scales, and what its codes were found to lose."""

    scales: KVScales
    tokens: Tensor
    found: list[list[Losses]]
    sensitivity: KVSensitivity

    @property
    def losses(self) -> list[Losses]:
        """The mean over several seeds: so few tokens say little with one."""
        return [
            {
                kind: {b: sum(one[layer][kind][b] for one in self.found) / len(self.found) for b in WIDTHS}
                for kind in KINDS
            }
            for layer in range(6)
        ]


@pytest.fixture(scope="module")
def measured(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("measured")
    compress(REF, recipe(), folder / "scales", text=text_file)
    scales = KVScales.load(folder / "scales")
    _, decoder, _ = prepare(REF, recipe(), folder / "out", device="cpu", overwrite=False)
    tokens = load_sequences(REF, text_file, 8, 64)
    found = [
        KVSensitivity(
            Served(decoder, tokens), scales, WIDTHS, settings=KVSettings(6, seed), folder=folder / str(seed), key="key"
        )
        for seed in range(6)
    ]
    return Measured(scales, tokens[2:], [one.measure() for one in found], found[0])


@torch.no_grad()
def test_losses_are_the_divergence_of_the_whole_model(measured: Measured) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(REF, dtype=torch.float32, attn_implementation=ATTENTION)
    exact = model(measured.tokens).logits.log_softmax(-1)

    def true(layer: int, kind: str, bits: int) -> float:
        with observing(OneSide(layer, kind, bits, measured.scales)):
            found = model(measured.tokens).logits.log_softmax(-1)
        return divergence(exact, found).double().mean().item()

    for kind in KINDS:
        for bits, within in ((2, 1.8), (3, 1.25), (4, 1.25)):
            pairs = [(measured.losses[layer][kind][bits], true(layer, kind, bits)) for layer in range(6)]
            for found, expected in pairs:
                most = 1.7 if bits > 2 else 2.5
                assert 1 / most < found / expected < most
            total = sum(found for found, _ in pairs) / sum(expected for _, expected in pairs)
            assert 1 / within < total < within
            # Layers differ, and the measure knows how.
            ranks = torch.tensor(pairs).argsort(0).argsort(0).double()
            assert torch.corrcoef(ranks.T)[0, 1] > 0.8


def test_the_mean_of_probes_is_the_fisher_information() -> None:
    torch.manual_seed(0)
    # A flat distribution, and one that is nearly certain.
    logits = torch.stack([torch.randn(5), torch.tensor([8.0, 1.0, 0.0, 2.0, 1.0])])
    u = probe(logits.expand(200_000, 2, 5).contiguous(), torch.Generator().manual_seed(1)).double()
    p = logits.double().softmax(-1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    size = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    assert (
        (torch.einsum("nsi,nsj->sij", u, u) / len(u) - expected).abs() < 0.02 * size[:, :, None] * size[:, None]
    ).all()


def test_no_sequence_outweighs_the_others() -> None:
    # The third is a hundred times as sensitive, and to keys where the others are to values.
    easy, hard = {"key": 1.0, "value": 3.0}, {"key": 500.0, "value": 100.0}
    layers = [
        {kind: {b: [4.0**-b * of[kind] for of in (easy, easy, hard, easy, easy)] for b in WIDTHS} for kind in KINDS}
        for _ in range(3)
    ]
    for found in typical(layers):
        assert found["value"][3] > 1.5 * found["key"][3]
    total = sum(found[kind][3] for found in typical(layers) for kind in KINDS)
    assert total == pytest.approx(3 * 4 * 4.0**-3), "what the median sequence loses"


def test_losses_fall_by_about_four_for_each_bit(measured: Measured) -> None:
    for kind in KINDS:
        total = {bits: sum(found[kind][bits] for found in measured.losses) for bits in WIDTHS}
        for low, high in ((2, 3), (3, 4), (4, 6)):
            assert 3 < (total[low] / total[high]) ** (1 / (high - low)) < 5
        # The steps of a scale's byte tell at 8 bits.
        assert total[8] < total[6] / 3
        for found in measured.losses:
            assert list(found[kind].values()) == sorted(found[kind].values(), reverse=True)


def test_losses_add_up(measured: Measured) -> None:
    found = KVAssignment([(3, 3), (4, 3), (3, 4), (4, 4), (6, 3), (3, 2)], measured.losses, measured.scales.head_dim)
    assert measured.sensitivity.joint(found.bits) == pytest.approx(found.predicted, rel=0.3)


@pytest.mark.parametrize("dim", [64, 80, 96])
def test_errors_are_those_of_the_specification(dim: int) -> None:
    torch.manual_seed(dim)
    scales = random_scales(2, dim)
    x = {"key": 2 * torch.randn(2, 300, 2, dim) + scales.key_mean, "value": torch.randn(2, 300, 2, dim) * 3}
    for kind in KINDS:
        found = LayerCodes(scales, torch.device("cpu")).errors(kind, x[kind], WIDTHS)
        for bits, error in zip(WIDTHS, found, strict=True):
            expected = torch.stack([read_by_the_specification(kind, one, scales, bits) for one in x[kind]]) - x[kind]
            # Sums in another order move a code now and then, and with it the whole head of that token.
            same = (error - expected).abs().amax(-1) < 1e-3
            assert same.double().mean() > 0.98
            assert error.abs().mean() > 3e-3
            assert error.square().mean() == pytest.approx(expected.square().mean().item(), rel=0.02)


@pytest.mark.parametrize("moment", ["forward through block 2/6", "output of sequence 3/6", "block 4", "block 1"])
def test_an_interrupted_measurement_goes_on_with_the_same_numbers(
    measured: Measured, tmp_path: Path, moment: str
) -> None:
    seen: list[str] = []

    def progress(done: int, total: int, what: str) -> None:
        seen.append(what)
        if what.endswith(moment) and seen.count(what) == 1:
            raise Interrupted

    once = measured.sensitivity
    model = dataclasses.replace(once.model, progress=progress)
    again = KVSensitivity(
        model, once.scales, WIDTHS, settings=KVSettings(sequences=6, save_every=0), folder=tmp_path, key="key"
    )
    with pytest.raises(Interrupted):
        again.measure()
    stopped = len(seen)
    assert again.measure() == measured.found[0]
    if moment.startswith("block"):
        assert f"loss of KV codes, {moment}" in seen[stopped:]
        later = [f"loss of KV codes, block {number}" for number in range(int(moment[-1]) + 1, 7)]
        assert not set(later) & set(seen[stopped:])
        assert not any("output of sequence" in what for what in seen[stopped:])
    # Finished, it is read; another key, and it is measured anew.
    stopped = len(seen)
    assert again.measure() == measured.found[0]
    assert len(seen) == stopped
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kv-losses.json"]
    other = KVSensitivity(model, once.scales, WIDTHS, settings=KVSettings(sequences=2), folder=tmp_path, key="key")
    assert other.measure() != measured.found[0]


@pytest.fixture(scope="module")
def checkpoint(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ref-7m with KV scales and bits for 3.5bits."""
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    compress(REF, recipe(), out, text=text_file, kv_bits=KVChoice(KVBudget.parse("3.5bits")))
    return out


def test_bits_are_stored_beside_scales_that_serve_every_dtype(
    checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    compress(REF, recipe(), tmp_path / "plain", text=text_file)
    scales, plain = KVScales.load(checkpoint), KVScales.load(tmp_path / "plain")
    assert scales.bits is not None
    assert plain.bits is None
    assert 3.4 < scales.bits_per_element(MIXED) <= 3.5
    assert len(set(scales.bits)) > 1
    document = json.loads((checkpoint / JSON_FILE).read_text())
    assert [(x["key"]["bits"], x["value"]["bits"]) for x in document["layers"]] == scales.bits
    assert document["bits_per_element"] == scales.bits_per_element(MIXED)
    assert document["measured_kl"] == pytest.approx(document["predicted_kl"], rel=0.5)
    assert document["predicted_kl"] < document["uniform"]["k4v3_per_head"]["predicted_kl"]
    assert (checkpoint / PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    # All else is as without a budget: other dtypes are served from the same scales.
    for index in range(6):
        for name in ("key_mean", "key_transform", "value_size"):
            assert torch.equal(getattr(scales.layer(index), name), getattr(plain.layer(index), name))
        assert scales.format("int4_per_head", index) == FORMATS["int4_per_head"]
        assert (scales.format(MIXED, index).key_bits, scales.format(MIXED, index).value_bits) == scales.bits[index]
    assert not (tmp_path / "out.partial").exists()


def test_bits_survive_what_copies_checkpoints(checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    before = KVScales.load(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "copy")
    before.save(tmp_path / "again")
    for folder in ("copy", "again"):
        assert KVScales.load(tmp_path / folder).bits == before.bits
    # Compressed once more, a checkpoint has the scales of its new weights, and no bits that were chosen for others.
    compress(checkpoint, recipe(RTN(bits=4, group_size=64)), tmp_path / "w4", text=text_file)
    assert KVScales.load(tmp_path / "w4").bits is None
    assert not (tmp_path / "w4" / JSON_FILE).exists()


def test_codes_are_measured_on_the_quantized_model(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    seen: list[tuple[KVAssignment, float]] = []
    choice = KVChoice(KVBudget.parse("4bits"), chosen=lambda *both: seen.append(both))
    coarse = RTN(bits=3, group_size=-1, symmetric=True, search="minmax")
    tune = Tune(num_samples=8, length=32, held_out=2, epochs=1, batch=4, learning_rate=0.02)
    compress(tiny_model, recipe(coarse, tune), tmp_path / "out", text=text_file, kv_bits=choice)
    ((chosen, kl),) = seen
    # The written model as an ordinary one.
    shutil.copytree(tiny_model, tmp_path / "read")
    load_reference(tmp_path / "out").save_pretrained(tmp_path / "read")

    def measured_on(model: Path) -> tuple[float, float]:
        decoder, tokens = Decoder(model, Source(model)), load_sequences(model, text_file, 8, 64, CALIBRATION.seed)
        sensitivity = KVSensitivity(
            Served(decoder, tokens), KVScales.load(tmp_path / "out"), WIDTHS,
            settings=choice.settings, folder=tmp_path / f"measures of {model.name}", key="key",
        )  # fmt: skip
        predicted = KVAssignment(chosen.bits, sensitivity.measure(), 64).predicted
        return predicted, sensitivity.joint(chosen.bits)

    assert measured_on(tmp_path / "read") == pytest.approx((chosen.predicted, kl), rel=0.02)
    other, other_kl = measured_on(tiny_model)
    assert abs(other / chosen.predicted - 1) > 0.05
    assert abs(other_kl / kl - 1) > 0.05


def test_both_budgets_at_once(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    settings = Settings(widths=(Width(4), Width(8)), kl_sequences=2, hessian_sequences=2)
    given: dict[str, Any] = {"settings": settings, "text": text_file}
    choice = KVChoice(KVBudget.parse("3.5bits"))
    weights = recipe(RTN(bits=4, group_size=64))
    compress_to_budget(tiny_model, weights, Budget.parse("5bits"), tmp_path / "out", kv_bits=choice, **given)
    assert Source(tmp_path / "out").size() < Source(tiny_model).size()
    assert KVScales.load(tmp_path / "out").bits_per_element(MIXED) <= 3.5
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {JSON_FILE, PLOT_FILE, "pareto_sensitivity.json"} <= names


def test_an_interrupted_run_writes_the_same_bytes(checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if what == "loss of KV codes, block 3":
            raise Interrupted

    out = tmp_path / "out"
    choice = KVChoice(KVBudget.parse("3.5bits"), KVSettings(save_every=0))
    with pytest.raises(Interrupted):
        compress(REF, recipe(), out, text=text_file, kv_bits=choice, progress=stop)
    # The measures do not depend on the budget, so it may change now.
    compress(REF, recipe(), out, text=text_file, kv_bits=dataclasses.replace(choice, budget=KVBudget.parse("4bits")))
    assert len(json.loads((out / JSON_FILE).read_text())["layers"]) == 6
    shutil.rmtree(out)
    with pytest.raises(Interrupted):
        compress(REF, recipe(), out, text=text_file, kv_bits=choice, progress=stop)
    compress(REF, recipe(), out, text=text_file, kv_bits=choice)
    for name in ("kv_scales/scales.safetensors", JSON_FILE):
        one, other = ((folder / name).read_bytes() for folder in (out, checkpoint))
        assert one.replace(b'"save_every": 0', b'"save_every": 20.0') == other


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kv-budget", "3.5"], "--kv-budget '3.5': expected the mean bits of a cached element, such as 3.5bits"),
        (["--kv-budget", "9bits"], "cannot be met: heads of 64 channels take 2.25bits to 8.25bits"),
        (["--kv-budget", "2bits"], "cannot be met: heads of 64 channels take 2.25bits to 8.25bits"),
        (["--kv-budget", "3.5bits", "--recipe", "rtn-w4", "--no-kv-scales"], "recipe rtn-w4 makes none"),
        (["--kv-budget", "3.5bits", "--statistics"], "--kv-budget does not go with --statistics"),
        (["--kv-budget", "3.5bits", "--sweep", "grid.yaml"], "--kv-budget does not go with --sweep"),
        (["--kv-budget", "3.5bits", "--backend", "autoawq"], "--kv-budget: autoawq has no such thing"),
        (["--kv-budget", "3.5bits", "--kv-sequences", "0"], "--kv-sequences 0: at least 1 is needed"),
        (["--kv-sequences", "4"], "--kv-sequences is for --kv-budget"),
    ],
)
def test_flags_that_cannot_be_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    # A recipe of the words' own comes later and wins.
    status = main(["compress", "ref-7m", "--recipe", "kv-scales", "--out", str(tmp_path / "out"), *words])
    captured = capsys.readouterr()
    assert status != 0
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_chose(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--num-calibration-samples", "4", "--calibration-length", "48", "--text", str(text_file)]
    words = ["compress", "ref-7m", "--recipe", "kv-scales", "--out", str(tmp_path / "out"), *small]
    assert main([*words, "--kv-budget", "3.6bits", "--kv-sequences", "3"]) == 0
    text = capsys.readouterr().out
    assert "KV bits chosen for 3.6bits" in text
    assert re.search(r"takes +3\.5\d\d bits an element", text)
    assert "serve with --kv-cache-dtype mixed_per_head" in text
    assert json.loads((tmp_path / "out" / JSON_FILE).read_text())["tokens"] == 3 * 48
