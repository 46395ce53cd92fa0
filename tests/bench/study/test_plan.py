import pytest
import yaml

from bench.study.plan import PLANS, find_plan, load_plan, parse_plan
from bench.study.steps import build
from kv_cache.errors import ParetoError
from tests.bench.study.studies import PLAN, graph_of

HYPOTHESIS = {"name": "h", "claim": "c", "metric": "kl", "relation": "at_most", "bound": 1, "measure": "value"}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"tilte": "x"}, "plan: tilte: unknown key 'tilte'; valid keys: study, title"),
        ({"models": None}, "plan: models: is missing"),
        ({"runs": 0}, "plan: runs: input should be greater than or equal to 1, got 0"),
        ({"points": []}, "plan: points: list should have at least 1 item after validation, not 0, got []"),
        ({"points": [{"kvs": "auto"}]}, "points.0.kvs: unknown key 'kvs'; valid keys: model, weights, kv, hardware"),
        ({"points": [{"weights": "w3"}]}, "points[0].weights: 'w3' is not in the plan; it has none, w4"),
        ({"hardware": {"a": {"gpu": "A100"}}}, "hardware.a: gpu names a GPU, and gpus says that a step takes none"),
        ({"quality": None, "loads": None}, "nothing to measure: give quality, tasks, loads, served or speed"),
        ({"hypotheses": [HYPOTHESIS | {"relation": "is"}]}, "hypotheses.0.relation: input should be 'at_least' or"),
        ({"hypotheses": [HYPOTHESIS, HYPOTHESIS]}, "hypotheses: two are called 'h'"),
        ({"weights": {"w4": {"bist": 3}}}, "weights.w4: unknown key 'bist'; valid keys: "),
        ({"weights": {"w4": {"recipe": "w4"}}}, "weights.w4 w4: unknown recipe 'w4'; built-in recipes: "),
        ({"weights": {"w4": {"seed": 1}}}, "weights.w4: 'seed' is set by the study itself"),
        ({"quality": {"out": "x"}}, "quality: 'out' is set by the study itself; leave it out"),
        ({"quality": {"window_tokens": 1}}, "quality: --window-tokens must be at least 2, got 1"),
        ({"quality": {"text": "no.txt"}}, "no.txt: no such file; --data DIR says where the plan's data lies"),
        ({"loads": {"a": {"concurrency": "x"}}}, "loads.a: argument --concurrency: invalid int value: 'x'"),
        ({"models": {"m": "nowhere"}}, "models.m: "),
        (
            {"hypotheses": [HYPOTHESIS | {"points": {"weights": "w4 bits=3"}}]},
            "hypotheses.h.points: 'w4 bits=3' are no weights of the plan's points: none, w4",
        ),
        (
            {"hypotheses": [HYPOTHESIS | {"measure": "ratio", "points": {"weights": "none", "kv": "auto"}}]},
            "hypotheses.h: its points are none of the plan's (or all are what they are compared with)",
        ),
    ],
)  # fmt: skip
def test_a_bad_plan_gets_one_line(tmp_path, changes, line):
    with pytest.raises(ParetoError) as error:
        graph_of(tmp_path, **changes)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_plan_is_refused(tmp_path):
    with pytest.raises(ParetoError, match="expected a mapping with the keys study"):
        parse_plan([1], "plan")
    bad = tmp_path / "bad.yaml"
    bad.write_text("study: [")
    with pytest.raises(ParetoError, match="is not valid YAML"):
        load_plan(bad)
    with pytest.raises(ParetoError, match=r"no such file; plans that ship: .*smoke"):
        find_plan("smook")


def test_points_are_every_combination_and_the_baseline_is_always_there(tmp_path):
    graph = graph_of(tmp_path, points=[{"weights": "w4", "kv": ["auto", "int4_per_head"]}, {"weights": "w4"}])
    assert [point.name for point in graph.points] == [
        "ref-7m, bf16 KV", "ref-7m, w4, bf16 KV", "ref-7m, w4, int4_per_head KV",
    ]  # fmt: skip
    assert [point.is_baseline for point in graph.points] == [True, False, False]


