"""The pass that calibrates KV scales: its text, its first tokens, and its blocks in any model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface

from kv_cache.calibration import KVCalibrator
from kv_cache.errors import ParetoError
from kv_cache.moments import attention_of
from kv_cache.scales import TENSORS
from quant_methods.calibration import calibrator, kv_pass
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.kv_observer import ATTENTION, kv_rotary, kv_shapes, observing, unserved_kv
from quant_methods.calibration.text_source import load_sequences, load_tokenizer
from quant_methods.compress import compress
from quant_methods.methods.rtn import RTN
from quant_methods.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


# Text.


def tokenizer(*, front: list[int] = [], template: str | None = None) -> Any:  # noqa: B006
    """A tokenizer of bytes, which may put a token before a text and have a chat template."""

    def encode(text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": (front if add_special_tokens else []) + list(text.encode())}

    def render(messages: list[dict[str, str]], tokenize: bool) -> str:
        assert template is not None
        if template == "raise":
            raise ValueError("a system message is missing")
        return template + messages[0]["content"]

    class Tokenizer:
        chat_template = template
        apply_chat_template = staticmethod(render)

        def __call__(self, *args: Any, **kwargs: Any) -> dict[str, list[int]]:
            return encode(*args, **kwargs)

    return Tokenizer()


def test_the_shipped_text_is_of_several_kinds_with_a_notice_of_each() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in kv_pass.SHIPPED.glob("*.txt")}
    assert len(files) >= 8
    assert 60_000 < sum(len(text.encode()) for text in files.values()) < 120_000
    notice = (kv_pass.SHIPPED / "NOTICE").read_text()
    assert all(name in notice for name in files)
    letters = files["languages.txt"]
    assert all(any(low <= ord(c) <= high for c in letters) for low, high in ((0x400, 0x4FF), (0x4E00, 0x9FFF)))


def test_windows_of_the_shipped_text_take_turns_and_start_as_requests_do() -> None:
    kinds = [path.read_text(encoding="utf-8").encode() for path in sorted(kv_pass.SHIPPED.glob("*.txt"))]
    found = kv_pass.shipped_sequences(tokenizer(front=[300]), len(kinds) + 3, 1000)
    assert found.shape == (len(kinds) + 3, 1000)
    assert (found[:, 0] == 300).all()
    for row, kind in zip(found, kinds, strict=False):
        assert bytes(row[1:].tolist()) == kind[:999]
    assert bytes(found[len(kinds), 1:].tolist()) in kinds[0][500:]
    everything = kv_pass.shipped_sequences(tokenizer(), 10_000, 1000)
    assert len(everything) * 1000 == pytest.approx(sum(map(len, kinds)), rel=0.05)
    assert len({tuple(row) for row in everything.tolist()}) == len(everything)
    with pytest.raises(ParetoError, match=r"no 90000 tokens in a row; give --text"):
        kv_pass.shipped_sequences(tokenizer(), 4, 90_000)


@pytest.mark.parametrize(
    ("front", "template", "completions", "chats"),
    [
        ([], None, None, None),
        ([300], None, 300, None),
        ([], "\x07", None, 7),
        ([300], "\x07", 300, 7),
        ([300], "raise", 300, None),
    ],
)
def test_first_tokens_are_those_of_completions_and_of_chats(
    front: list[int], template: str | None, completions: int | None, chats: int | None
) -> None:
    given = tokenizer(front=front, template=template)
    assert kv_pass.first_of_completions(given) == completions
    assert kv_pass.first_of_chats(given) == chats
    text = torch.arange(100, 200).view(10, 10)
    found = kv_pass.first_tokens(given, text, 0)
    assert found.shape == (kv_pass.FIRST_TOKENS, 1)
    others = found[found != 7] if chats else found
    if chats:
        assert len(others) == len(found) // 2
    if completions:
        assert (others == 300).all()
    else:
        assert len(others.unique()) > 50
        assert ((others >= 100) & (others < 200)).all()
        assert not torch.equal(found, kv_pass.first_tokens(given, text, 1))


def test_a_text_of_the_users_starts_as_requests_do(tiny_model: Path, text_file: Path) -> None:
    added = kv_pass.first_of_completions(load_tokenizer(tiny_model))
    assert added == 0
    found = kv_pass.kv_sequences(tiny_model, text_file, 6, 32)
    plain = load_sequences(tiny_model, text_file, 6, 32)
    assert torch.equal(found[:, 1:], plain[:, 1:])
    assert (found[:, 0] == added).all()


# Models.

SHAPE = {
    "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 256,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, Any] = {
    "plain": transformers.LlamaConfig(**SHAPE),
    "partial": transformers.StableLmConfig(**SHAPE),
    "partial and interleaved": transformers.Glm4Config(**SHAPE, head_dim=32, pad_token_id=0),
    "no rotary": transformers.OPTConfig(
        hidden_size=128, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=256, word_embed_proj_dim=128
    ),
    "own scaling": transformers.GraniteMoeConfig(
        **SHAPE, num_local_experts=4, num_experts_per_tok=2, attention_multiplier=0.4
    ),
    "sinks": transformers.GptOssConfig(
        **SHAPE,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=256,
        pad_token_id=0,
        initializer_range=0.2,
    ),
    "experts": transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=32, moe_intermediate_size=32),
}


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def observe(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> None:
        self.seen += [(layer, *sequence) for sequence in zip(query, key, value, strict=True)]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    monkeypatch.setattr(calibrator, "quick_dtype", lambda device: torch.float32)
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(MODELS[request.param]).float().eval()
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model", made


@torch.no_grad()
def test_blocks_show_what_the_whole_model_computes(model: tuple[Path, Any]) -> None:
    folder, whole = model
    decoder, recorder = Decoder(folder), Recorder()
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    caches = whole(tokens, use_cache=True).past_key_values.layers
    hidden = decoder.embed(tokens)
    for index in range(2):
        with decoder.loaded(index) as block:
            (decoder.watch if index else decoder.advance)(index, block, hidden, recorder)
    assert [layer for layer, *_ in recorder.seen] == [0, 0, 1, 1]
    for position, (layer, _, key, value) in enumerate(recorder.seen):
        for found, kept in ((key, caches[layer].keys), (value, caches[layer].values)):
            torch.testing.assert_close(found, kept[position % 2].transpose(0, 1), atol=1e-5, rtol=1e-4)
    # Logits are q.k / sqrt(head_dim), also in a model that scales them otherwise; position 0 is not turned.
    factor = getattr(whole.config, "attention_multiplier", None)
    if factor is not None:
        first = whole.get_decoder().layers[0]
        asked = first.self_attn.q_proj(first.input_layernorm(decoder.embed(tokens)))[0, 0].unflatten(-1, (4, -1))
        torch.testing.assert_close(recorder.seen[0][1][0], asked * factor * asked.shape[-1] ** 0.5)


@torch.no_grad()
def test_rotary_turns_keys_back_to_what_they_were(model: tuple[Path, Any]) -> None:
    """The same token everywhere has the same key in the first layer, but for its position."""
    folder, whole = model
    decoder, recorder = Decoder(folder), Recorder()
    hidden = decoder.embed(torch.full((1, 200), 7))
    with decoder.loaded(0) as block:
        decoder.watch(0, block, hidden, recorder)
    key, rotary = recorder.seen[0][2], kv_rotary(decoder.base, decoder.config)
    back = rotary.turn(key, -torch.arange(200))
    assert rotary.max_position == whole.config.max_position_embeddings
    assert (rotary.rotated > 0) == (whole.config.model_type != "opt")
    if rotary.rotated:
        assert (key - key[:1]).abs().max() > 0.1
        assert (back - back[:1]).abs().max() < 1e-4
    else:
        assert torch.equal(back, key)


# Windows and sinks.

SPECIAL: dict[str, Any] = {
    "gpt-oss": transformers.GptOssConfig(
        **SHAPE, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=6, pad_token_id=0,
        initializer_range=0.2,
    ),
    "granite": transformers.GraniteSWAConfig(
        **SHAPE, sliding_window=6, layer_types=["sliding_attention", "full_attention"], attention_multiplier=0.4,
        initializer_range=0.2,
    ),
}  # fmt: skip


class Probabilities:
    """The attention probabilities that a calibrator weighs errors by, of every layer: [sequences, heads, t, t]."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def observe(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> None:
        of_layer = []
        for index, sequence in enumerate(zip(query, key, value, strict=True)):
            seen = None if mask is None else mask[min(index, len(mask) - 1), 0]
            attention, _ = attention_of(torch.arange(key.shape[1]), *sequence, seen=seen, sinks=sinks)
            of_layer.append(attention.unflatten(1, (-1, key.shape[1])).flatten(0, 1))
        self.found.append(torch.stack(of_layer))


