"""``vllm bench serve`` of the installed vLLM."""

from __future__ import annotations

from pathlib import Path

from bench.lab.load_testers.load import PROMPT_TOKENS, Load
from bench.lab.load_testers.tools.tool import Said, Target, Tool, read_results

EVEN = 1e6
"""Burstiness at which gamma arrivals are at even distances: the deviation is a thousandth of the distance."""


class VllmBench(Tool):
    """The benchmark that comes with the engine."""

    name = "vllm"
    requirement = None
    package = "vllm"

    def words(self, load: Load, target: Target) -> list[str]:
        """Return the arguments of the program."""
        how = (
            ["--max-concurrency", str(load.users)]
            if load.users
            else ["--request-rate", str(load.rate), "--burstiness", f"{EVEN:.0f}"]
        )
        return [
            "bench", "serve", "--base-url", target.url, "--model", target.model, "--tokenizer", str(target.tokenizer),
            "--dataset-name", "random", "--random-input-len", str(PROMPT_TOKENS), "--random-output-len",
            str(load.output_tokens), "--num-prompts", str(load.requests), *how, "--ignore-eos", "--disable-tqdm",
            "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,95", "--save-result",
            "--result-dir", str(target.out), "--result-filename", "result.json",
        ]  # fmt: skip

    def read(self, load: Load, out: Path) -> Said:
        """Return what its result file says."""
        found = read_results(out / "result.json")
        # Without a success it writes zeros.
        some = found["completed"] > 0
        return Said(
            ok=found["completed"],
            failed=found.get("failed"),
            ttft_p50_ms=found["p50_ttft_ms"] if some else None,
            ttft_p95_ms=found["p95_ttft_ms"] if some else None,
            tpot_ms=found["p50_tpot_ms"] if some else None,
            e2e_p50_ms=found["p50_e2el_ms"] if some else None,
            requests_per_s=found["request_throughput"],
            output_tokens=found["total_output_tokens"],
        )
