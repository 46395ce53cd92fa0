"""The ``pareto`` command: finds its subcommands by entry point and runs one.

A subcommand is a module with ``HELP`` (one line), ``DESCRIPTION`` (what ``--help`` teaches), ``USER_ERRORS`` (exception
types that mean bad input), ``add_arguments(parser)`` and ``run(args) -> int``. Each lives in the room it belongs to and
is named in pyproject.toml under ``pareto.commands``; so the front door imports none of them until it is asked to.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import yaml

from kv_cache.errors import ParetoError

GROUP = "pareto.commands"
ORDER = ("compress", "finetune", "serve", "eval", "loadtest", "report", "study", "demo", "kv-bench", "serve-bench")


class Command(Protocol):
    """What the front door needs of a subcommand's module."""

    HELP: str
    DESCRIPTION: str
    USER_ERRORS: tuple[type[Exception], ...]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the subcommand's flags."""

    def run(self, args: argparse.Namespace) -> int:
        """Do the work; the result is the exit status."""


def commands() -> dict[str, importlib.metadata.EntryPoint]:
    """Return the installed subcommands by name, in the order in which a user meets them."""
    found = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    known = [name for name in ORDER if name in found]
    return {name: found[name] for name in [*known, *sorted(set(found) - set(known))]}


def config_arguments(path: str, parser: argparse.ArgumentParser, others: dict[str, Any] | None = None) -> list[str]:
    """Turn a YAML file into command-line words, to be placed before the user's own so that flags win.

    The words end with a flag of one value, so that a list before it does not take what the user wrote for its own.

    Args:
        path: a YAML mapping whose keys are the flags' names without dashes in front (``max-tokens: 64``); a list
            gives a flag several values, ``true``/``false`` switch a flag on or off.
        parser: the subcommand's parser, which knows the flags.
        others: takes the keys that are no flags; None: there must be none.

    Raises:
        ParetoError: the file is missing, is no mapping, or has a key that is no flag.

    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ParetoError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ParetoError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ParetoError(f"--config {path}: expected a mapping of flag names to values")
    return [*flag_words(data, parser, f"--config {path}", others), f"--config={path}"]


def flag_words(
    data: Mapping[str, Any], parser: argparse.ArgumentParser, where: str, others: dict[str, Any] | None = None
) -> list[str]:
    """Turn flags' values by name into command-line words.

    Args:
        data: as in the file of :func:`config_arguments`.
        parser: the subcommand's parser, which knows the flags.
        where: what errors start with.
        others: takes the keys that are no flags; None: there must be none.

    Raises:
        ParetoError: a key is no flag.

    """
    flags = {flag.removeprefix("--"): action for flag, action in parser._option_string_actions.items()}
    words: list[str] = []
    for key, value in data.items():
        name = str(key).replace("_", "-")
        if name not in flags and others is not None:
            others[name] = value
            continue
        if name not in flags or name in ("help", "config"):
            valid = ", ".join(sorted(f for f in flags if len(f) > 1 and f not in ("-h", "help", "config")))
            raise ParetoError(f"{where}: unknown key {key!r}; valid keys: {valid}")
        if isinstance(value, bool):
            if value:
                words.append(f"--{name}")
            elif f"no-{name}" in flags:
                words.append(f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def build_parser(name: str, command: Command) -> argparse.ArgumentParser:
    """Return the parser of one subcommand."""
    parser = argparse.ArgumentParser(
        prog=f"pareto {name}",
        description=command.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parser.add_argument("--config", metavar="FILE", help="YAML file of flag values; flags given here override it")
    return parser


def overview() -> str:
    """Return the text of ``pareto --help``."""
    lines = ["usage: pareto COMMAND [ARGS...]      (pareto COMMAND --help teaches each)", "", "commands:"]
    for name, entry in commands().items():
        lines.append(f"  {name:13s} {cast(Command, entry.load()).HELP}")
    lines += [
        "",
        "The chain: compress a model, serve it with a quantized KV cache, measure quality and speed, report.",
        "Every command takes --config FILE.yaml whose keys are its flags. PARETO_DEBUG=1 shows tracebacks.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run ``pareto``; returns the exit status (2 for bad input, 130 after Ctrl-C)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"vllm-pareto {importlib.metadata.version('vllm-pareto')}")
        return 0
    name, rest = words[0], words[1:]
    found = commands()
    if name not in found:
        print(f"pareto: error: unknown command {name!r}; commands: {', '.join(found)}", file=sys.stderr)
        return 2
    command = cast(Command, found[name].load())
    parser = build_parser(name, command)
    user_errors: tuple[type[Exception], ...] = (ParetoError, *command.USER_ERRORS)
    try:
        return _run(parser, command, rest)
    except user_errors as error:
        if os.environ.get("PARETO_DEBUG"):
            raise
        print(f"pareto {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pareto {name}: interrupted", file=sys.stderr)
        return 130


def _run(parser: argparse.ArgumentParser, command: Command, words: list[str]) -> int:
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--config")
    config: Any = peek.parse_known_args(words)[0].config
    if getattr(command, "PASS_THROUGH", False):
        return _run_in_front(parser, command, words, config)
    if config:
        words = config_arguments(config, parser) + words
    return command.run(parser.parse_args(words))


def _run_in_front(parser: argparse.ArgumentParser, command: Any, words: list[str], config: str | None) -> int:
    """Run a command in front of another program's, which gets all flags that are not the command's own.

    Such a module has ``ordered(words, parser)`` too, which puts what is no flag's value first.
    """
    words = command.ordered(words, parser)
    foreign: list[str] = []
    others: dict[str, Any] = {}
    if config:
        from_file = config_arguments(config, parser, others)
        model = others.pop("model", None)
        if model is not None and (not words or words[0].startswith("-")):
            words = [str(model), *words]
        first = 1 if words and not words[0].startswith("-") else 0
        words = [*words[:first], *from_file, *words[first:]]
        if others:
            # The other program reads its own keys itself: how it takes lists, mappings and switches is its business.
            if Path(config).suffix not in (".yaml", ".yml"):
                key = min(others)
                raise ParetoError(f"--config {config}: {key!r} is vLLM's key, and vLLM reads .yaml and .yml only")
            foreign = ["--config", config]
    args, rest = parser.parse_known_args(words)
    args.rest = [*foreign, *rest]
    return cast(Command, command).run(args)


if __name__ == "__main__":
    sys.exit(main())
