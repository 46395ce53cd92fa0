import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest

from bench.frontier import non_dominated
from bench.quality.schema import FailedConfiguration, Flips, TaskResult
from bench.report import command as report_command
from bench.report import metrics, plots, table
from bench.report import rows as rows_module
from bench.report.documents import collect
from bench.report.figures import NONE, Figure
from bench.report.metrics import Metric
from bench.report.page import render, task_table
from bench.report.rows import frontiers, make_rows, to_json
from bench.report.table import console
from bench.statistics import mean_estimate, proportion
from kv_cache.errors import ParetoError
from tests.bench.result_files import (
    configuration,
    eval_document,
    kv_bench_document,
    loadtest_document,
    serve_bench_document,
)
from vllm_ext.cli import build_parser


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    documents = {
        "eval/eval.json": eval_document(
            configuration(), configuration("fp8", 8, 0.03), configuration("int8_per_head", 8, 0.001),
            configuration("int4_per_head", 4, 0.02, needle=0.5),
        ),
        "a/summary.json": loadtest_document("ref-7m, bf16 KV"),
        "b/summary.json": loadtest_document("my own label", dtype="int4_per_head", ttft=30.0, rates=(150.0, 700.0)),
        "kv/kv-bench.json": kv_bench_document(auto=0.020, int4_per_head=0.010),
        "w4/pareto_recipe.json": {
            "model": "ref-7m", "model_sha256": "0", "recipe": {"steps": [{"method": "gptq", "bits": 4}]},
        },
        "w4/config.json": {"architectures": []},
    }  # fmt: skip
    for name, document in documents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(document))
    return folder


def report(*words):
    args = build_parser("report", report_command).parse_args([str(word) for word in words])
    return report_command.run(args)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 1)], [True]),
        ([(1, 3), (2, 2), (3, 1)], [True, True, True]),
        ([(1, 1), (2, 2), (1, 2), (2, 1)], [True, False, False, False]),
        ([(1, 1), (1, 1)], [True, True]),
        ([(1, 2), (2, 2), (3, 0)], [True, False, True]),
    ],
)
def test_frontier(points, expected):
    assert non_dominated(points) == expected


def test_results_of_all_commands_meet_in_one_row(results):
    inputs = collect([results])
    assert inputs.skipped == []
    rows, _ = make_rows(inputs, 1000)
    assert [row.name for row in rows] == [
        "ref-7m, bf16 KV", "ref-7m, fp8 KV", "ref-7m, int8_per_head KV", "ref-7m, int4_per_head KV",
    ]  # fmt: skip
    int4 = rows[-1]
    assert int4.get("kl") == pytest.approx(0.02)
    assert int4.get("needle") == 0.5
    assert int4.get("output_tokens_per_s") == 700
    assert int4.get("ttft_p95_ms") == pytest.approx(30 * 2 * 1.3)
    assert int4.load == "4 users"
    assert int4.get("step_ratio") == pytest.approx(2.0)
    assert int4.get("memory_bytes") == 6_800_000 * 2 + 1000 * 768
    assert rows[0].get("output_tokens_per_s") == 400


def test_frontiers_name_the_dominated(results):
    rows, _ = make_rows(collect([results]), 32_768)
    trade_offs = {f.key: f for f in frontiers(rows, 32_768)}
    assert set(trade_offs) == {"memory", "throughput", "decode"}
    on = {name: best for name, _, _, best in trade_offs["memory"].points}
    # fp8 takes the memory of int8_per_head and loses more.
    assert on == {"ref-7m, bf16 KV": True, "ref-7m, fp8 KV": False, "ref-7m, int8_per_head KV": True,
                  "ref-7m, int4_per_head KV": True}  # fmt: skip


