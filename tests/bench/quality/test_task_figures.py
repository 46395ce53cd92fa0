"""Figures of tasks by hand: what was chosen, calibration, answers that change, documents, and a whole table's p."""

import io
import json
from dataclasses import asdict, replace

import pytest

from bench.quality.command import task_table
from bench.quality.schema import EvalReport
from bench.quality.store import Store
from bench.quality.tasks import run as tasks_run
from bench.quality.tasks.choices import Choice
from bench.quality.tasks.documents import SHARED, document
from bench.quality.tasks.figures import adjusted, task_results
from bench.quality.tasks.run import Scores, TaskSettings, ask, choose
from bench.report.documents import parse
from bench.statistics import calibrated
from tests.bench.result_files import configuration, eval_document


def scores(values, task="t", metric="acc", better="more", documents=None):
    return Scores(task, metric, better, 0.0, {f"{task}/{i}": v for i, v in enumerate(values)}, 1.0, documents or {})


def chose(*answers, task="t", documents=None):
    """Scores of questions from (probabilities, gold)."""
    made = {
        f"{task}/{i}": Choice(p, max(range(len(p)), key=p.__getitem__), gold) for i, (p, gold) in enumerate(answers)
    }
    return Scores(task, "ece", "less", 0.0, {}, 1.0, documents or {}, made)


BASE = chose(
    ([0.6, 0.3, 0.1], 0), ([0.2, 0.7, 0.1], 0), ([0.2, 0.2, 0.6], 2), ([0.5, 0.3, 0.2], 1), ([0.8, 0.1, 0.1], 0)
)
NOW = chose(
    ([0.4, 0.5, 0.1], 0), ([0.2, 0.1, 0.7], 0), ([0.2, 0.2, 0.6], 2), ([0.4, 0.5, 0.1], 1), ([0.8, 0.1, 0.1], 0)
)


def rows(*arguments, **more):
    return {(one.task, one.metric): one for one in task_results(*arguments, **more)}


def test_flips_by_hand():
    """Question 0 right to wrong, 1 wrong to another wrong, 3 wrong to right; 2 and 4 as before."""
    found = rows([NOW], [BASE], {})
    flips = found["t", "flips"]
    assert asdict(flips.flips) == {"right_to_wrong": 1, "wrong_to_right": 1, "wrong_to_wrong": 1}
    assert flips.value.value == pytest.approx(3 / 5)
    assert (flips.value.low, flips.p, flips.verdict) == (pytest.approx(0.2307, abs=1e-4), None, None)  # Wilson's.
    assert ("t", "flips") not in rows([BASE], None, {})


def test_brier_by_hand():
    found = rows([NOW], [BASE], {})["t", "brier"]
    # (0.6, 0.5, 0.1), (0.8, 0.1, 0.7), (0.2, 0.2, 0.4), (0.4, 0.5, 0.1), (0.2, 0.1, 0.1), squared and added up.
    now = [0.62, 1.14, 0.24, 0.42, 0.06]
    base = [0.16 + 0.09 + 0.01, 0.64 + 0.49 + 0.01, 0.24, 0.25 + 0.49 + 0.04, 0.06]
    assert found.value.value == pytest.approx(sum(now) / 5)
    assert found.change.value == pytest.approx((sum(now) - sum(base)) / 5)
    assert (found.gained, found.lost, found.better, found.verdict) == (1, 1, "less", None)


def test_the_calibration_error_by_hand():
    """Five questions make two bins: of the 3 least sure, 0.5, 0.5, 0.6 with 2 right, and 0.7, 0.8 with 1 right."""
    found = rows([NOW], [BASE], {})["t", "ece"]
    confidence, right = [0.5, 0.7, 0.6, 0.5, 0.8], [0.0, 0.0, 1.0, 1.0, 1.0]
    base = ([0.6, 0.7, 0.6, 0.5, 0.8], [1.0, 0.0, 1.0, 0.0, 1.0])
    assert found.value == calibrated((confidence, right), None).error
    assert found.change == calibrated((confidence, right), base).change
    assert found.questions == 5
    # One question has no calibration; it has a Brier score.
    assert {metric for _, metric in rows([chose(([0.4, 0.6], 1))], None, {})} == {"brier"}


