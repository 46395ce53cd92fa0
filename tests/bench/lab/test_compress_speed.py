"""Time of compression: a shape of a few weights, compressed for real, on the CPU."""

import json
from pathlib import Path

import pytest

from bench.lab import compress_speed

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 8192,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.long
def test_a_cut_shape_is_compressed_and_what_it_cost_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape, text = tmp_path / "shape", tmp_path / "text.txt"
    shape.mkdir()
    (shape / "config.json").write_text(json.dumps(CONFIG))
    text.write_text("Some words to calibrate on. " * 100)
    words = [
        str(shape), "--text", str(text), "--device", "cpu", "--blocks", "2", "--num-sequences", "2", "--length", "32",
        "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    # One line that cannot be done keeps the other from nothing.
    assert compress_speed.main([*words, "--lines", "pareto:gptq-w4-g32", "pareto:no-such-recipe"]) == 2
    (file,) = (tmp_path / "out").glob("*.json")
    result = json.loads(file.read_text())
    assert result["settings"]["blocks"] == result["settings"]["of"] == 2
    assert result["settings"]["recipe"]["calibration"] == {"num_samples": 2, "length": 32, "seed": 0}
    assert result["cost"]["seconds"] > 0
    assert result["cost"]["peak_memory"] > 1e8
    said = capsys.readouterr()
    assert "| gptq-w4-g32 | pareto | 2 of 2 |" in said.out
    assert "pareto:no-such-recipe: unknown recipe" in said.err
    # The random checkpoint stays for the next run, and what was made of it does not.
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["random-2"]


def test_tools_that_nobody_knows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["shape", "--text", "x", "--out", str(tmp_path), "--lines", "gptqmodel:gptq-w4"]
    assert compress_speed.main(words) == 2
    assert "--lines gptqmodel:gptq-w4: unknown tool 'gptqmodel'" in capsys.readouterr().err
