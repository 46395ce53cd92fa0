import random
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from bench.schema import Estimate
from bench.study import compare
from bench.study.outcome import conclude, finder, judge
from bench.study.samples import Sample
from tests.bench.study.studies import Pretended, folder_of, graph_of
from tests.bench.study.test_run import carried_out


def sample(*runs, **others):
    return Sample("m", "more", tuple({str(i): float(v) for i, v in enumerate(run)} for run in runs), **others)


def test_one_run_is_compared_question_by_question():
    tested, base = sample([1, 0, 1, 1, 1, 1, 1, 1]), sample([0, 1, 0, 0, 0, 0, 0, 0])
    change, p = compare.difference(tested, base)
    assert change.value == pytest.approx(6 / 8)
    # McNemar's exact test: 7 gained and 1 lost.
    assert p == pytest.approx(2 * (1 + 8) / 2**8)


def test_what_has_one_run_stands_beside_every_run_of_the_other():
    runs = [[5.0, 6.0, 7.0], [5.2, 6.2, 7.2], [4.8, 5.8, 6.8]]
    change, p = compare.difference(sample(*runs), sample([4.0, 5.0, 6.0]))
    assert change.value == pytest.approx(1.0)
    # All that varies is the seed: the t-test of the three runs' means.
    expected = stats.ttest_1samp([1.0, 1.2, 0.8], 0)
    assert p == pytest.approx(expected.pvalue, rel=0.05)
    assert (change.low, change.high) == pytest.approx(expected.confidence_interval(), rel=0.05)


def test_figures_of_one_number_a_run_are_compared_run_by_run():
    tested, base = sample([110.0], [121.0], [99.0]), sample([100.0], [110.0], [90.0])
    estimate, p = compare.ratio(tested, base)
    assert estimate.value == pytest.approx(1.1)
    assert estimate.low == pytest.approx(1.1)
    assert p == pytest.approx(0, abs=1e-6)
    _, p = compare.difference(tested, base)
    assert p == pytest.approx(stats.ttest_rel([110, 121, 99], [100, 110, 90]).pvalue)


def test_fewer_than_three_runs_of_one_number_have_no_error():
    found, p = compare.difference(sample([1.0], [1.1]), sample([2.0], [2.1]))
    assert (found.standard_error, p) == (None, None)
    assert compare.interval(found, 0.95) is None


def test_other_units_do_not_compare():
    assert compare.difference(sample([1.0, 2.0]), sample([1.0, 2.0, 3.0])) is None


def test_the_ratio_of_perplexities_is_exp_of_the_difference():
    tested = sample([3.1, 3.3, 3.2, 3.4], log=True)
    estimate, _ = compare.ratio(tested, sample([3.0, 3.2, 3.1, 3.2], log=True))
    assert estimate.value == pytest.approx(np.exp(0.125))
    assert estimate.low < estimate.value < estimate.high
    assert compare.difference(tested, tested) is None


def test_a_ratio_of_means_has_the_error_of_a_simulation(fresh_numbers):
    rng = np.random.default_rng(random.randrange(2**31))
    base = rng.uniform(1, 3, 400)
    tested = 1.3 * base + rng.normal(0, 0.3, 400)
    estimate, _ = compare.ratio(sample(tested), sample(base))
    drawn = rng.integers(0, 400, (4000, 400))
    ratios = tested[drawn].mean(1) / base[drawn].mean(1)
    assert estimate.standard_error == pytest.approx(float(ratios.std()), rel=0.1)


def test_what_is_exact_needs_no_runs():
    estimate, p = compare.ratio(sample([4.0], exact=True), sample([16.0], exact=True))
    assert (estimate.value, estimate.low, estimate.high, p) == (0.25, 0.25, 0.25, None)


def test_an_interval_at_another_confidence_follows_its_degrees_of_freedom():
    error, nu = 0.5, 4
    reach = stats.t.ppf(0.975, nu) * error
    found = Estimate(2.0, error, 2 - reach, 2 + reach, 5)
    assert compare.degrees(found) == pytest.approx(nu)
    low, high = compare.interval(found, 0.99)
    assert high - low == pytest.approx(2 * stats.t.ppf(0.995, nu) * error)
    assert compare.two_sided(found) == pytest.approx(2 * stats.t.sf(4, nu))
    assert compare.beyond(found, 1.0) == pytest.approx(stats.t.sf(2, nu))
    assert compare.beyond(compare.negated(found), -3.0) == pytest.approx(stats.t.sf(2, nu))


