"""The block-by-block run against the whole model in transformers: hidden states, statistics, attention tensors."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant_methods.calibration import calibrator
from quant_methods.calibration.calibrator import Decoder, clone
from quant_methods.calibration.kv_observer import kv_geometry
from quant_methods.calibration.stages import find_stages, stage_statistics, statistics_at_once
from quant_methods.checkpoints.checkpoint import Source


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 8192, (5, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences a batch, so that five make an uneven last batch."""
    monkeypatch.setattr(calibrator, "TOKENS_PER_BATCH_CPU", 80)


class Recorder:
    """An observer that keeps everything."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def observe(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> None:
        self.seen += [(layer, *sequence) for sequence in zip(query, key, value, strict=True)]


@torch.no_grad()
def test_blocks_reproduce_the_whole_model_and_show_its_attention(tiny_model: Path, tokens: Tensor) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = whole(tokens, output_hidden_states=True, use_cache=True)
    decoder = Decoder(tiny_model, Source(tiny_model))
    hidden = decoder.embed(tokens)
    recorder = Recorder()
    for index in range(3):
        assert torch.allclose(hidden, expected.hidden_states[index], atol=1e-4)
        with decoder.loaded(index) as block:
            decoder.advance(index, block, hidden, recorder)
        assert all(parameter.is_meta for parameter in decoder.blocks[index].parameters()), "weights must not stay"
    normed = whole.model.norm(hidden)
    assert torch.allclose(normed, expected.hidden_states[3], atol=1e-3)
    assert [layer for layer, *_ in recorder.seen] == [0] * 5 + [1] * 5 + [2] * 5
    for position, (layer, query, key, value) in enumerate(recorder.seen):
        sequence = position % 5
        cached = expected.past_key_values.layers[layer]
        assert query.shape == (40, 2, 64)
        assert torch.allclose(key, cached.keys[sequence].transpose(0, 1), atol=1e-3)
        assert torch.allclose(value, cached.values[sequence].transpose(0, 1), atol=1e-3)
    assert kv_geometry(decoder.config) == (3, 1, 64)


@torch.no_grad()
def test_statistics_are_those_of_the_layers_inputs(tiny_model: Path, tokens: Tensor) -> None:
    decoder = Decoder(tiny_model, Source(tiny_model))
    hidden = decoder.embed(tokens)
    with decoder.loaded(0) as block:
        stages = find_stages(decoder, 0, block, hidden)
        assert [stage.names for stage in stages] == [
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ]
        assert [stage.joins_residual for stage in stages] == [False, True, False, True]
        original = clone(block)
        block.get_submodule("self_attn.v_proj").weight.mul_(0.9)
        other = hidden + 0.01

        def inputs(module: torch.nn.Module, start: Tensor) -> tuple[Tensor, Tensor]:
            found: dict[str, Tensor] = {}
            hooks = [
                module.get_submodule("mlp.down_proj").register_forward_pre_hook(lambda m, a: found.update(x=a[0])),
                module.get_submodule("self_attn.o_proj").register_forward_hook(lambda m, a, o: found.update(o=o)),
            ]
            batches = []
            for begin in range(0, 5, 2):
                decoder.run(0, module, start[begin : begin + 2])
                batches.append((found["x"].flatten(0, 1), (start[begin : begin + 2] + found["o"]).flatten(0, 1)))
            for hook in hooks:
                hook.remove()
            return torch.cat([x for x, _ in batches]), torch.cat([r for _, r in batches])

        x, r = inputs(block, hidden)
        x_original, r_original = inputs(original, other)
        found = stage_statistics(decoder, 0, block, hidden, stages=stages, position=3, original=(original, other))
        assert found.residual is not None
        assert torch.allclose(found.hessian, x.T @ x / 200, atol=1e-5)
        assert torch.equal(found.hessian, found.hessian.T)
        # Down makes fewer channels of more: what its inputs lost is counted in its outputs.
        assert found.cross is None
        weight = block.get_submodule("mlp.down_proj").weight
        lost = r_original - r + (x_original - x) @ weight.T
        assert torch.allclose(found.residual, lost.T @ x / 200, atol=1e-5)
        before = stage_statistics(decoder, 0, block, hidden, stages=stages, position=2, original=(original, other))
        assert before.cross is not None
        assert before.residual is None
        alone = stage_statistics(decoder, 0, block, hidden, stages=stages, position=0)
        assert alone.cross is None
        assert alone.hessian.shape == (128, 128)


@torch.no_grad()
def test_one_pass_gathers_what_a_pass_for_each_stage_does(tiny_model: Path, tokens: Tensor) -> None:
    decoder = Decoder(tiny_model, Source(tiny_model))
    hidden = decoder.embed(tokens)
    with decoder.loaded(0) as block:
        stages = find_stages(decoder, 0, block, hidden)
        together = statistics_at_once(decoder, 0, block, hidden, stages=stages, positions=[0, 2, 3])
        assert list(together) == [0, 2, 3]
        for position, found in together.items():
            alone = stage_statistics(decoder, 0, block, hidden, stages=stages, position=position, ranges=True)
            assert torch.equal(found.hessian, alone.hessian)
            assert found.ranges is not None
            assert alone.ranges is not None
            for one, other in zip(vars(found.ranges).values(), vars(alone.ranges).values(), strict=True):
                assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("bfloat16", [False, True], ids=["slow in bfloat16", "quick in bfloat16"])
def test_blocks_multiply_in_bfloat16_only_where_told_and_where_that_is_quick(
    tiny_model: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, bfloat16: bool
) -> None:
    monkeypatch.setattr(calibrator, "quick_dtype", lambda device: torch.bfloat16 if bfloat16 else torch.float32)
    decoder = Decoder(tiny_model, Source(tiny_model))
    hidden = decoder.embed(tokens)
    seen: dict[str, torch.dtype] = {}
    with decoder.loaded(0) as block:
        stages = find_stages(decoder, 0, block, hidden)
        exact = stage_statistics(decoder, 0, block, hidden, stages=stages, position=3)
        end = decoder.run(0, block, hidden[:2])
        with decoder.rounded():
            assert torch.equal(decoder.run(0, block, hidden[:2]), end), "it was not told to"
        decoder.rounds = True
        layer = block.get_submodule("mlp.down_proj")
        hook = layer.register_forward_hook(lambda module, args, output: seen.update(output=output.dtype))
        assert torch.equal(decoder.run(0, block, hidden[:2]), end), "outside of the context"
        with decoder.rounded():
            rounded_end = decoder.run(0, block, hidden[:2])
        hook.remove()
        rounded = stage_statistics(decoder, 0, block, hidden, stages=stages, position=3)
    assert seen["output"] == (torch.bfloat16 if bfloat16 else torch.float32)
    assert rounded_end.dtype == rounded.hessian.dtype == torch.float32
    assert torch.equal(rounded.hessian, exact.hessian) != bfloat16
    assert torch.allclose(rounded_end, end, atol=0.01 * end.abs().max().item())
    assert torch.allclose(rounded.hessian, exact.hessian, atol=0.01 * exact.hessian.abs().max().item())


def test_rotary_frequencies_are_the_models(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from quant_methods.calibration.kv_observer import kv_rotary

    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, num_hidden_layers=1, vocab_size=32, intermediate_size=64,
        rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}, max_position_embeddings=4096,
    )  # fmt: skip
    rotary = kv_rotary(LlamaForCausalLM(config).get_decoder(), config)
    expected = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    assert torch.allclose(rotary.inv_freq, expected)
    assert (rotary.max_position, rotary.interleaved) == (4096, False)