@pytest.mark.parametrize("name", SPECIAL)
@torch.no_grad()
def test_windows_and_sinks_are_those_of_the_whole_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers' own eager attention: what leaves the blocks, and the probabilities within."""
    monkeypatch.setattr(calibrator, "quick_dtype", lambda device: torch.float32)
    torch.manual_seed(0)
    whole = transformers.AutoModelForCausalLM.from_config(SPECIAL[name], attn_implementation="eager").float().eval()
    for layer in whole.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2)
    whole.save_pretrained(tmp_path)
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    wanted = whole.model(tokens, output_attentions=True, output_hidden_states=True)
    decoder, seen, outputs = Decoder(tmp_path), Probabilities(), []
    assert unserved_kv(decoder.base, decoder.config) == "head size 32 (it serves 64, 80, 96, 128, 256)"
    hidden = decoder.embed(tokens)
    for index in range(2):
        with decoder.loaded(index) as block:
            decoder.advance(index, block, hidden, seen)
        outputs.append(hidden.clone())
    torch.testing.assert_close(outputs[0], wanted.hidden_states[1], atol=1e-5, rtol=1e-4)
    last = whole.model.norm(outputs[1])
    torch.testing.assert_close(last, wanted.last_hidden_state, atol=1e-5, rtol=1e-4)
    for found, expected in zip(seen.found, wanted.attentions, strict=True):
        if name == "gpt-oss":
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        else:  # Granite shows its probabilities before sinks took their part.
            scaled = found / found.sum(-1, keepdim=True)
            torch.testing.assert_close(scaled, expected, atol=1e-5, rtol=1e-4)
        assert found.sum(-1).min() < 0.5
    assert (seen.found[0] > 0).sum(-1).max() == 6
    assert (seen.found[1] > 0).sum(-1).max() == 20