def test_lists_of_a_setting_are_points_of_their_own(tmp_path):
    weights = {"g": {"recipe": "rtn-w4", "group_size": [32, 64], "ignore": ["lm_head", "down_proj"]}}
    graph = graph_of(tmp_path, weights=weights, points=[{"weights": "g"}])
    variants = [point.weights for point in graph.points if point.weights]
    assert [one.name for one in variants] == ["g group_size=32", "g group_size=64"]
    assert [one.setting("group_size") for one in variants] == [32, 64]
    assert variants[0].recipe.ignore == ("lm_head", "down_proj")
    assert variants[0].setting("num_calibration_samples") == 128


def test_runs_share_what_no_seed_reaches(tmp_path):
    graph = graph_of(tmp_path)
    kinds = [step.kind for step in graph.steps.values()]
    # Three checkpoints; the unquantized model's quality is the same in each run; every point is loaded in each run.
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"compress": 3, "quality": 2 + 2 * 3, "load": 4 * 3}
    baseline = [cell for cell in graph.cells if cell.point == "ref-7m, bf16 KV"]
    assert len({cell.quality for cell in baseline}) == 1
    assert len({cell.loads["short"] for cell in baseline}) == 3
    compressed = next(cell for cell in graph.cells if cell.point == "ref-7m, w4, int4_per_head KV" and cell.run == 1)
    quality = graph.steps[compressed.quality]
    assert set(quality.after) == {compressed.compress, baseline[0].quality}
    assert f"{{checkpoint:{compressed.compress}}}" in quality.words
    assert "--seed=1" in graph.steps[compressed.compress].words


def test_a_key_follows_from_what_determines_the_result(tmp_path):
    def keys(**changes):
        return set(graph_of(tmp_path, **changes).steps)

    first = keys()
    assert keys(title="another", hypotheses=[HYPOTHESIS]) == first
    assert keys(study="another") == first
    assert keys(runs=2) < first
    # Another text redoes quality alone; another recipe also what is made from it.
    (tmp_path / "a.txt").write_text("some text")
    flags = PLAN["quality"] | {"text": ["a.txt"]}
    texts = keys(quality=flags)
    assert {key for key in first - texts} == {key for key in first if key.startswith("quality")}
    (tmp_path / "a.txt").write_text("other text")
    assert len(keys(quality=flags) & texts) == 3 + 12
    bits = keys(weights={"w4": {"recipe": "rtn-w4", "bits": 3}})
    assert len(first & bits) == 2 + 2 * 3


def test_speed_is_timed_beside_the_baseline_in_one_run(tmp_path):
    graph = graph_of(tmp_path, quality=None, loads=None, speed={"context": [128]}, runs=1)
    words = [step.words for step in graph.steps.values() if step.kind == "speed"]
    assert words[0][2:5] == ("--kv-cache-dtype", "auto", "int4_per_head")
    compressed = next(key for key in graph.steps if key.startswith("compress"))
    assert words[1][2:8] == (
        "--kv-cache-dtype", "auto", "--compressed", f"{{checkpoint:{compressed}}}", "--compressed-kv-cache-dtype",
        "auto",
    )  # fmt: skip


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_plan_that_ships_is_good_without_its_weights(tmp_path, path, capsys):
    from bench.study.estimate import show
    from bench.study.folder import Folder
    from bench.study.inputs import Inputs

    plan = load_plan(path)
    inputs = Inputs(path.parent, None, None, tmp_path / "digests.json", tolerant=True)
    graph = build(plan, path.parent, inputs)
    show(graph, Folder(tmp_path), inputs.missing, list(plan.hardware))
    printed = capsys.readouterr().out
    assert f"{len(graph.steps)} steps" in printed
    assert "rough figures" in printed
    assert yaml.safe_load(path.read_text())["study"] == path.stem
    assert not (tmp_path / "digests.json").exists()
