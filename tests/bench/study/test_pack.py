import hashlib
import json
import tarfile

import pytest

from bench.study.outcome import conclude
from bench.study.pack import _unpacked, differences, pack, verify
from kv_cache.errors import ParetoError
from tests.bench.study.studies import Pretended, folder_of, graph_of
from tests.bench.study.test_run import carried_out
from tests.bench.study.test_verdicts import TASKS, answers, hypothesis

POINTS = {"weights": "w4", "kv": "auto"}


@pytest.fixture
def packed(tmp_path):
    graph = graph_of(tmp_path, tasks=TASKS, hypotheses=[hypothesis(points=POINTS)])
    folder = folder_of(tmp_path)
    fails = Pretended(folder, lambda s: "no room" if "seed 2" in s.name and s.kind == "load" else "", answers)
    progress = carried_out(graph, folder, fails)
    (next(folder.steps.glob("compress*")) / "out/model.safetensors").write_bytes(b"weights")
    page = conclude(graph, folder, tmp_path / "plan.yaml", progress)
    return pack(graph, folder, page, tmp_path / "plan.yaml"), graph, folder, page


def test_a_pack_is_checked_on_a_machine_that_has_nothing_else(packed, capsys):
    path, *_ = packed
    assert verify(path) == 0
    printed = capsys.readouterr().out
    assert "h falsified; 1 of 3 points improve" in printed
    assert "and the same page" in printed


def test_the_same_records_give_the_same_bytes(packed, tmp_path):
    path, graph, folder, page = packed
    first = path.read_bytes()
    assert pack(graph, folder, page, tmp_path / "plan.yaml").read_bytes() == first


def test_weights_are_named_by_their_hash_alone(packed):
    path, *_ = packed
    with tarfile.open(path) as tar:
        names = tar.getnames()
        manifest = json.load(tar.extractfile("try/pack.json"))
    assert not any(name.endswith(".safetensors") for name in names)
    (_, digest), *_ = [item for item in manifest["not_packed_sha256"].items() if item[0].endswith("safetensors")]
    assert digest == hashlib.sha256(b"weights").hexdigest()
    assert any(name.endswith("units.json") for name in names)
    assert manifest["command"][:3] == ["pareto", "study", "plan.yaml"]
    assert manifest["seeds"] == [0, 1, 2]


def changed(path, tmp_path, change):
    """The pack with its files' content by name changed."""
    root = _unpacked(path, tmp_path / "open")
    change(root)
    made = tmp_path / "changed.tar"
    with tarfile.open(made, "w") as tar:
        tar.add(root, "try")
    return made


def rehash(root):
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(root).as_posix()}\n" for p in files]
    (root / "SHA256SUMS").write_text("".join(lines))


def test_a_changed_record_is_found(packed, tmp_path, capsys):
    def change(root):
        file = next(root.glob("steps/quality*/out/units.json"))
        file.write_text(file.read_text().replace("3.1", "3.2"))
        next(root.glob("steps/load*/out/summary.json")).unlink()
        (root / "more.txt").write_text("x")

    assert verify(changed(packed[0], tmp_path, change)) == 1
    printed = capsys.readouterr().out
    assert "out/units.json was changed" in printed
    assert "summary.json is missing" in printed
    assert "more.txt is not of the pack" in printed


def test_a_verdict_that_the_records_do_not_give_is_found(packed, tmp_path, capsys):
    def change(root):
        file = root / "study.json"
        study = json.loads(file.read_text())
        study["hypotheses"][0]["verdict"] = "held"
        file.write_text(json.dumps(study))
        rehash(root)

    assert verify(changed(packed[0], tmp_path, change)) == 1
    printed = capsys.readouterr().out
    assert "hypotheses[0].verdict is held, and the records give falsified" in printed


def test_another_page_is_found(packed, tmp_path, capsys):
    def change(root):
        file = root / "study.html"
        file.write_text(file.read_text().replace("falsified", "held"))
        rehash(root)

    assert verify(changed(packed[0], tmp_path, change)) == 1
    assert "do not give the page" in capsys.readouterr().out


def test_a_page_of_another_commit_is_said_and_no_failure(packed, tmp_path, capsys):
    def change(root):
        (root / "study.html").write_text("drawn otherwise")
        manifest = json.loads((root / "pack.json").read_text())
        manifest["drawn_with"]["commit"] = "another"
        (root / "pack.json").write_text(json.dumps(manifest))
        rehash(root)

    assert verify(changed(packed[0], tmp_path, change)) == 0
    assert "the page is drawn otherwise here" in capsys.readouterr().out


def test_what_is_no_pack_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar")
    with pytest.raises(ParetoError, match="not a pack of pareto study"):
        verify(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("name", "kind"), [("../x", tarfile.REGTYPE), ("/tmp/x", tarfile.REGTYPE), ("x", tarfile.SYMTYPE)]
)
def test_a_pack_writes_nothing_outside_of_itself(tmp_path, name, kind):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(entry)
    with pytest.raises(ParetoError, match="is no file inside of it"):
        verify(tmp_path / "x.tar")
    assert not (tmp_path.parent / "x").exists()


def test_rounding_is_no_difference():
    assert differences({"a": [1.0, None]}, {"a": [1.0 + 1e-9, None]}) == []
    assert differences({"a": [1.0, None]}, {"a": [1.1, None]}) == ["a[0] is 1.0, and the records give 1.1"]
    assert differences({"a": 1}, {"b": 1}) == ["a is 1, and the records give None", "b is None, and the records give 1"]