def test_questions_of_one_document_are_no_independent_samples():
    values = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    shared = {str(i): f"d{i // 3}" for i in range(12)}
    alone, together = sample(values), sample(values, documents=shared)
    assert compare.value(together).n == 4
    assert compare.value(together).standard_error > 1.5 * compare.value(alone).standard_error
    base = sample([0.5] * 12)
    runs = [[v + 0.01 * seed for v in values] for seed in (0, 1, 2)]
    change, _ = compare.difference(sample(*runs, documents=shared), base)
    # The same as of documents in place of questions.
    whole = [[run[3 * i] for i in range(4)] for run in runs]
    expected, _ = compare.difference(sample(*whole), sample([0.5] * 4))
    assert change.value == pytest.approx(expected.value)
    assert change.standard_error == pytest.approx(expected.standard_error)


TASKS = [{"tasks": ["arc_easy"]}]


def answers(step, is_base):
    """1,000 questions; weights of 4 bits lose 150 of them, a coded cache none, and seeds change one or two."""
    seed = int(step.key[-1], 16) % 2
    lost = 0 if is_base or not step.determines["weights"].startswith("compress") else 150 + seed
    return {f"q{i}": float(i % 2 == 0 and i // 2 >= lost) for i in range(1000)}


def judged(tmp_path, accuracy=answers, **changes):
    graph, folder = graph_of(tmp_path, **changes), folder_of(tmp_path)
    progress = carried_out(graph, folder, Pretended(folder, accuracy=accuracy))
    study, _ = judge(graph, finder(graph, folder, progress.states), folder, progress.states, "")
    return study, graph, folder, progress


def hypothesis(**changes):
    return {"name": "h", "claim": "c", "metric": "arc_easy/acc", "relation": "at_least", "bound": -0.05} | changes


def test_points_that_lose_nothing_and_gain_speed_improve(tmp_path):
    study, *_ = judged(tmp_path, tasks=TASKS)
    found = {one.point: one for one in study.improvements}
    coded = found["ref-7m, int4_per_head KV"]
    assert (coded.quality, coded.improves, coded.why_not) == ("accuracy", True, "")
    assert coded.costs["output_tokens_per_s"] == pytest.approx(1.5, rel=0.02)
    assert coded.p_cost == 0.0
    assert coded.p_holm == pytest.approx(coded.p * 3) or coded.p_holm < 0.05
    lossy = found["ref-7m, w4, int4_per_head KV"]
    assert not lossy.improves
    assert lossy.why_not == "accuracy may be worse by more than the margin"
    worse = {(one.point, one.metric): one for one in study.comparisons}["ref-7m, w4, bf16 KV", "arc_easy/acc"]
    assert worse.verdict == "worse"
    assert worse.change.value == pytest.approx(-0.15, abs=0.01)


def of_a_group(step, is_base):
    """The questions above as those of a group of ten tasks, which has a score."""
    units = answers(step, is_base)
    parts = {f"mmlu_{part}": {unit: units[unit] for unit in list(units)[part::10]} for part in range(10)}
    return parts | {"mmlu": units}


@pytest.mark.parametrize(
    ("named", "tested"),
    [
        (["mmlu"], ["mmlu/acc"]),
        (["mmlu_*"], [f"mmlu_{part}/acc" for part in range(10)]),
        # One name has no score of its own (as a tag of lm-eval): its tasks cannot be told from the others.
        (["mmlu", "some_tag"], [*(f"mmlu_{part}/acc" for part in range(10)), "mmlu/acc"]),
    ],
)
def test_parts_of_a_group_are_shown_and_not_tested(tmp_path, named, tested):
    study, graph, folder, progress = judged(tmp_path, accuracy=of_a_group, tasks=[{"tasks": named}])
    point = "ref-7m, int4_per_head KV"
    assert [one.metric for one in study.comparisons if one.point == point and "/" in one.metric] == tested
    text = conclude(graph, folder, tmp_path / "plan.yaml", progress).read_text()
    assert all(f"mmlu_{part}/acc" in text for part in range(10))
    assert ("10 tasks that are part of one of these" in text) == (named == ["mmlu"])


def test_the_page_leaves_out_what_all_names_begin_with(tmp_path):
    study, graph, folder, progress = judged(tmp_path, tasks=TASKS)
    text = conclude(graph, folder, tmp_path / "plan.yaml", progress).read_text()
    assert '<th scope="row">w4, int4_per_head KV</th>' in text
    assert '<th scope="row">ref-7m, ' not in text
    assert "ref-7m, w4, int4_per_head KV" in {one.point for one in study.improvements}


def test_a_point_that_has_a_seed_needs_three_runs(tmp_path):
    study, *_ = judged(tmp_path, tasks=TASKS, runs=2, hypotheses=[hypothesis(points={"weights": "w4", "kv": "auto"})])
    found = {one.point: one for one in study.improvements}
    assert found["ref-7m, int4_per_head KV"].improves
    assert found["ref-7m, w4, bf16 KV"].why_not == "2 of at least 3 runs with other seeds"
    assert study.hypotheses[0].verdict == "not decidable"
    assert study.hypotheses[0].points[0].why == "2 of at least 3 runs with other seeds"
    assert any(note.startswith("runs: 2; with fewer than 3") for note in study.notes)


W4 = {"weights": "w4", "kv": "auto"}


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (hypothesis(points=W4), "falsified"),
        (hypothesis(points=W4, bound=-0.3), "held"),
        (hypothesis(points=W4, bound=-0.152), "not decidable"),
        (hypothesis(points={"kv": "int4_per_head"}), "falsified"),
        (hypothesis(points={"kv": "int4_per_head"}, needed="any"), "held"),
        (hypothesis(points={"kv": "int4_per_head"}, needed=2), "falsified"),
        (hypothesis(points={"kv": "int4_per_head"}, against={"kv": "auto"}), "held"),
        (hypothesis(metric="memory_bytes", measure="ratio", relation="at_most", bound=0.9, points=W4), "falsified"),
        (hypothesis(metric="output_tokens_per_s", measure="ratio", bound=1.4, points={"kv": "int4_per_head"}), "held"),
        (hypothesis(metric="kl", measure="value", relation="at_most", bound=0.01, points=W4), "falsified"),
        (hypothesis(metric="joules_per_token", points=W4), "not decidable"),
    ],
)
def test_a_hypothesis_is_held_falsified_or_open(tmp_path, given, verdict):
    study, *_ = judged(tmp_path, tasks=TASKS, hypotheses=[given])
    found = study.hypotheses[0]
    assert found.verdict == verdict
    if verdict == "not decidable":
        assert all(one.why for one in found.points)


