"""The folder rules: imports point downwards only, and only vllm_ext and bench know vLLM."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "kv_cache": set(),
    "quant_methods": {"kv_cache"},
    "vllm_ext": {"kv_cache", "quant_methods"},
    "bench": {"kv_cache", "quant_methods", "vllm_ext"},
    "loadtest": set(),
}
ENGINE = {"vllm"}
MAY_IMPORT_ENGINE = {"vllm_ext", "bench"}
# What the plugin may know of offline compression: where a model lies, how it is stored and multiplied; not how it is
# compressed. These modules import no others of their room.
QUANT_METHODS_FOR_PLUGIN = {f"quant_methods.{name}" for name in (
    "model_source", "native_format", "quantized", "grid", "shards", "kernels.low_bit", "kernels.low_bit_cuda",
    "kernels.low_bit_layout", "kernels.sparse",
)}  # fmt: skip
FOREIGN = {
    "kv_cache": {"transformers", "compressed_tensors", "locust", "vllm", "lm_eval"},
    "quant_methods": {"locust", "vllm", "lm_eval"},
    "vllm_ext": {"locust", "lm_eval"},
    "bench": {"locust"},
    "loadtest": {"torch", "transformers", "vllm", "compressed_tensors", "lm_eval", "triton"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: relative import"
            found.add(node.module)
    return found


def files() -> list[tuple[str, Path]]:
    return [(room, path) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def test_every_room_is_there():
    assert {room for room, _ in files()} == set(ROOMS)


@pytest.mark.parametrize(("room", "path"), files(), ids=lambda x: str(x).removeprefix(f"{ROOT}/"))
def test_imports_point_downwards(room, path):
    found = imports(path)
    tops = {name.partition(".")[0] for name in found}
    assert tops & set(ROOMS) <= ROOMS[room] | {room}
    assert not tops & FOREIGN[room]
    if room not in MAY_IMPORT_ENGINE:
        assert not tops & ENGINE
    if room == "vllm_ext":
        assert {name for name in found if name.startswith("quant_methods")} <= QUANT_METHODS_FOR_PLUGIN


def test_the_formats_do_not_drag_the_calibrator_in():
    for module in QUANT_METHODS_FOR_PLUGIN:
        found = imports(ROOT / f"{module.replace('.', '/')}.py")
        assert {name for name in found if name.startswith("quant_methods")} <= QUANT_METHODS_FOR_PLUGIN
        assert not {name.partition(".")[0] for name in found} & {"transformers", "compressed_tensors"}


def test_the_rule_sees_a_forbidden_import(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from bench.evaluate import evaluate\n    import vllm.config\n")
    assert imports(bad) == {"bench.evaluate", "vllm.config"}


def test_tests_mirror_the_rooms():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ROOMS) | {"end_to_end"}
