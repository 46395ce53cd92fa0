"""``pareto vllm-contract``: what of vLLM this project uses, and whether a vLLM still has it."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from kv_cache.errors import ParetoError
from vllm_ext.contract import CHANGED, MISSING, OK, check, installed_folder, version_in
from vllm_ext.versions import SUPPORTED_VLLM, release_of, vllm_version

HELP = "check that a vLLM has everything that this plugin uses of it"
USER_ERRORS = (ParetoError,)
DESCRIPTION = f"""\
Print every name of vLLM's own code that this plugin uses, and whether vLLM has it:

  ok        it is there, and takes the arguments that we give
  changed   it is there, but takes other arguments
  missing   it, or an attribute of it that we use, is not there

The exit status is 1 if any is changed or missing. Only vLLM's text is read: the check takes a second, and a vLLM for
another device can be checked too, in the folder that its wheel was unpacked into. A vLLM of a release that is not
supported ({", ".join(SUPPORTED_VLLM)} are) is compared with what we use of the newest one that is.

examples:
  pareto vllm-contract
  pip download --no-deps vllm==0.33.0 && unzip -q vllm-0.33.0-*.whl -d vllm-0.33.0
  pareto vllm-contract --source vllm-0.33.0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``pareto vllm-contract``."""
    parser.add_argument("--source", metavar="FOLDER", help="with the folder vllm in it (default: the installed vLLM)")


def run(args: argparse.Namespace) -> int:
    """Print the verdicts; the result is 1 if something does not fit."""
    if args.source is None:
        folder, version = installed_folder(), vllm_version()
    else:
        folder = Path(args.source).expanduser()
        version = version_in(folder)
    release = release_of(version)
    print(f"vLLM {version} in {folder}" + ("" if release else f", compared with {SUPPORTED_VLLM[-1]}"))
    verdicts = check(folder, version)
    width = max(len(verdict.name) for verdict in verdicts)
    for verdict in verdicts:
        reason = f": {verdict.reason}" if verdict.reason else ""
        print(f"{verdict.state:8s} {verdict.name:{width}s} {verdict.place}{reason}")
    counts = Counter(verdict.state for verdict in verdicts)
    print(f"{len(verdicts)} names: {', '.join(f'{counts[state]} {state}' for state in (OK, CHANGED, MISSING))}")
    return 0 if counts[OK] == len(verdicts) else 1
