"""``pareto kv-study``: what ways to code a KV cache cost in quality and in bits, without an engine or kernels."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from bench.kv_study.plot import frontier, plot
from bench.kv_study.schema import CoderResult, KVStudyReport
from bench.schema import Estimate
from kv_cache.errors import ParetoError

HELP = "compare ways to code a KV cache: KL divergence against bits, simulated in PyTorch"
DESCRIPTION = """\
Run a model in float32 with keys and values that went through a coder, and compare it with the model as it is.

Coders are this project's KV-cache formats, the same with parts done differently, vLLM's dtypes, and those of papers
(--list names them). Attention sees what is read back from codes, for a query's own token too, unless a coder keeps the
newest tokens as they are: this project's formats keep a query's own, which costs no memory. No kernel is involved, so a
coder can be judged before one is written.

  bits         of an element of keys and values, scales and all other metadata included
  KL           KL divergence (full precision || coded) over the whole vocabulary, nats per token
  top-1        how often both put the same token first
  perplexity   change against full precision
  *            no other coder has both fewer bits and less KL

Examples:
  pareto kv-study ref-7m --coder 'int?_per_head' int4_per_token_head fp8 --out /tmp/study
  pareto kv-study HuggingFaceTB/SmolLM2-135M-Instruct --text wiki.txt held-out.jsonl --calibration calib.jsonl \\
      --window-tokens 4096 --device cuda --out results/kv-study/smollm2
  pareto kv-study ref-7m --key-bias 60 --out /tmp/biased       # as Qwen2's keys are
  pareto kv-study --plot /tmp/study/kv-study.json              # draw again, where matplotlib is installed

Results: OUT/kv-study.json, kv-study.md and kv-study.png. Started again with the same flags, finished coders are not
measured again, and other coders can be added. docs/kv-study.md says what the coders are and what came out.
"""
USER_ERRORS = (ParetoError,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``pareto kv-study``."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="embedded name (ref-7m), folder, or hub name")
    parser.add_argument("--out", metavar="DIR", default="kv-study", help="folder of the result (default: %(default)s)")
    parser.add_argument(
        "--coder", nargs="+", default=["*"], metavar="NAME", help="coders, * and ? as in a shell (default: all)"
    )
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="NAME", help="of these, coders to measure though they are done"
    )
    parser.add_argument("--list", action="store_true", help="name the coders and stop")
    parser.add_argument("--plot", metavar="JSON", help="draw an earlier result beside it and stop")
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help=".txt or .jsonl (default: the model writes its own)"
    )
    parser.add_argument("--num-windows", type=int, default=4, metavar="N", help="of each text (default: %(default)s)")
    parser.add_argument(
        "--window-tokens", type=int, default=2048, metavar="N", help="of each window (default: %(default)s)"
    )
    parser.add_argument("--calibration", metavar="FILE", help="text to fit coders on (default: the model's own)")
    parser.add_argument(
        "--calibration-windows", type=int, default=32, metavar="N", help="windows of it (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=2048, metavar="N", help="tokens of each (default: %(default)s)"
    )
    parser.add_argument(
        "--key-bias", type=float, default=0.0, metavar="X", help="plant biases of +-X in 6 key channels of each head"
    )
    parser.add_argument(
        "--value-outlier", type=float, default=1.0, metavar="X",
        help="make 2 value channels of each head X times larger, the output projection undoing it",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="torch device, such as cuda (default: %(default)s)")
    parser.add_argument(
        "--batch-tokens", type=int, default=16384, metavar="N", help="tokens at once (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampled text and of calibration (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run ``pareto kv-study``."""
    from bench.files import write_text
    from bench.kv_study.run import RESULT, Settings, Study, progress_lines, read_report
    from kv_cache.simulate.registry import ENTRIES, chosen

    if args.list:
        for name, entry in ENTRIES.items():
            print(f"{name:32s} {entry.family}")
        return 0
    if args.plot:
        picture = Path(args.plot).with_suffix(".png")
        plot(read_report(Path(args.plot)), picture)
        print(f"wrote {picture}")
        return 0
    if args.model is None:
        raise ParetoError("which MODEL? Give an embedded name (ref-7m), a folder, or a hub name; or --plot JSON")
    for flag, least in (("num_windows", 1), ("window_tokens", 2), ("calibration_windows", 1), ("batch_tokens", 1)):
        if getattr(args, flag) < least:
            raise ParetoError(f"--{flag.replace('_', '-')} must be at least {least}, got {getattr(args, flag)}")
    if args.calibration_tokens < 16:
        raise ParetoError(f"--calibration-tokens must be at least 16, got {args.calibration_tokens}")
    if args.value_outlier <= 0:
        raise ParetoError(f"--value-outlier must be above 0 (1 plants nothing), got {args.value_outlier:g}")
    _check_device(args.device)
    names, again = chosen(args.coder), set(chosen(args.again))
    if strange := [name for name in chosen(args.again) if name not in names]:
        raise ParetoError(f"--again names coders that --coder does not: {', '.join(strange)}; name them in both")
    settings = Settings(
        model=args.model,
        texts=tuple(args.text),
        num_windows=args.num_windows,
        window_tokens=args.window_tokens,
        calibration=args.calibration,
        calibration_windows=args.calibration_windows,
        calibration_tokens=args.calibration_tokens,
        key_bias=args.key_bias,
        value_outlier=args.value_outlier,
        seed=args.seed,
    )
    out = Path(args.out)
    command = shlex.join([Path(word).name if Path(word).exists() else word for word in sys.argv])
    with progress_lines() as lines:
        study = Study(settings, out, device=args.device, batch_tokens=args.batch_tokens, lines=lines, command=command)
        report = study.run(names, again, lambda result: print(line(result), flush=True))
    print()
    print(table(report))
    write_text(out / "kv-study.md", markdown(report))
    written = [str(out / RESULT), str(out / "kv-study.md")]
    try:
        plot(report, out / "kv-study.png")
        written.append(str(out / "kv-study.png"))
    except ParetoError as error:
        print(f"kv-study: no picture: {error}", file=sys.stderr)
    print(f"wrote {', '.join(written)}")
    return 0


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ParetoError(f"--device {name}: {str(error).splitlines()[0]}") from error


