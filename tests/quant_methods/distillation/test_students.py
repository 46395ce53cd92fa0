import pytest
import torch
from safetensors.torch import load_file

from kv_cache.errors import ParetoError
from quant_methods.distillation import student
from quant_methods.distillation.cut import Sizes, cut, kept_heads
from quant_methods.distillation.importance import influence, measure
from quant_methods.distillation.in_memory import load_model
from tests.quant_methods.distillation.conftest import REF

TOKENS = torch.randint(4, 8000, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(teacher):
    return load_model(teacher, "cpu").eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


def test_all_of_a_teacher_is_the_teacher(model):
    everything = Sizes(layers=3, heads=4, kv_heads=2, intermediate=96, hidden=64)
    torch.testing.assert_close(logits(cut(model, everything, TOKENS).eval()), logits(model))


def test_the_blocks_that_do_least_are_left_out(model):
    # A block that puts out almost nothing turns its input by almost nothing.
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[1].get_submodule(name).weight.data.mul_(1e-3)
    found = influence(model, TOKENS)
    assert found.argmin() == 1
    made = cut(model, Sizes(layers=2), TOKENS).eval()
    assert made.config.num_hidden_layers == 2
    del model.model.layers[1]
    torch.testing.assert_close(logits(made), logits(model))


def test_channels_and_heads_that_do_nothing_are_left_out_first(model):
    """What writes nothing is cut without a change; its place differs from layer to layer."""
    for index, layer in enumerate(model.model.layers):
        dead = slice(index * 8, index * 8 + 16)
        layer.mlp.up_proj.weight.data[dead] = 0
        head = slice((2 * index % 4) * 64, (2 * index % 4 + 1) * 64)
        layer.self_attn.o_proj.weight.data[:, head] = 0
    before = logits(model)
    made = cut(model, Sizes(intermediate=80), TOKENS).eval()
    assert made.config.intermediate_size == 80
    torch.testing.assert_close(logits(made), before)
    found = measure(model, TOKENS)
    assert ((found.channels == 0).sum(1) == 16).all()


def test_hidden_channels_go_by_what_norms_put_out(model):
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[::2] *= 1e-3
    made = cut(model, Sizes(hidden=32), TOKENS)
    expected = model.model.embed_tokens.weight[:, 1::2]
    torch.testing.assert_close(made.model.embed_tokens.weight, expected.float())
    assert logits(made.eval()).shape[-1] == 8192


def test_heads_go_with_the_key_that_they_share():
    importance = torch.tensor([5.0, 1, 2, 3, 9, 0.3, 0.2, 0.1])
    assert kept_heads(importance, 4, 2, 2) == ([0, 4], [0, 2])
    assert kept_heads(importance, 2, 2, 4) == ([0, 3, 4, 5], [0, 1])
    assert kept_heads(importance, 2, 1, 4) == ([0, 1, 2, 3], [0])


def test_heads_are_cut_with_their_rows_and_columns(model):
    made = cut(model, Sizes(heads=2, kv_heads=1), TOKENS)
    attention = made.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (128, 64)
    assert attention.k_proj.weight.shape == (64, 64)
    assert attention.o_proj.weight.shape == (64, 128)
    assert made.config.head_dim == 64
    queries, keys = kept_heads(measure(model, TOKENS).heads[0], 2, 1, 2)
    own = model.model.layers[0].self_attn
    torch.testing.assert_close(attention.k_proj.weight, own.k_proj.weight.unflatten(0, (2, 64))[keys].flatten(0, 1))
    torch.testing.assert_close(attention.q_proj.weight, own.q_proj.weight.unflatten(0, (4, 64))[queries].flatten(0, 1))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (Sizes(layers=4), "--keep-layers 4: the teacher has 3"),
        (Sizes(hidden=0), "--keep-hidden 0: the teacher has 64"),
        (Sizes(heads=3), "--keep-heads 3 with 2 heads of keys and values: possible are 2, 4"),
        (Sizes(kv_heads=1, heads=4), "possible are 1, 2"),
    ],
)
def test_sizes_that_a_teacher_has_not_are_refused(model, sizes, said):
    with pytest.raises(ParetoError, match=said):
        cut(model, sizes, TOKENS)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ("hiden_size: 64", "unknown key 'hiden_size'; sizes: .*hidden_size"),
        ("- 1", "expected a mapping"),
        ("a: [", "is not valid YAML"),
        ("vocab_size: 10", "vocab_size 10 is not the teacher's 8192"),
        ("num_attention_heads: 3", "makes no model"),
    ],
)
def test_a_shape_that_makes_no_model_is_refused(teacher, tmp_path, shape, said):
    path = tmp_path / "shape.yaml"
    path.write_text(shape)
    with pytest.raises(ParetoError, match=said) as caught:
        student.fresh(teacher, path, 0)
    assert "\n" not in str(caught.value)


def test_a_missing_shape_is_told(teacher, tmp_path):
    with pytest.raises(ParetoError, match=r"none\.yaml: No such file"):
        student.fresh(teacher, tmp_path / "none.yaml", 0)


def test_a_fresh_student_follows_its_seed(teacher, tmp_path):
    path = tmp_path / "shape.yaml"
    path.write_text("num_hidden_layers: 1")
    one, same, other = (student.fresh(teacher, path, seed).state_dict() for seed in (0, 0, 1))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


def test_a_student_with_other_tokens_is_refused(teacher, tmp_path):
    student.save(load_model(teacher, "cpu"), teacher, tmp_path / "other", torch.float32)
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"#":6,"$":7,', '"#":7,"$":6,'))
    with pytest.raises(ParetoError, match=r"another tokenizer than .*: 2 of 8,192 tokens differ"):
        student.check_tokenizer(teacher, tmp_path / "other")
    student.check_tokenizer(teacher, teacher)


def test_a_head_that_is_the_embedding_is_stored_once(tmp_path):
    """In another dtype than the model's too, in which both would be copies."""
    (tmp_path / "shape.yaml").write_text("hidden_size: 32\nnum_hidden_layers: 1\n")
    model = student.fresh(REF, tmp_path / "shape.yaml", 0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    student.save(model, REF, tmp_path / "out", torch.bfloat16)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in model.parameters())
    found = load_model(tmp_path / "out", "cpu")
    assert torch.equal(found.lm_head.weight, model.lm_head.weight.bfloat16().float())
