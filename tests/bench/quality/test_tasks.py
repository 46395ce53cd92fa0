"""Tasks: lm-eval's definitions over local files, scores over quantized pages, and their comparison."""

import json
import random

import pytest
import torch

from bench.quality.command import add_arguments, settings_from
from bench.quality.tasks import run as tasks_run
from bench.quality.tasks.figures import task_results
from bench.quality.tasks.run import Scores, TaskSettings, ask, choose
from kv_cache.errors import ParetoError
from tests.end_to_end.engines import REF_7M, engine

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("definitions_read_once")
WORDS = ["the", "house", "and", "a", "river", "that", "went", "by", "it", "in", "some", "old", "year", "no", "one"]


@pytest.fixture
def data(tmp_path):
    """Questions of three tasks, made of random words."""
    draw, folder = random.Random(0), tmp_path / "data"

    def words(low, high):
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))

    arc = [
        {
            "id": str(i),
            "question": words(5, 150) + "?",
            "choices": {"text": [words(1, 1), words(1, 6), words(1, 2), words(2, 9)], "label": list("ABCD")},
            "answerKey": draw.choice("ABCD"),
        }
        for i in range(10)
    ]
    lambada = [{"text": words(20, 60)} for _ in range(5)]
    gsm8k = [{"question": words(10, 20), "answer": f"{words(3, 5)}\n#### {draw.randint(1, 9)}"} for _ in range(3)]
    for name, split, rows in (
        ("arc_easy", "test", arc), ("lambada_openai", "test", lambada), ("gsm8k", "test", gsm8k),
        ("gsm8k", "train", gsm8k * 3),
    ):  # fmt: skip
        path = folder / name / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_group_is_all_questions_together():
    def scores(task, values):
        return Scores(task, "acc", "more", 0.0, {f"{task}/{i}": v for i, v in enumerate(values)}, 0.5)

    tested = [scores("a", [1.0, 0.0]), scores("b", [1.0] * 4)]
    base = [scores("a", [1.0, 1.0]), scores("b", [0.0] * 4)]
    found = {one.task: one for one in task_results(tested, base, {"all": ["a", "b"]})}
    assert found["all"].questions == 6
    assert found["all"].value.value == pytest.approx(5 / 6)
    assert (found["all"].gained, found["all"].lost) == (4, 1)
    assert found["all"].agreement == pytest.approx(1 / 6)
    assert task_results(tested, None, {})[0].agreement is None
    with pytest.raises(ParetoError, match="other questions"):
        task_results(tested, [scores("a", [1.0]), base[1]], {})


def test_bad_names_and_data_are_said(data, tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    with pytest.raises(ParetoError, match=r"no such task.*did you mean arc_easy\?"):
        choose(TaskSettings(tasks=("arc_eazy",), data=str(data)), None, tmp_path / "one")
    with pytest.raises(ParetoError, match=r"has no questions of piqa.*piqa/test\.jsonl"):
        choose(TaskSettings(tasks=("piqa",), data=str(data)), None, tmp_path / "two")
    with pytest.raises(ParetoError, match="no such folder"):
        choose(TaskSettings(tasks=("piqa",), data=str(tmp_path / "absent")), None, tmp_path / "three")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-windows", "0"], "or 0 with --tasks"),
        (["--tasks", "arc_easy", "--num-windows", "0"], "--no-needle"),
        (["--task-data", "x"], "name the tasks"),
        (["--tasks", "arc_easy", "--task-limit", "0"], "--task-limit 0: give a number of at least 1"),
        (["--tasks", "arc_easy", "--num-fewshot", "5", "mmlu="], "--num-fewshot mmlu=: give a number"),
        (["--tasks", "arc_easy", "--num-fewshot", "=5"], "--num-fewshot =5: give a number of at least 0"),
    ],
)
def test_flags_that_make_no_sense_are_said(words, message):
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ParetoError, match=message):
        settings_from(parser.parse_args(["ref-7m", "--out", "x", *words]))


def plain_model():
    """lm-eval's model over transformers, one request after the other."""
    from lm_eval.api.model import TemplateLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(REF_7M, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(REF_7M)

    class Plain(TemplateLM):
        eot_token_id = tokenizer.eos_token_id
        tokenizer_name = "ref-7m"

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return tokenizer(string, **special).input_ids

        def _loglikelihood_tokens(self, requests, **kwargs):
            return [likelihood(model, context, continuation) for _, context, continuation in requests]

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise NotImplementedError

        def generate_until(self, requests, disable_tqdm=False):
            made = []
            for context, settings in (request.args for request in requests):
                ids = torch.tensor([self.tok_encode(context)])
                out = model.generate(ids, max_new_tokens=settings["max_gen_toks"], do_sample=False)
                text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
                for stop in settings["until"]:
                    text = text.split(stop)[0]
                made.append(text)
            return made

    return Plain()


def likelihood(model, context, continuation):
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].log_softmax(-1)
    greedy = logits.argmax(-1).tolist() == continuation
    return float(logits[range(len(continuation)), continuation].sum()), greedy


