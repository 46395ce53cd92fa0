"""The script that holds the load test's times against the mock's log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest import accuracy
from loadtest.errors import LoadTestError
from loadtest.mock_server.token_log import Served
from loadtest.results.records import Record


def planted(count: int, late_s: float, read_s: float) -> tuple[list[Record], list[Served]]:
    """A client that sends and reads late by so much; the mock's tokens leave after 0.2, 0.22 and 0.24 s."""
    records, log = [], []
    for i in range(count):
        due = 1000.0 + i / 10
        tokens = [due + late_s + delay for delay in (0.2, 0.22, 0.24)]
        seen = [token - due + read_s for token in tokens]
        records.append(Record(0, i, False, due, late_s, seen[0], seen[-1], seen[-1], seen))
        log.append(Served(i, due + late_s, due + late_s, tokens, [1, 1, 1], tokens[-1]))
    return records, log


def test_what_the_client_adds_is_found() -> None:
    records, log = planted(40, late_s=0.003, read_s=0.002)
    warmup = [Record(0, i, True, 990.0, 0.0, 9.0, 9.0, 9.0, [9.0]) for i in range(3)]
    early = [Served(i, 990.0, 990.0, [999.0], [1], 999.0) for i in range(3)]
    rows = {row.name: row for row in accuracy.compare(warmup + records, early + log)}
    assert rows["TTFT"].client.p50 == pytest.approx(205, abs=0.01)
    assert rows["TTFT"].mock.p95 == pytest.approx(200, abs=0.01)
    for name, added in (("TTFT", 5), ("TTFT from send", 2), ("ITL", 0), ("end to end", 5)):
        assert rows[name].difference["p50"] == pytest.approx(added, abs=0.01), name
        assert rows[name].difference["p95"] == pytest.approx(added, abs=0.01), name


def test_other_requests_than_those_of_the_log_are_refused() -> None:
    records, log = planted(10, 0.0, 0.0)
    with pytest.raises(LoadTestError, match="10 requests were measured, and 9 answered by the mock"):
        accuracy.compare(records, log[1:])


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, why in (
        (["--out", str(tmp_path / "gone" / "x.json")], "there is no folder"),
        (["--out", str(tmp_path / "x.json"), "--rate", "0"], "must be above 0"),
    ):
        with pytest.raises(SystemExit) as left:
            accuracy.main(words)
        assert left.value.code == 2
        assert why in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_it_measures_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    words = f"--rate 20 --duration 2 --output-tokens 3 --out {out}".split()
    # Limits that hold on any machine, and one that holds on none.
    assert accuracy.main([*words, "--p50-ms", "1e9", "--p95-ms", "1e9"]) == 0
    assert accuracy.main([*words, "--p50-ms", "1e-9", "--p95-ms", "1e9"]) == 1
    found = json.loads(out.read_text())
    assert found["schema"] == accuracy.SCHEMA
    assert [bar["holds"] for bar in found["bars"]] == [False, True]
    assert found["requests"]["ok"] == found["rows_ms"][0]["mock"]["count"] > 20
    assert found["cpu"]["us_per_chunk"] > 0
    assert "TTFT P50" in capsys.readouterr().out
