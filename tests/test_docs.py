"""What the documents point to is there: links, paths, commands and their flags; and what workflows call."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from vllm_ext import cli, serve

ROOT = Path(__file__).parents[1]
FOLDERS = ("kv_cache", "quant_methods", "vllm_ext", "bench", "loadtest", "docs", "results")
PAGES = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
PLACES = re.compile(rf"(?:{'|'.join((*FOLDERS, 'tests', 'requirements'))})/[\w./-]*[\w/]")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    texts = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head).replace("`", "").strip().lower() for head in heads]
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in texts}


def broken(page: Path) -> list[str]:
    """Return the links of a page that lead to nothing."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
            found.append(target)
    return found


def lines(text: str) -> list[list[str]]:
    """Return the commands of shell text, each as its words, without comments."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";", "&")), len(words))
            found.append(words[:end])
            words = words[end + 1 :]
    return [words for words in found if words]


def commands(page: Path) -> list[list[str]]:
    """Return the shell commands of a page's blocks."""
    return [words for _, kind, text in FENCE.findall(page.read_text()) if kind == "sh" for words in lines(text)]


def spans(page: Path) -> list[str]:
    """Return what stands between single backticks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


@pytest.fixture(scope="session")
def parsers():
    """The parser of each command; that of pareto serve knows vLLM's flags, too."""
    return {name: cli.build_parser(name, entry.load()) for name, entry in cli.commands().items()}


def flags(words: list[str], known: set[str]) -> list[str]:
    """Return the flags among words that are none."""
    return [w for w in (word.partition("=")[0] for word in words) if re.match(r"--?[a-zA-Z]", w) and w not in known]


def mistakes(words: list[str], parsers, capsys) -> str:
    """Say what is wrong with the words of a command of ours; "" for nothing."""
    name, rest = words[1], words[2:]
    if name not in parsers:
        return "" if name in ("--help", "--version") else f"no command {name}"
    parser = parsers[name]
    if name == "serve":
        known = set(parser._option_string_actions) | set(serve._vllm_flags())
        return " ".join(flags(rest, known))
    if "..." in words:
        return " ".join(flags(rest, set(parser._option_string_actions)))
    try:
        parser.parse_args(rest)
    except SystemExit as left:
        return capsys.readouterr().err.splitlines()[-1] if left.code else ""
    return ""


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    assert broken(page) == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_paths_are_there(page):
    places = [span.rstrip("/") for span in spans(page) if PLACES.fullmatch(span) and "NAME" not in span]
    assert [place for place in places if not (ROOT / place).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_are_taken(page, parsers, capsys):
    found = {}
    for words in commands(page):
        program = Path(words[0]).name
        if program == "pareto":
            found[" ".join(words)] = mistakes(words, parsers, capsys)
        elif program == "make":
            found[" ".join(words)] = " ".join(w for w in words[1:] if "=" not in w and w not in TARGETS)
        elif program.startswith("python") and "-m" in words:
            module = words[words.index("-m") + 1]
            if module.partition(".")[0] in (*FOLDERS, "tests"):
                found[" ".join(words)] = "" if importlib.util.find_spec(module) else f"no module {module}"
    # In a sentence a command may be cut short, so that only its flags are looked at.
    for span in spans(page):
        name, _, rest = span.removeprefix("pareto ").partition(" ")
        if span.startswith("pareto ") and name in parsers and name != "serve":
            found[span] = " ".join(flags(rest.split(), set(parsers[name]._option_string_actions)))
    assert {command: wrong for command, wrong in found.items() if wrong} == {}


def test_the_checks_see_what_is_wrong(tmp_path, parsers, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        "# A *b* `c`\n[x](page.md#a-b-c) [y](gone.md) [z](#d) [w](https://example.com) `[no](link)`\n"
        "```sh\npareto eval MODEL --out x \\\n    --seeed 3   # a comment\nmake demo && pareto nothing\n```\n"
    )
    assert broken(page) == ["gone.md", "#d"]
    first, second, third = commands(page)
    assert "--seeed" in mistakes(first, parsers, capsys)
    assert second == ["make", "demo"]
    assert mistakes(third, parsers, capsys) == "no command nothing"
    assert mistakes(["pareto", "serve", "M", "--max-model-len", "3"], parsers, capsys) == ""
    assert mistakes(["pareto", "serve", "M", "--max-modl-len", "3"], parsers, capsys) == "--max-modl-len"


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/workflows/*.yml")), ids=lambda path: path.name)
def test_workflows_call_make(path):
    """What CI runs is what a person runs; a workflow has no commands of its own for it."""
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    runs = [line for job in jobs for step in job["steps"] for line in lines(step.get("run", ""))]
    made = [words[1] for words in runs if words[0] == "make"]
    assert made
    assert set(made) <= TARGETS
    assert not [words for words in runs if words[0] in ("pytest", "ruff", "mypy")]


def test_pre_commit_calls_make():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"].split() for hook in repository["hooks"]] == [["make", "lint"]]


def test_images_have_the_versions_that_are_tested():
    image = (ROOT / "Dockerfile").read_text()
    newest = re.findall(r"^NEWEST_VLLM = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r"^ARG VLLM=(.*)$", image, re.MULTILINE) == newest
    (names,) = re.findall(r"grep -E '\^\(([\w|-]+)\)=='", image)
    locked = {line.partition("==")[0] for line in (ROOT / "requirements/cpu.lock").read_text().splitlines()}
    assert set(names.split("|")) <= locked