@pytest.mark.engine
def test_scores_are_those_of_plain_lm_eval(data, tmp_path):
    """In float32, with contexts read from the prefix cache, as on a GPU: the same answers and log-likelihoods."""
    from lm_eval.evaluator import evaluate

    from bench.quality.tasks.scorer import EngineScorer

    names = ("arc_easy", "lambada_openai", "gsm8k")
    settings = TaskSettings(tasks=names, data=str(data), num_fewshot=(("*", 2),), max_model_len=512)
    (tmp_path / "work").mkdir()
    chosen = choose(settings, REF_7M, tmp_path / "work")
    chosen.tasks["gsm8k"].config.generation_kwargs["max_gen_toks"] = 8
    for task in chosen.tasks.values():
        task.set_fewshot_seed(seed=settings.seed)
    plain = evaluate(
        plain_model(), {"tasks": chosen.tasks, "groups": {}, "group_map": {}}, bootstrap_iters=0, verbosity="ERROR"
    )
    with engine(REF_7M, max_model_len=512, block_size=32, enable_prefix_caching=True) as llm:
        # Asked twice, as of two configurations: the same examples stand before the questions.
        ask(llm, chosen.tasks["arc_easy"], settings, True, 4096, lambda what: None)
        ours = {name: ask(llm, chosen.tasks[name], settings, True, 4096, lambda what: None) for name in names}
        scorer = EngineScorer(llm, True, 4096)
        # The trap: contexts that fill their pages exactly, and answers that begin alike and fill one.
        generator = torch.Generator().manual_seed(0)
        pairs = []
        for length in (1, 31, 32, 33, 64, 96, 200):
            context = torch.randint(2, 8000, (length,), generator=generator).tolist()
            for tokens in (1, 1, 2, 5):
                pairs.append((None, context, torch.randint(2, 8000, (tokens,), generator=generator).tolist()))
            pairs.append((None, context, [*pairs[-1][2][:3], 7]))
        found = scorer._loglikelihood_tokens(pairs)
        assert scorer.read > 0.5 * scorer.asked
    for name in names:
        for score in ours[name]:
            if score.choices:
                assert {key: float(one.right) for key, one in score.choices.items()} == ours[name][0].questions
                continue
            label = score.metric if "," in score.metric else f"{score.metric},none"
            assert score.value == pytest.approx(plain["results"][name][label], rel=1e-3), score
            # What is generated reads its prompt from the cache too.
            assert score.read > (0.3 if name == "arc_easy" else 0)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(REF_7M, dtype=torch.float32)
    for (_, context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        want, is_greedy = likelihood(model, context, continuation)
        assert value == pytest.approx(want, abs=2e-3)
        assert greedy == is_greedy


def test_settings_tell_scores_apart():
    first = TaskSettings(tasks=("a",))
    assert tasks_run.key(first) == tasks_run.key(TaskSettings(tasks=("b",)))
    assert tasks_run.key(first) != tasks_run.key(TaskSettings(tasks=("a",), num_fewshot=(("*", 5),)))


def test_numbers_of_some_tasks(data, tmp_path):
    """Each task has its own numbers of questions and examples, and is asked anew if its own change, no other's."""

    def chosen(name, **numbers):
        (tmp_path / name).mkdir()
        return choose(
            TaskSettings(("arc_easy", "lambada_openai", "gsm8k"), str(data), **numbers), REF_7M, tmp_path / name
        )

    plain = chosen("plain")
    some = chosen("some", num_fewshot=(("*", 1), ("arc_*", 2), ("gsm8k", 3)), limit=(("gsm8k", 2),))
    shown = {name: task.config.num_fewshot for name, task in some.tasks.items()}
    assert shown == {"arc_easy": 2, "lambada_openai": 1, "gsm8k": 3}
    other = chosen("other", num_fewshot=(("*", 1), ("arc_easy", 2)))
    keys = [{name: tasks_run.key(one) for name, one in found.settings.items()} for found in (plain, some, other)]
    assert keys[1]["arc_easy"] == keys[2]["arc_easy"] != keys[0]["arc_easy"]
    assert keys[1]["gsm8k"] not in (keys[0]["gsm8k"], keys[2]["gsm8k"])
    assert (some.settings["gsm8k"].limit, some.settings["arc_easy"].limit) == ((("*", 2),), ())
    with pytest.raises(ParetoError, match="--num-fewshot piqa=5: piqa is none of the --tasks"):
        chosen("none", num_fewshot=(("piqa", 5),))
    with pytest.raises(ParetoError, match="--task-limit arc_eazy=5: arc_eazy is none of the --tasks"):
        chosen("typo", limit=(("arc_eazy", 5),))
