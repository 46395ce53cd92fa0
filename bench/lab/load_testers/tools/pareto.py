"""``pareto loadtest`` of this checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from bench.lab.load_testers.load import PROMPT_TOKENS, Load
from bench.lab.load_testers.tools.tool import Said, Target, Tool, read_results

ROOT = Path(__file__).resolve().parents[4]


class Pareto(Tool):
    """Our own."""

    name = "pareto"
    requirement = None
    package = "vllm-pareto"
    # The installed program may belong to another checkout.
    variables: ClassVar = {"PYTHONPATH": str(ROOT)}

    def words(self, load: Load, target: Target) -> list[str]:
        """Return the arguments of the program."""
        how = ["--concurrency", str(load.users)] if load.users else ["--rate", str(load.rate), "--arrival", "constant"]
        return [
            "loadtest", "--base-url", target.url, "--model", target.model, *how, "--requests", str(load.requests),
            "--prompt-tokens", str(PROMPT_TOKENS), "--output-tokens", str(load.output_tokens), "--no-progress",
            "--out", str(target.out / "run"),
        ]  # fmt: skip

    def read(self, load: Load, out: Path) -> Said:
        """Return what ``summary.json`` says."""
        (stage,) = read_results(out / "run" / "summary.json")["stages"]
        latency, tokens, rates = stage["latency"], stage["output_tokens"], stage["throughput"]

        def figure(name: str, quantile: str) -> float | None:
            values: dict[str, Any] | None = latency[name]
            return values[quantile] if values else None

        return Said(
            ok=stage["requests"]["ok"],
            failed=stage["requests"]["failed"],
            ttft_p50_ms=figure("ttft_ms", "p50"),
            ttft_p95_ms=figure("ttft_ms", "p95"),
            tpot_ms=figure("tpot_ms", "p50"),
            e2e_p50_ms=figure("e2e_ms", "p50"),
            requests_per_s=rates["requests_per_s"] if rates else None,
            output_tokens=tokens["total"] if tokens else None,
            warnings=(*(f"{count} {kind}" for kind, count in stage["failures"].items()), *stage["notes"]),
        )
