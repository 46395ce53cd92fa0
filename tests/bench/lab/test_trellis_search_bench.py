"""The bench of the search for trellis codes' streams, on a CPU."""

from bench.lab import trellis_search_bench


def test_a_table_of_both_kinds_of_weights(capsys):
    assert trellis_search_bench.main(["--bits", "4", "--tiles", "2", "--repeats", "1", "--device", "cpu"]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row[2] for row in rows[2:]] == ["all 1", "own"]
    assert len({len(row) for row in rows}) == 1
    for row in rows[2:]:
        assert float(row[6].replace(",", "")) > 0
        assert 0.002 < float(row[7]) < 0.008


def test_numbers_that_are_none_are_refused(capsys):
    assert trellis_search_bench.main(["--tiles", "0"]) == 2
    assert "numbers from 1 on" in capsys.readouterr().err