def test_groups_put_what_was_chosen_together():
    other = chose(([0.1, 0.9], 0), ([0.2, 0.8], 1), task="u")
    found = rows([NOW, other], [BASE, other], {"both": ["t", "u"]})
    assert found["both", "flips"].value.value == pytest.approx(3 / 7)
    assert found["both", "ece"].questions == found["both", "brier"].questions == 7


def test_questions_of_a_document_count_together():
    labels = {f"t/{i}": f"d{i // 10}" for i in range(60)}
    tested, base = [1.0] * 60, [0.0] * 10 + [1.0] * 50
    alone = rows([scores(tested)], [scores(base)], {})["t", "acc"]
    shared = rows([scores(tested, documents=labels)], [scores(base, documents=labels)], {})["t", "acc"]
    assert alone.p < 0.01
    assert shared.p > 0.2
    assert (alone.change.n, shared.change.n, shared.questions) == (60, 6, 60)
    assert shared.change.standard_error > 2 * alone.change.standard_error


def test_verdicts_are_of_scores_between_0_and_1():
    base, same, worse = [1.0] * 900 + [0.0] * 100, [1.0] * 900 + [0.0] * 100, [1.0] * 800 + [0.0] * 200
    assert rows([scores(same)], [scores(base)], {})["t", "acc"].judged == "non-inferior (1 pt)"
    assert rows([scores(worse)], [scores(base)], {})["t", "acc"].judged == "inferior (1 pt)"
    half = rows([scores(worse)], [scores(base)], {}, margin=0.15)["t", "acc"]
    assert half.judged == "non-inferior (15 pt)"
    assert half.smallest == pytest.approx(0.0285, abs=0.002)  # About 2.8 sqrt(0.1 / 1000).
    loss = rows([scores(worse, better="less")], [scores(base, better="less")], {})["t", "acc"]
    assert loss.judged == "non-inferior (1 pt)"
    tokens = rows([scores([40.0, 50.0])], [scores([40.0, 60.0])], {})["t", "acc"]
    assert (tokens.judged, tokens.margin) == ("", None)
    assert rows([scores(base)], None, {})["t", "acc"].judged == ""


def test_holm_counts_what_the_table_shows():
    """Three configurations, of a task and a group of two: the parts, and calibration, are tables of their own."""

    def measured(lost):
        def part(task):
            worse = scores([0.0] * lost + [1.0] * (100 - lost), task)
            return [worse, scores([1.0] * 100, task)]

        pairs = [part("alone"), part("a"), part("b")]
        found = task_results([one for one, _ in pairs], [base for _, base in pairs], {"group": ["a", "b"]})
        return replace(configuration("fp8", 8, 0.03), tasks=[*found, *task_results([NOW], [BASE], {})])

    before = [replace(configuration(), tasks=task_results([BASE], None, {})), measured(6), measured(7), measured(0)]
    found = adjusted(before, ["a", "b"])
    table = {(i, row.task, row.metric): row for i, one in enumerate(found) for row in one.tasks}
    six, seven = 2 / 2**6, 2 / 2**7  # McNemar, all to one side.
    assert table[1, "alone", "acc"].p == pytest.approx(six)
    # Six values in the table: two groups (2 / 2^12, 2 / 2^14), two tasks, two of 1. In order 7+7, 6+6, 7, 6, 1, 1.
    assert table[2, "group", "acc"].p_holm == pytest.approx(6 * 2 / 2**14)
    assert table[2, "alone", "acc"].p_holm == pytest.approx(4 * seven)
    assert table[1, "alone", "acc"].p_holm == pytest.approx(3 * six)
    # The parts: a and b of three configurations.
    assert table[2, "a", "acc"].p_holm == pytest.approx(6 * seven)
    assert table[1, "t", "brier"].p_holm >= table[1, "t", "brier"].p
    assert table[0, "t", "brier"].p_holm is table[1, "t", "flips"].p_holm is None
    assert adjusted(found, ["a", "b"]) == found