HEADINGS = ("coder", "", "bits", "KL", "top-1", "perplexity", "family")


def cells(coder: CoderResult, best: bool) -> list[str]:
    """Return a coder's row under :data:`HEADINGS`."""
    if coder.kl is None or coder.bits is None or coder.top1_agreement is None or coder.perplexity_change is None:
        return [coder.name, "", "-", f"not measured: {coder.error}", "", "", coder.family]
    return [
        coder.name,
        "*" if best else "",
        f"{coder.bits:.2f}",
        _with_error(coder.kl, "{:.5f}"),
        _with_error(coder.top1_agreement, "{:.4f}"),
        _with_error(coder.perplexity_change, "{:+.2%}"),
        coder.family,
    ]


def _with_error(estimate: Estimate, form: str) -> str:
    error = estimate.standard_error
    return form.format(estimate.value) + ("" if error is None else " ±" + form.format(error).lstrip("+"))


def line(coder: CoderResult) -> str:
    """Return a coder's figures in one line."""
    name, _, bits, *figures, _ = cells(coder, best=False)
    seconds = "" if coder.run_seconds is None else f"  {(coder.fit_seconds or 0) + coder.run_seconds:.1f} s"
    return f"{name}: {bits} bits, " + ", ".join(
        f"{heading} {figure}" for heading, figure in zip(HEADINGS[3:6], figures, strict=True) if figure
    ) + seconds  # fmt: skip


def _rows(report: KVStudyReport) -> list[list[str]]:
    best = frontier(report)
    coders = sorted(report.coders, key=lambda coder: (coder.bits is None, coder.bits or 0.0))
    return [cells(coder, coder.name in best) for coder in coders]


def table(report: KVStudyReport) -> str:
    """Return the result as aligned text; rich, which other commands print tables with, need not be installed here."""
    rows = [list(HEADINGS), *_rows(report)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    made = []
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        padded[2:6] = [cell.rjust(width) for cell, width in zip(row[2:6], widths[2:6], strict=True)]
        made.append("  ".join(padded).rstrip())
    return "\n".join(made)


def markdown(report: KVStudyReport) -> str:
    """Return the result as a Markdown document."""
    settings, environment = report.settings, report.environment
    planted = ""
    if settings["key_bias"]:
        planted += f" Key biases of ±{settings['key_bias']:g} planted."
    if settings["value_outlier"] != 1:
        planted += f" Value channels made {settings['value_outlier']:g} times larger."
    head = [
        f"# Coders of the KV cache on {Path(settings['model']).name}",
        "",
        f"{len(report.reference_nll)} windows of {settings['window_tokens']:,} tokens, every token read from codes, "
        f"float32; perplexity in full precision {_with_error(report.perplexity, '{:.3f}')}.{planted} Calibration: "
        f"{settings['calibration_windows']} windows of {settings['calibration_tokens']:,} tokens. "
        f"± is a standard error over windows, * what no other coder beats in bits and KL. "
        f"{environment['device']}, {environment['machine']}, {environment['versions']}, "
        f"commit {environment['commit']}.",
        "",
        f"`{report.command}`",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + " --- |" * len(HEADINGS),
    ]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in _rows(report)), ""])


def main(argv: list[str] | None = None) -> int:
    """Run the command by itself: ``python -m bench.kv_study.command``, where the package is not installed."""
    parser = argparse.ArgumentParser(
        prog="kv-study", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except ParetoError as error:
        print(f"kv-study: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