def test_what_a_baseline_has_of_itself_has_no_error(tmp_path):
    """Divergences of 0 in two windows are no two wrong answers of two."""
    study, *_ = judged(tmp_path)
    kl = next(point for point in study.points if point.is_baseline).figures["kl"]
    assert (kl.value, kl.low, kl.high) == (0, 0, 0)


def test_accuracy_is_the_mean_of_tasks_and_not_of_questions(tmp_path):
    study, *_ = judged(tmp_path, tasks=TASKS)
    base = next(point for point in study.points if point.is_baseline)
    assert base.figures["accuracy"].value == pytest.approx(0.5)
    from bench.study.samples import Measured, _add_accuracy

    one = Measured(None, "cpu")
    small, large = {f"s{i}": float(i < 9) for i in range(10)}, {f"l{i}": float(i < 20) for i in range(100)}
    one.samples = {
        "a/acc": Sample("a/acc", "more", (small,)), "b/acc": Sample("b/acc", "more", (large,)),
    }  # fmt: skip
    graph = type("G", (), {"plan": type("P", (), {"tasks": [{"tasks": ["a", "b"]}]})})
    _add_accuracy(one, graph)
    found = compare.value(one.samples["accuracy"])
    assert found.value == pytest.approx((0.9 + 0.2) / 2)
    # The error of a stratified mean, each task counting alike.
    variances = [0.9 * 0.1 / 10, 0.2 * 0.8 / 100]
    assert found.standard_error == pytest.approx(np.sqrt(sum(variances)) / 2, rel=0.02)