def test_the_console_never_shows_a_verdict_without_its_margin():
    from rich.console import Console

    tasks = task_results([scores([1.0] * 500), NOW], [scores([1.0] * 500), BASE], {}, margin=0.02)
    report = EvalReport("complete", "", {}, {}, adjusted([replace(configuration("fp8", 8, 0.03), tasks=tasks)], []))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(task_table(report))
    text = console.export_text()
    assert "non-inferior (2 pt)" in text
    assert text.count("inferior") == 1
    assert "+1 -1 ~1" in text
    narrow = Console(width=90, record=True, file=io.StringIO())
    narrow.print(task_table(report))
    assert "non-inferior (2 pt)" in narrow.export_text()


def test_results_of_earlier_versions_are_read():
    tasks = task_results([scores([1.0, 0.0])], [scores([0.0, 0.0])], {})
    document = eval_document(replace(configuration(), tasks=tasks))
    for name in ("p_holm", "smallest", "margin", "verdict", "flips"):
        del document["configurations"][0]["tasks"][0][name]
    (row,) = parse(EvalReport, json.dumps(document)).configurations[0].tasks
    assert (row.p, row.p_holm, row.smallest, row.verdict, row.flips) == (1.0, None, None, None, None)


def test_what_was_chosen_is_kept(tmp_path):
    store, settings = Store(tmp_path), TaskSettings()
    kept = [replace(NOW, documents={"t/0": "d"}), scores([1.0])]
    store.add_scores("t", settings, kept)
    assert store.scores("t", settings) == kept
    (path,) = tmp_path.iterdir()
    old = [{key: value for key, value in asdict(one).items() if key != "choices"} for one in kept]
    path.write_text(json.dumps(old))
    assert store.scores("t", settings) is None