def test_sinks_that_a_model_keeps_to_itself_are_refused() -> None:
    module = torch.nn.Module()
    module.sinks = torch.nn.Parameter(torch.zeros(4))
    query = torch.zeros(1, 4, 5, 32)
    with pytest.raises(ParetoError, match="Module has attention sinks and does not say so"):
        AttentionInterface()[ATTENTION](module, query, query, query, None, scaling=1.0)


def test_scales_of_a_whole_model_are_those_of_its_attention(tiny_model: Path, text_file: Path) -> None:
    tokens = kv_pass.kv_sequences(tiny_model, text_file, 6, 48)
    done: list[int] = []
    decoder = Decoder(tiny_model)
    decoder.dtype = torch.float32
    found = kv_pass.calibrate(decoder, tiny_model, tokens, 3, lambda count, what: done.append(count)).finish()
    assert done == [0, 0, 1, 2]
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation="pareto_observed"
    )
    expected = KVCalibrator(kv_shapes(plain.get_decoder(), plain.config), seed=3)
    firsts = kv_pass.first_tokens(load_tokenizer(tiny_model), tokens, 3)
    with torch.no_grad(), observing(expected):
        plain(tokens, use_cache=False)
        plain(firsts, use_cache=False)
    for layer, same in zip(found.layers, expected.finish().layers, strict=True):
        for name in ("key_mean", "key_first", "value_size"):
            torch.testing.assert_close(getattr(layer, name), getattr(same, name), rtol=1e-3, atol=1e-3)
        square, wanted = (x.key_transform.mT @ x.key_transform for x in (layer, same))
        assert (square - wanted).norm() < 0.02 * wanted.norm()


def test_bfloat16_calibrates_as_float32_does(
    tiny_model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, found = kv_pass.kv_sequences(tiny_model, text_file, 6, 48), []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(calibrator, "quick_dtype", lambda device, dtype=dtype: dtype)
        decoder = Decoder(tiny_model)
        assert decoder.dtype is dtype
        found.append(kv_pass.calibrate(decoder, tiny_model, tokens, 0).finish().layer(1))
    for name in ("key_mean", "key_first", "value_size"):
        one, other = (getattr(layer, name) for layer in found)
        assert (one - other).norm() < 0.03 * one.norm()
        assert not torch.equal(one, other)
    assert all(getattr(found[1], name).dtype == torch.float32 for name in TENSORS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [None, 4, 3])
def test_a_gpu_calibrates_as_a_cpu_does(tiny_model: Path, text_file: Path, tmp_path: Path, bits: int | None) -> None:
    """Weights as they are, in compressed-tensors and in our own format, which are read back on the GPU."""
    folder = tiny_model
    if bits is not None:
        folder = tmp_path / "quantized"
        compress(tiny_model, Recipe("r", steps=(RTN(bits=bits, group_size=32),), kv_scales=False), folder)
    tokens = kv_pass.kv_sequences(folder, text_file, 6, 48)
    found, expected = (
        kv_pass.calibrate(Decoder(folder, device=device), folder, tokens, 0).finish().layer(2)
        for device in ("cuda", "cpu")
    )
    for name in ("key_mean", "key_first", "value_size"):
        one, other = (getattr(layer, name) for layer in (found, expected))
        assert (one - other).norm() < 0.03 * other.norm()


def test_a_layer_that_the_checkpoint_lacks_is_named(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    decoder = Decoder(tmp_path / "other")
    with pytest.raises(ParetoError, match=r"the checkpoint lacks model\.layers\.3\."):
        kv_pass.calibrate(decoder, tmp_path / "other", torch.ones(1, 8, dtype=torch.int64), 0)


def test_the_quick_dtype_is_one_that_the_device_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for fast, expected in ((False, torch.float32), (True, torch.bfloat16)):
        stub = SimpleNamespace(_is_amx_tile_supported=lambda: False, _is_avx512_bf16_supported=lambda fast=fast: fast)
        monkeypatch.setattr(torch, "cpu", stub)
        assert calibrator.quick_dtype(cpu) is expected
    monkeypatch.setattr(torch, "cpu", SimpleNamespace())
    assert calibrator.quick_dtype(cpu) is torch.float32
