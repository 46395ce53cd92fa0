"""Flags of a plan as words of ``pareto`` commands, checked by the commands' own parsers."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

from kv_cache.errors import ParetoError
from vllm_ext.cli import Command, build_parser, commands, flag_words

RESERVED = {
    "distill": ("teacher", "out", "seed", "teacher-cache", "url"),
    "compress": ("model", "out", "overwrite", "seed", "recipe", "list-recipes", "sweep", "statistics"),
    "eval": ("model", "out", "baseline", "kv-cache-dtype", "seed"),
    "serve": ("model", "host", "port", "kv-cache-dtype", "served-model-name", "config"),
    "loadtest": ("base-url", "out", "overwrite", "label", "seed", "model", "progress", "exporter-port"),
    "kv-bench": ("model", "out", "kv-cache-dtype", "compressed", "compressed-kv-cache-dtype", "seed", "load-format"),
    "serve-bench": ("model", "out", "kv-cache-dtype", "seed", "load-format"),
}
"""What the study sets itself."""
NEEDED = {
    "eval": ["M", "--out=o"],
    "kv-bench": ["M"],
    "serve-bench": ["M"],
    "compress": ["M", "--out=o"],
    "distill": ["M", "--out=o"],
    "loadtest": [],
}
"""Words without which a parser refuses everything."""


@functools.cache
def _parser(command: str) -> argparse.ArgumentParser:
    return build_parser(command, cast(Command, commands()[command].load()))


def words_of(command: str, flags: Mapping[str, Any], where: str) -> list[str]:
    """Return flags as words of a command.

    Args:
        command: of ``pareto``.
        flags: values by name; True and False switch a flag, a list gives it several values.
        where: what errors start with.

    Raises:
        ParetoError: a flag that there is not, that the study sets itself, or a value that the command refuses.

    """
    for name in flags:
        if str(name).replace("_", "-") in RESERVED[command]:
            raise ParetoError(f"{where}: {name!r} is set by the study itself; leave it out")
    if command == "serve":
        # vLLM's own flags pass through, and only vLLM knows them.
        return [word for name, value in flags.items() for word in _foreign(str(name).replace("_", "-"), value)]
    parser = _parser(command)
    words = flag_words(flags, parser, where)

    def refuse(message: str) -> NoReturn:
        raise ParetoError(f"{where}: {message}")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_args([*NEEDED[command], *words])
    try:
        if command == "eval":
            from bench.quality.command import settings_from

            settings_from(args)
        elif command == "distill":
            from quant_methods.distillation.command import checked_settings

            checked_settings(args)
    except ParetoError as error:
        raise ParetoError(f"{where}: {error}") from None
    return words


def trained_tokens(words: Sequence[str]) -> int:
    """Return how many tokens a student learns that these words of ``pareto distill`` make."""
    from quant_methods.distillation.command import checked_settings

    settings = checked_settings(_parser("distill").parse_args([*NEEDED["distill"], *words]))
    return settings.total_steps * settings.batch * settings.length


def _foreign(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
