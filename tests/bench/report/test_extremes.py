from bench.report.figures import Figure
from bench.report.rows import Row
from bench.report.table import cells, columns, console


def test_extremes_over_rounds_stand_below_the_median_on_the_page_and_in_the_console():
    row = Row("m, int4 KV", "m", "int4", load="4 users")
    row.figures = {
        "ttft_p50_ms": Figure(210, "", None, 200, 220, 3),
        "ttft_p95_ms": Figure(330, "", None, 300, 340, 3),
        "output_tokens_per_s": Figure(9, "1 failed", None, 8, 10, 3),
        "kv_tokens": Figure(1000),
    }
    grouped = columns()
    found = {heading: cell for (heading, _), cell in zip(grouped, cells(row, grouped), strict=True)}
    assert found["TTFT P50 / P95, ms"].sub == "200 to 220 / 300 to 340, at 4 users"
    assert found["output tokens/s"].sub == "1 failed"
    assert found["KV tokens"].sub == ""
    headings, (line,) = console([row])
    assert line[headings.index("TTFT P50 / P95, ms")] == "210 / 330\n200 to 220 / 300 to 340"
    assert line[headings.index("KV tokens")] == "1,000"