@pytest.mark.parametrize("text", [None, '{"schema": "vllm-par'])
def test_a_mean_of_tasks_whose_answers_are_lost_has_no_error_and_the_page_says_so(tmp_path, text):
    """What is left of a broken copy is no answer: its tasks stand without intervals, not with narrow ones."""
    _, graph, folder, progress = judged(tmp_path, tasks=TASKS)
    step = next(step for step in graph.steps.values() if step.kind == "tasks" and step.determines["kv"] != "bf16")
    units = folder.result(step.key) / "units.json"
    units.unlink() if text is None else units.write_text(text)
    study, _ = judge(graph, finder(graph, folder, progress.states), folder, progress.states, "")
    point = next(point for point in study.points if f"{point.name}: " in study.notes[0])
    found = point.figures["accuracy"]
    assert (found.standard_error, found.low, found.high) == (None, None, None)
    assert f"{step.key}/out/units.json is missing or damaged" in study.notes[0]


def test_the_page_holds_what_was_found_and_nothing_from_outside(tmp_path):
    weights = {"w4": {"recipe": "rtn-w4"}, "groups": {"recipe": "rtn-w4", "group_size": [32, 64]}}
    points = [{"weights": ["none", "w4", "groups"], "kv": ["auto", "int4_per_head"]}]
    charts = [
        {"title": "Groups", "axis": "group_size", "metric": "kl"},
        {"title": "Bits", "axis": "kv_bits", "metric": "kl"},
        {"title": "Load", "axis": "under", "metric": "output_tokens_per_s"},
        {"title": "Nothing", "axis": "alpha", "metric": "kl"},
    ]
    changes = {"weights": weights, "points": points, "charts": charts, "tasks": TASKS}
    study, graph, folder, progress = judged(tmp_path, hypotheses=[hypothesis(points=W4)], **changes)
    page = conclude(graph, folder, tmp_path / "plan.yaml", progress)
    text = page.read_text()
    for words in ("falsified", "ref-7m, groups group_size=32, int4_per_head KV", "Pareto frontier", "<h3>Groups</h3>",
                  "<h3>Bits</h3>", "<h3>Load</h3>", "1 of 7 points improve", "arc_easy/acc", "group size"):  # fmt: skip
        assert words in text, words
    assert "<h3>Nothing</h3>" not in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    again = conclude(graph, folder, tmp_path / "plan.yaml", progress).read_text()
    assert again == text
    assert study.to_dict()["schema"] == "vllm-pareto/study/1"


def test_shapes_of_kv_bench_are_figures(tmp_path):
    study, *_ = judged(tmp_path, quality=None, loads=None, speed={"context": [4096], "batch": [8]}, points=[
        {"kv": ["auto", "int4_per_head"]}])  # fmt: skip
    coded = next(point for point in study.points if point.kv == "int4_per_head")
    assert coded.figures["step_ratio@8x4096"].value == pytest.approx(2.0)
    assert coded.runs["step_ratio"] == 3
    assert replace(coded.figures["step_ratio"]) == coded.figures["step_ratio@8x4096"]


def test_energy_at_the_served_endpoint_is_a_cost(tmp_path):
    claim = hypothesis(
        metric="output_joules", measure="ratio", relation="at_most", bound=0.6, points={"kv": "int4_per_head"}
    )
    study, graph, folder, progress = judged(tmp_path, loads=None, served={"rounds": 1}, hypotheses=[claim])
    # One step for each kind of weights and run; it serves all dtypes of them.
    assert sum(step.kind == "served" for step in graph.steps.values()) == 3 + 3
    coded = next(one for one in study.points if one.kv == "int4_per_head" and one.weights is None)
    assert coded.figures["output_joules"].value == pytest.approx(0.5 * 1.01 * 700 / 210)
    assert coded.figures["output_joules"].low is not None
    for key in ("output_tokens_per_s", "output_joules@1 user of 2,048 tokens", "decode_joules", "peak_memory_bytes"):
        assert key in coded.figures
    assert study.hypotheses[0].verdict == "held"
    tested = {(one.point, one.metric): one for one in study.comparisons}[coded.name, "output_joules"]
    assert tested.verdict == "better"
    text = conclude(graph, folder, tmp_path / "plan.yaml", progress).read_text()
    assert "Quality against energy" in text
