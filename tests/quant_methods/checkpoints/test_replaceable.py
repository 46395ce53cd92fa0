"""--overwrite: replaces checkpoints and unfinished runs of ours, and leaves everything else where it is."""

from pathlib import Path

import pytest

from kv_cache.errors import ParetoError
from quant_methods.checkpoints.replaceable import RECIPE_FILE
from quant_methods.compress import check_out, compress
from quant_methods.methods.rtn import RTN
from quant_methods.recipe import Calibration, Recipe

RECIPE = Recipe(
    "test", steps=(RTN(bits=4, group_size=32),), kv_scales=True, calibration=Calibration(num_samples=2, length=32)
)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the current folder one that no test names as its output."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def refused(model: Path, out: Path, text: Path, match: str) -> None:
    before = files(out.parent)
    with pytest.raises(ParetoError, match=match) as caught:
        compress(model, RECIPE, out, text=text, overwrite=True)
    assert "\n" not in str(caught.value)
    assert files(out.parent) == before


def test_a_checkpoint_of_ours_is_replaced(tiny_model: Path, text_file: Path, elsewhere: Path) -> None:
    out = elsewhere / "out"
    for _ in range(2):
        compress(tiny_model, RECIPE, out, text=text_file, overwrite=True)
    assert (out / "kv_scales" / "scales.safetensors").is_file()


@pytest.mark.parametrize("name", ["notes.txt", "model.txt", "other/model.safetensors", "kv_scales/mine.txt"])
def test_a_file_of_someone_else_beside_a_checkpoint_stays(
    tiny_model: Path, text_file: Path, elsewhere: Path, name: str
) -> None:
    out = elsewhere / "out"
    compress(tiny_model, RECIPE, out, text=text_file)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    refused(tiny_model, out, text_file, f"also holds {name}")


def test_a_folder_of_models_stays(tiny_model: Path, text_file: Path, elsewhere: Path) -> None:
    (elsewhere / "models" / "other").mkdir(parents=True)
    (elsewhere / "models" / "other" / "model.safetensors").write_text("weights")
    refused(tiny_model, elsewhere / "models", text_file, "no checkpoint that pareto wrote")
    (elsewhere / "models" / RECIPE_FILE).write_text("{}")
    refused(tiny_model, elsewhere / "models", text_file, "also holds other/model.safetensors")


def test_folders_without_files_and_files_stay(tiny_model: Path, text_file: Path, elsewhere: Path) -> None:
    (elsewhere / "a" / "b").mkdir(parents=True)
    refused(tiny_model, elsewhere / "a", text_file, "holds other folders")
    (elsewhere / "file").write_text("mine")
    refused(tiny_model, elsewhere / "file", text_file, "not a folder")


def test_a_state_directory_that_is_none_stays(tiny_model: Path, text_file: Path, elsewhere: Path) -> None:
    (elsewhere / "out.partial").mkdir()
    (elsewhere / "out.partial" / "draft.txt").write_text("mine")
    refused(tiny_model, elsewhere / "out", text_file, "holds draft.txt, which pareto did not write")


def test_what_has_to_stay_is_never_below_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, text_file: Path
) -> None:
    home = tmp_path / "h" / "home"
    (home / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    for out, model, text, match in (
        (tiny_model, tiny_model, text_file, "is the model itself"),
        (tiny_model.parent, tiny_model, text_file, "holds the model"),
        (home / "work", tiny_model, text_file, "is the current folder itself"),
        (home, tiny_model, text_file, "holds the current folder"),
        (text_file.parent, tiny_model, text_file, "holds the calibration text"),
    ):
        with pytest.raises(ParetoError, match=match):
            check_out(out, model, overwrite=True, text=text)
    monkeypatch.chdir("/")
    with pytest.raises(ParetoError, match="holds the home folder"):
        check_out(tmp_path / "h", tiny_model, overwrite=True)


def test_what_appears_while_a_run_lasts_stays(tiny_model: Path, text_file: Path, elsewhere: Path) -> None:
    out = elsewhere / "out"

    def progress(done: int, total: int, what: str) -> None:
        if what == "writing the checkpoint":
            out.mkdir(exist_ok=True)
            (out / "late.txt").write_text("mine")

    with pytest.raises(ParetoError, match=r"it has late\.txt"):
        compress(tiny_model, RECIPE, out, text=text_file, progress=progress)
    assert (out / "late.txt").read_text() == "mine"
