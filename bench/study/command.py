"""``pareto study``: a plan of measurements, carried out, judged and shown on one page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench.study.step import ORDER
from kv_cache.errors import ParetoError
from kv_cache.terminal import console

# Imported when they are used: they load torch, and --help should not.
if TYPE_CHECKING:
    from bench.study.folder import Folder
    from bench.study.run import Executor
    from bench.study.steps import Graph

HELP = "carry out a plan: distill, compress, evaluate, serve, load-test; a page with the frontier and all verdicts"
DESCRIPTION = """\
Carry out a study: a plan names models, students, recipes, KV-cache dtypes, tasks, loads, repeats and hypotheses.

Every step is kept under OUT/steps by what determines its result, and nothing is done twice, not by another plan with
the same OUT either. Interrupted? The same command goes on. A step that fails is reported with its reason, what needs
its result is skipped, the rest goes on, and the exit status is 1; the same command tries it again.

Examples:
  pareto study smoke                                   # a plan that ships: ref-7m, minutes on 2 cores
  pareto study plan.yaml --data ./data --dry-run       # what it would do, what is done, how long the rest may take
  pareto study plan.yaml --data ./data --out study-out
  pareto study plan.yaml --out study-out --steps distill compress quality tasks    # what other work leaves alone
  pareto study plan.yaml --out study-out --jobs 4      # what is not timed four at once, over this machine's GPUs
  pareto study plan.yaml --out /shared/out --executor ray --ray-address auto      # over GPUs and machines
  pareto study plan.yaml --out study-out --pack        # and everything that another machine needs to check it
  pareto study --verify study-out/plans/plan/plan.tar

It ends with OUT/plans/NAME/study.html and study.json. docs/study.md says how to write a plan and what verdicts mean.
"""
USER_ERRORS = (ParetoError,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``pareto study``."""
    parser.add_argument("plan", nargs="?", metavar="PLAN", help="YAML file, or the name of a plan that ships")
    parser.add_argument("--out", default="study-out", metavar="DIR", help="folder of all steps (default: %(default)s)")
    parser.add_argument("--data", metavar="DIR", help="where the plan's texts and tasks lie (default: beside the plan)")
    parser.add_argument("--models", metavar="DIR", help="where the plan's models lie (default: beside it, or the hub)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and what it costs")
    parser.add_argument(
        "--hardware", nargs="+", metavar="LABEL",
        help="do the steps of these labels of the plan only; the page has all that were done (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", nargs="+", metavar="KIND", choices=ORDER, default=list(ORDER),
        help=f"do steps of these kinds only ({', '.join(ORDER)}), such as what is not timed while others use the "
        "machine; the page has all that were done (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--executor", choices=("local", "ray"), default="local", help="this machine (see --jobs), or a Ray cluster"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="with the local executor, N steps at once that are not timed, over all GPUs; what is timed has its GPU "
        "for itself, and the machine where there is none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--ray-address", metavar="ADDR", help="of the cluster; auto finds it (default: one of its own)")
    parser.add_argument(
        "--page-only", action="store_true",
        help="do nothing but make the page of what is done already, also of a folder that another machine filled",
    )  # fmt: skip
    parser.add_argument("--pack", action="store_true", help="write a reproducibility pack in the end")
    parser.add_argument("--verify", metavar="PACK", help="check a pack: its hashes, its verdicts and its page")


def run(args: argparse.Namespace) -> int:
    """Run ``pareto study``."""
    from bench.study.plan import find_plan, load_plan

    if args.verify is not None:
        if args.plan is not None:
            raise ParetoError("--verify takes a pack and no PLAN")
        from bench.study.pack import verify

        return verify(Path(args.verify))
    if args.plan is None:
        raise ParetoError("which plan? A YAML file, or the name of one that ships, such as smoke")
    path = find_plan(args.plan)
    plan = load_plan(path)
    labels = args.hardware or list(plan.hardware)
    if strange := [label for label in labels if label not in plan.hardware]:
        raise ParetoError(f"--hardware {strange[0]}: the plan has {', '.join(plan.hardware)}")
    if args.ray_address and args.executor != "ray":
        raise ParetoError("--ray-address is of --executor ray")
    if args.jobs < 1 or (args.jobs > 1 and args.executor != "local"):
        raise ParetoError(f"--jobs {args.jobs}: 1 or more, and of --executor local; Ray goes by what machines have")
    from bench.study.folder import Folder
    from bench.study.inputs import Inputs
    from bench.study.steps import build

    folder = Folder(Path(args.out))
    data, models = (None if given is None else Path(given) for given in (args.data, args.models))
    inputs = Inputs(path.parent, data, models, folder.out / "digests.json", tolerant=args.dry_run)
    # The page is of what is in the folder, also where another machine with other versions did it.
    graph = build(plan, path.parent, inputs, folder.measured_with() if args.page_only else None)
    if args.dry_run:
        from bench.study.estimate import show

        show(graph, folder, inputs.missing, labels, args.steps)
        return 0
    return _carry_out(args, path, graph, folder, labels)


def _carry_out(args: argparse.Namespace, path: Path, graph: Graph, folder: Folder, labels: list[str]) -> int:
    """Do the steps, write the page and the pack, and return the exit status."""
    from bench.server import terminated_like_interrupted
    from bench.study.outcome import conclude
    from bench.study.run import look, run

    with folder.alone(), terminated_like_interrupted():
        progress = look(graph, folder, labels, args.steps)
        if not args.page_only:
            try:
                run(progress, _executor(args, folder), console(stderr=True))
            except KeyboardInterrupt:
                page = conclude(graph, folder, path, progress)
                print(f"{progress.counts()}\npage of what is done: {page}", file=sys.stderr, flush=True)
                raise
        page = conclude(graph, folder, path, progress)
        if args.pack:
            from bench.study.pack import pack

            print(f"pack: {pack(graph, folder, page, path)}")
    print(f"{progress.counts()}\npage: {page}")
    partly = [*progress.of("done"), *progress.of("done before")]
    failed = [*progress.of("failed"), *((step, state) for step, state in partly if state.reason)]
    for step, state in failed:
        print(f"pareto study: failed: {step.name}: {state.reason}", file=sys.stderr)
    return 1 if failed else 0


def _executor(args: argparse.Namespace, folder: Folder) -> Executor:
    if args.executor == "ray":
        from bench.study.executors.ray import RayExecutor

        return RayExecutor(folder, args.ray_address)
    from bench.study.executors.local import LocalExecutor

    return LocalExecutor(folder, args.jobs)
