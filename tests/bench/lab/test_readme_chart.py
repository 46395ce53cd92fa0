"""The chart of the README is drawn from committed results, and from nothing that only looks like them."""

from pathlib import Path

import pytest

from bench.lab import readme_chart
from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS

RESULTS = Path(__file__).parents[3] / "results"
STUDY = RESULTS / "kv-study" / "smollm2" / "kv-study.json"
SPEED = [
    RESULTS / "gpu-kv-bench-few-bits" / "kv-bench.json",
    RESULTS / "gpu-kv-bench-few-bits" / "beside-int4-per-token-head.json",
    RESULTS / "gpu-kv-bench" / "kv-bench.json",
]


def test_a_dtype_is_taken_from_the_first_file_that_has_it():
    _, speed = readme_chart.read(STUDY, SPEED)
    times = readme_chart.steps(speed, (32, 8192))
    assert set(times) == {"bf16", "int4_per_token_head", *FORMATS}
    assert times["bf16"] == 1
    # The README's figures: 4 bits of the present run, 8 bits of the older one, vLLM's of the one between.
    assert [round(times[n], 2) for n in ("int4_per_head", "int8_per_head", "int4_per_token_head")] == [0.57, 0.71, 2.44]
    with pytest.raises(ParetoError, match="no file measured the shape 3x5"):
        readme_chart.steps(speed, (3, 5))


def test_the_picture_is_small(tmp_path, capsys):
    out = tmp_path / "new" / "chart.png"
    assert readme_chart.main([str(STUDY), *map(str, SPEED), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert out.stat().st_size < 60_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([str(STUDY), str(STUDY)], "not a result of pareto eval"),
        ([str(SPEED[0]), str(SPEED[0])], "kv-bench.json"),
        ([str(STUDY), str(SPEED[0]), "--shape", "8"], "write sequences x tokens, such as 32x8192"),
    ],
)
def test_other_files_are_refused_in_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        readme_chart.main([*words, "--out", str(tmp_path / "x.png")])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert message in said, said
    assert said.startswith("readme_chart: error: ")
    assert len(said.splitlines()) == 1