class Page(HTMLParser):
    """Collects what a page refers to and checks that its elements are closed in order."""

    VOID = frozenset({"meta", "br", "path", "use", "rect", "line"})

    def __init__(self):
        super().__init__()
        self.references, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.references += [v for k, v in attributes if k in ("href", "src", "xlink:href") and not v.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_no_network(results, tmp_path):
    assert report(results, "--out", tmp_path / "r.html", "--title", "A <title> & more") == 0
    html = (tmp_path / "r.html").read_text()
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.references == []
    assert not re.search(r"@import|url\((?!#)", html)
    assert "A &lt;title&gt; &amp; more" in html
    text = " ".join(page.text)
    for expected in ("ref-7m, int4_per_head KV", "0.02000", "50.0%", "700", "2.00x", "gptq 4", "8,192"):
        assert expected in text, expected
    assert html.count("<svg") == 6
    # No marker colour is left: every colour follows the page's scheme.
    assert not re.search(r"#0[0-5]0[0-9a-f]{3}\b", html)
    ids = re.findall(r'<(?:clipPath|path|g) id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_the_data_file_holds_the_same(results, tmp_path):
    report(results, "--out", tmp_path / "r.html")
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["schema"] == "vllm-pareto/report/2"
    assert len(data["configurations"]) == 4
    points = next(f["points"] for f in data["frontiers"] if f["key"] == "memory")
    assert {p["name"]: p["on_frontier"] for p in points}["ref-7m, fp8 KV"] is False


def test_an_earlier_report_in_the_folder_is_no_input(results):
    report(results, "--out", results / "report.html")
    # Nor is what an evaluation keeps of every question for studies.
    (results / "eval" / "units.json").write_text('{"schema": "vllm-pareto/units/1"}')
    assert report(results, "--out", results / "report.html") == 0
    assert collect([results]).skipped == []


def test_unusable_files_get_one_clear_line_each(results, tmp_path, capsys):
    whole = (results / "eval/eval.json").read_text()
    bad = tmp_path / "bad"
    bad.mkdir()
    newer = whole.replace("vllm-pareto/eval/1", "vllm-pareto/eval/2")
    lacking = json.loads(whole)
    del lacking["configurations"][1]["kv_cache"]["tokens"]
    wrong = json.loads(whole)
    wrong["configurations"][0]["overall"]["perplexity"]["value"] = "many"
    cases = {
        "cut.json": (whole[: len(whole) // 2], "perhaps cut short"),
        "foreign.json": ('{"name": "something"}', "not a result of"),
        "list.json": ("[1, 2]", "not a result of"),
        "newer.json": (newer, "eval/2 is of another version"),
        "lacking.json": (json.dumps(lacking), "lacks or misspells a field"),
        "wrong.json": (json.dumps(wrong), "lacks or misspells a field"),
    }
    for name, (content, _) in cases.items():
        (bad / name).write_text(content)
    (bad / "binary.json").write_bytes(b"\xff\xfe\x00\x01")
    assert report(results, bad, tmp_path / "missing.json", "--out", tmp_path / "r.html") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(cases) + 2
    for name, (_, message) in cases.items():
        assert any(name in line and message in line for line in lines), name
    assert any("binary.json: not a JSON file" in line for line in lines)
    assert any("missing.json: no such file" in line for line in lines)
    with pytest.raises(ParetoError, match="no usable result files"):
        report(bad, "--out", tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_any_mix_will_do(results, tmp_path):
    for name, svgs in (("eval", 1), ("a", 3), ("kv", 0), ("w4", 0)):
        report(results / name, "--out", tmp_path / f"{name}.html")
        assert (tmp_path / f"{name}.html").read_text().count("<svg") == svgs, name


def test_kv_plots_draw_what_both_results_have(tmp_path):
    from PIL import Image

    from bench.speed import plots as kv_plots

    speed, quality = tmp_path / "speed.json", tmp_path / "quality.json"
    speed.write_text(json.dumps(kv_bench_document(auto=0.020, int4_per_head=0.010, fp8=0.015)))
    quality.write_text(json.dumps(eval_document(configuration(), configuration("int4_per_head", bits=4, kl=0.02))))
    assert kv_plots.main([str(speed), str(quality), "--out", str(tmp_path)]) == 0
    for name in ("kv-decode.png", "kv-trade-off.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.convert("L").getextrema()[0] < 128
    with pytest.raises(SystemExit):
        kv_plots.main([str(tmp_path / "absent.json"), str(quality), "--out", str(tmp_path)])


def written(folder, **documents):
    folder.mkdir()
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return collect([folder])


def test_two_models_of_the_same_short_name_stay_two(tmp_path):
    inputs = written(
        tmp_path / "r",
        one=eval_document(configuration(), configuration(kl=0.1, model="/a/w4", weight_bits=4.0)),
        two=eval_document(configuration(), configuration(kl=0.2, model="/b/w4", weight_bits=4.5)),
        # One server says which it is, the other's name is that of both.
        load1=loadtest_document("first", model="/b/w4", rates=(70.0,)),
        load2=loadtest_document("second", model="w4", rates=(50.0,)),
        bench=kv_bench_document(auto=0.020) | {"model": "/a/w4"},
    )
    rows, notes = make_rows(inputs, 1000)
    found = {row.name: row for row in rows}
    assert set(found) == {"ref-7m, bf16 KV", "a/w4, bf16 KV", "b/w4, bf16 KV", "w4, bf16 KV"}
    assert found["a/w4, bf16 KV"].get("kl") == pytest.approx(0.1)
    assert found["a/w4, bf16 KV"].get("step_ratio") == 1
    assert found["b/w4, bf16 KV"].get("output_tokens_per_s") == 70
    assert found["w4, bf16 KV"].get("output_tokens_per_s") == 50
    assert any("load2.json: 2 models are called 'w4'" in note for note in notes)


def test_the_same_weights_under_two_names_are_one_model(tmp_path):
    elsewhere = eval_document(configuration("fp8", 8, 0.03))
    elsewhere["configurations"][0]["model"]["name"] = "/copy/of/ref-7m"
    rows, _ = make_rows(written(tmp_path / "r", a=eval_document(configuration()), b=elsewhere), 1000)
    assert [row.name for row in rows] == ["ref-7m, bf16 KV", "ref-7m, fp8 KV"]
    # Different weights in one place, at different times, are told apart by their fingerprints.
    later = eval_document(configuration(kl=0.1, weight_bits=4.0))
    rows, _ = make_rows(written(tmp_path / "s", a=eval_document(configuration()), b=later), 1000)
    assert len({row.name for row in rows}) == 2
    assert all(re.fullmatch(r"ref-7m \[[0-9a-f]{8}\], bf16 KV", row.name) for row in rows)


def test_speed_is_compared_at_equal_load(tmp_path):
    four = loadtest_document("ref-7m, int4_per_head KV", dtype="int4_per_head", rates=(90.0, 300.0, 900.0))
    inputs = written(
        tmp_path / "r",
        quality=eval_document(configuration(), configuration("int4_per_head", 4, 0.02), configuration("fp8", 8, 0.03)),
        plain=loadtest_document("ref-7m, bf16 KV", rates=(100.0, 400.0)),
        four=four,
        # Other prompts: another load, whatever the number of users.
        fp8=loadtest_document("ref-7m, fp8 KV", dtype="fp8") | {"settings": {"prompt_tokens": "32000"}},
    )
    rows, notes = make_rows(inputs, 1000)
    loads = {row.kv_cache_dtype: (row.load, row.get("output_tokens_per_s")) for row in rows}
    assert loads == {"bf16": ("4 users", 400), "int4_per_head": ("4 users", 300), "fp8": (None, None)}
    assert [note for note in notes if note.startswith("ref-7m, fp8 KV: no load test under the load of the others")]
    throughput = next(f for f in frontiers(rows, 1000) if f.key == "throughput")
    assert throughput.x_label == "output tokens per second at 4 users"
    assert len(throughput.points) == 2


def test_what_could_not_be_measured_is_remarked_on(tmp_path):
    evaluated = eval_document(configuration())
    failed = FailedConfiguration("ref-7m, fp8 KV", configuration().model, "fp8", "no such dtype")
    evaluated["failed"] = [asdict(failed)]
    timed = kv_bench_document(auto=0.020, fp8=0.010)
    timed["dtypes"][1] |= {"error": "no kernel", "points": []}
    for name, document in (("eval.json", evaluated), ("kv-bench.json", timed)):
        (tmp_path / name).write_text(json.dumps(document))
    rows, notes = make_rows(collect([tmp_path]), 1000)
    assert [row.name for row in rows] == ["ref-7m, bf16 KV"]
    assert [note.rpartition("/")[2] for note in notes] == [
        "eval.json: ref-7m, fp8 KV could not be measured: no such dtype",
        "kv-bench.json: fp8 could not be measured: no kernel",
    ]


def test_the_consoles_table_has_dashes_for_what_was_not_measured(tmp_path):
    four = configuration("int4_per_head", 4, 0.0123)
    test = loadtest_document("ref-7m, int4_per_head KV", dtype="int4_per_head", ttft=10.4, rates=(1234.5,))
    test["stages"][0]["latency"]["tpot_ms"] = None
    inputs = written(tmp_path / "r", quality=eval_document(configuration(), replace(four, needle=None)), load=test)
    headings, lines = console(make_rows(inputs, 0)[0])
    assert headings == [
        "configuration", "weight bits", "KV bits", "KV tokens", "perplexity", "KL, nats", "needle",
        "TTFT P50 / P95, ms", "TPOT P50 / P95, ms", "output tokens/s",
    ]  # fmt: skip
    assert lines[0][5] == "0 (reference)"
    tokens = f"{four.kv_cache.tokens:,}"
    perplexity = f"{four.overall.perplexity.value:.3f}"
    assert lines[1] == [
        "ref-7m, int4_per_head KV", "16.00", "4.00", tokens, perplexity, "0.01230", NONE, "10.4 / 13.5", NONE, "1,234"
    ]  # fmt: skip


def test_tokens_that_nobody_counted_are_dashes(results, tmp_path):
    """A server without usage leaves the rate of tokens undefined, which is no reason to leave out its latencies."""
    file = results / "b" / "summary.json"
    test = json.loads(file.read_text())
    for stage in test["stages"]:
        stage["throughput"] |= {"output_tokens_per_s": None, "total_tokens_per_s": None}
    file.write_text(json.dumps(test))
    assert report(results, "--out", tmp_path / "r.html") == 0
    rows = json.loads((tmp_path / "r.json").read_text())["configurations"]
    (stages,) = [row["stages"] for row in rows if any("b/summary.json" in source for source in row["sources"])]
    assert stages
    assert all("ttft_p95_ms" in stage["figures"] and "output_tokens_per_s" not in stage["figures"] for stage in stages)


def test_one_entry_is_a_column(results, monkeypatch):
    """A metric that the list has is read, joined, shown on the page and the console, and written to JSON."""
    worst = Metric("kl_p99", "KL, worst 1%", "nats a token", "less", lambda v: f"{v:.2f} nats",
                   quality=lambda r: Figure.maybe(r.overall.kl_p99))  # fmt: skip
    longer = (*metrics.METRICS, worst)
    for module in (metrics, rows_module, table):
        monkeypatch.setattr(module, "METRICS", longer)
    monkeypatch.setitem(metrics.BY_KEY, "kl_p99", worst)
    rows, _ = make_rows(collect([results]), 0)
    assert "0.20 nats" in render("title", collect([results]), rows, [], [])
    assert console(rows)[1][-1][-1] == "0.20 nats"
    assert to_json(rows, [])["configurations"][-1]["figures"]["kl_p99"]["value"] == pytest.approx(0.2)


def test_speed_is_of_the_model_with_its_fingerprint(tmp_path):
    """Another model of the same name once got its figures, or they a row of their own."""
    mine = configuration(model="ref-7m", weight_bits=8.0)
    documents = {
        "a.json": eval_document(configuration(), mine),
        "b.json": kv_bench_document(fingerprint=mine.model.fingerprint, auto=0.020, fp8=0.010),
    }
    for name, document in documents.items():
        (tmp_path / name).write_text(json.dumps(document))
    rows, notes = make_rows(collect([tmp_path]), 1000)
    assert not [note for note in notes if "models are called" in note]
    measured = {(row.fingerprint, row.kv_cache_dtype) for row in rows if row.get("step_ratio")}
    assert measured == {(mine.model.fingerprint, "bf16"), (None, "fp8")}
    assert len({row.model for row in rows}) == 2


def test_tasks_stand_beside_their_baseline(tmp_path):
    def task(value, change=None, p=None):
        return TaskResult("arc_easy", "acc", "more", 100, proportion(value, 100), change, p, None, None, 1.0)

    base = replace(configuration(), tasks=[task(58)])
    four = replace(
        configuration("int4_per_head", 4, 0.02), tasks=[task(55, mean_estimate([-1.0] * 3 + [0.0] * 97), 0.25)]
    )
    inputs = written(tmp_path / "r", quality=eval_document(base, four, configuration("fp8", 8, 0.03)))
    rows, _ = make_rows(inputs, 0)
    found = task_table(inputs, rows)
    assert found["headings"] == ["task", "ref-7m, bf16 KV", "ref-7m, int4_per_head KV"]
    ((name, (plain, coded)),) = found["lines"]
    assert (name, plain.text, coded.text) == ("arc_easy, acc", "0.5800 ± 0.0494", "0.5500 ± 0.0497")
    assert coded.sub == "-0.0300, p 0.250"
    assert "-0.0300, p 0.250" in render("title", inputs, rows, [], [])
    judged = replace(four.tasks[0], p_holm=0.5, smallest=0.081, verdict="undecided", margin=0.01)
    flips = replace(task(5), metric="flips", flips=Flips(4, 1, 2))
    inputs = written(tmp_path / "t", quality=eval_document(base, replace(four, tasks=[judged, flips])))
    subs = [cells[1].sub for _, cells in task_table(inputs, rows)["lines"]]
    assert subs == [
        "-0.0300, p 0.250, Holm 0.500, smallest 0.0810, undecided (1 pt)",
        "4 right to wrong, 1 wrong to right, 2 wrong to wrong",
    ]
    assert task_table(written(tmp_path / "s", quality=eval_document(configuration())), rows[:1]) is None


def test_energy_and_memory_join_by_fingerprint_under_the_busiest_load(tmp_path):
    four = configuration("int4_per_head", 4, 0.02)
    served = serve_bench_document(four.model.fingerprint, auto=700.0, int4_per_head=400.0)
    folder = tmp_path / "r"
    inputs = written(folder, quality=eval_document(configuration(), four), served=served)
    assert inputs.skipped == []
    rows, notes = make_rows(inputs, 0)
    assert notes == []
    assert [row.name for row in rows] == ["ref-7m, bf16 KV", "ref-7m, int4_per_head KV"]
    assert {row.load for row in rows} == {"8 users of 2,048 tokens"}
    # 2,000 decoded tokens of 700 and 400 J, 150 of them for 500 prompt tokens; 50 W at rest.
    assert rows[0].get("decode_joules") == pytest.approx(550 / 2000)
    assert rows[1].get("decode_joules") == pytest.approx(250 / 2000)
    assert rows[1].get("decode_net_joules") == pytest.approx((400 - 100 - 100) / 2000)
    assert rows[1].get("prefill_joules") == pytest.approx(0.3)
    assert rows[1].get("e2e_p95_ms") == pytest.approx(400 * 1.3)
    assert rows[1].get("output_tokens_per_s") == 1050
    assert rows[1].get("peak_memory_bytes") == (1 << 30) + (1 << 24)
    trade_offs = {f.key: f for f in frontiers(rows, 0)}
    assert [on for *_, on in trade_offs["energy"].points] == [True, True]
    report(folder, "--out", tmp_path / "r.html")
    page = Page()
    page.feed((tmp_path / "r.html").read_text())
    text = " ".join(page.text)
    for expected in ("Quality against energy", "0.125 / 0.1", "memory and energy of the endpoint", "0.45x", "J/token"):
        assert expected in text, expected


def test_columns_without_figures_are_not_on_the_page(results, tmp_path):
    report(results, "--out", tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert "J/token" not in html
    assert "peak memory" not in html


def test_no_two_of_many_points_look_the_same():
    looks = [(plots.SERIES[i % len(plots.SERIES)], plots.marker(i)) for i in range(40)]
    assert len(set(looks)) == 40