QUESTIONS = {
    "arc_easy/test": [
        {
            "id": str(i), "question": f"What is {i}?", "choices": {"text": ["x", "yy", f"z{i}"], "label": list("ABC")},
            "answerKey": k,
        }
        for i, k in enumerate("ABCCBA")
    ],
    "boolq/validation": [{"question": f"is it {i}", "passage": f"text {i // 2}", "label": i % 2} for i in range(6)],
    "winogrande/validation": [
        {"sentence": f"A saw B, so _ was {i}.", "option1": "A", "option2": "B", "answer": "12"[i % 2]} for i in range(4)
    ],
    "bbq/test": [
        {
            "example_id": i, "question_index": str(i // 2), "question_polarity": "neg", "context_condition": "ambig",
            "category": "Age", "answer_info": {"ans0": ["a", "old"], "ans1": ["b", "nonOld"], "ans2": ["c", "unknown"]},
            "additional_metadata": {"subcategory": "None", "stereotyped_groups": ["old"]}, "context": f"They met {i}.",
            "question": "Who?", "ans0": "The old one", "ans1": "The young one", "ans2": "Unknown", "label": 2,
        }
        for i in range(4)
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def asked(tmp_path_factory, definitions_read_once):
    """Scores of tasks by name, and the log-likelihoods that a made-up model gave."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM

    from bench.quality.tasks import scorer

    class MadeUp(LM):
        read = asked = cut = 0
        tokenizer = None

        def __init__(self, *ignored):
            super().__init__()

        def loglikelihood(self, requests):
            return [(-float(sum(map(ord, "".join(one.args))) * 37 % 101) / 20, False) for one in requests]

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

        def generate_until(self, requests):
            raise NotImplementedError

    tmp_path = tmp_path_factory.mktemp("tasks")
    for name, found in QUESTIONS.items():
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in found))
    table = [
        "Best Answer,Question,Correct Answers,Incorrect Answers",
        "yes,Is it?,yes; aye,no; nay",
        "no,Was it?,no,yes",
    ]
    (tmp_path / "data" / "truthfulqa.csv").write_text("\n".join(table))
    (tmp_path / "work").mkdir()
    names = [name.split("/")[0] for name in QUESTIONS] + ["truthfulqa_mc1", "truthfulqa_mc2"]
    settings = TaskSettings(tasks=tuple(names), data=str(tmp_path / "data"), num_fewshot=(("*", 0),))
    tasks = choose(settings, None, tmp_path / "work").tasks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "EngineScorer", MadeUp)
        return {name: ask(None, tasks[name], settings, False, 0, print) for name in names}


def test_what_was_chosen_is_what_lm_eval_scores(asked):
    for name in ("arc_easy", "boolq", "winogrande", "truthfulqa_mc1"):
        found = {one.metric: one for one in asked[name]}
        assert {key: float(one.right) for key, one in found["ece"].choices.items()} == found["acc"].questions, name
        for one in found["ece"].choices.values():
            assert sum(one.probabilities) == pytest.approx(1, abs=1e-6)
            assert one.probabilities[one.chosen] == max(one.probabilities)
        assert sum(one.right for one in found["ece"].choices.values()) + (name == "truthfulqa_mc1") > 0
    # Several right answers, or a scoring of their own: no one choice.
    assert all(one.metric != "ece" for name in ("truthfulqa_mc2", "bbq") for one in asked[name])
    rows(asked["boolq"], asked["boolq"], {})


def test_questions_name_their_document(asked):
    (boolq, _) = asked["boolq"]
    labels = [boolq.documents[key] for key in boolq.questions]
    assert labels[0] == labels[1] != labels[2] == labels[3]
    assert len(set(labels)) == 3
    assert len(set(asked["bbq"][0].documents.values())) == 2
    assert not asked["arc_easy"][0].documents
    assert rows(asked["boolq"], asked["boolq"], {})["boolq", "acc"].value.n == 3


def test_every_name_of_documents_is_one_of_lm_evals(definitions_read_once):
    """A mapping that fits no task, because lm-eval renamed it, would silently count questions."""
    lm_eval = pytest.importorskip("lm_eval.tasks")
    known = lm_eval.TaskManager().task_index
    ours = {"narrativeqa"}
    assert not {name for name in SHARED if not any(task.startswith(name) for task in known)} - ours
    assert document("arc_easy", {"passage": "x"}) is None
    assert document("boolq", {"question": "x"}) is None
    assert document("narrativeqa_book", {"document_id": "7"}) == document("narrativeqa_summary", {"document_id": "7"})


def test_rulers_questions_name_their_article(monkeypatch):
    pytest.importorskip("lm_eval.tasks.ruler.qa_utils", exc_type=ImportError)
    from lm_eval.tasks.ruler import qa_utils

    def paragraph(*questions):
        asked = [{"question": one, "is_impossible": False, "answers": [{"text": one}]} for one in questions]
        return {"context": f"about {questions}", "qas": asked}

    articles = [[paragraph("a0", "a1"), paragraph("a2")], [paragraph("b0")]]
    text = {"data": [{"paragraphs": paragraphs} for paragraphs in articles]}
    monkeypatch.setattr(qa_utils, "download_json", lambda url: text)
    qa_utils.read_squad.cache_clear()
    labels = [document("ruler_qa_squad", {"index": i}) for i in range(4)]
    qa_utils.read_squad.cache_clear()
    assert labels[0] == labels[1] == labels[2] != labels[3]


def test_scores_of_an_earlier_form_are_asked_again(monkeypatch):
    now = tasks_run.key(TaskSettings())
    monkeypatch.setattr(tasks_run, "KEPT", 1)
    assert tasks_run.key(TaskSettings()) != now
