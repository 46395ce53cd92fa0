"""genai-bench, of the makers of SGLang; it is built on Locust, too."""

from __future__ import annotations

from pathlib import Path

from bench.lab.load_testers.load import PROMPT_TOKENS, Load
from bench.lab.load_testers.tools.tool import Said, Target, Tool, read_results, result_file


class GenaiBench(Tool):
    """Closed loops over the chat endpoint."""

    name = "genai-bench"
    requirement = "genai-bench==0.0.5"
    package = "genai-bench"

    def lacks(self, load: Load) -> str | None:
        """Return why there is no such load."""
        return "it has closed loops only" if not (load.users or load.users_instead) else None

    def words(self, load: Load, target: Target) -> list[str]:
        """Return the arguments of the program."""
        return [
            "benchmark", "--api-backend", "vllm", "--api-base", target.url, "--api-key", "none", "--task",
            "text-to-text", "--api-model-name", target.model, "--model-tokenizer", str(target.tokenizer),
            "--num-concurrency", str(load.users or load.users_instead), "--traffic-scenario",
            f"D({PROMPT_TOKENS},{load.output_tokens})", "--max-time-per-run", "1", "--max-requests-per-run",
            str(load.requests), "--additional-request-params", '{"ignore_eos": true}', "--metrics-time-unit", "ms",
            "--experiment-base-dir", str(target.out), "--experiment-folder-name", "run", "--log-dir", str(target.out),
        ]  # fmt: skip

    def read(self, load: Load, out: Path) -> Said:
        """Return what the file of its one run says."""
        found = read_results(result_file(out, "run/D*.json"))["aggregated_metrics"]
        stats = found["stats"]
        errors = found["error_codes_frequency"]

        def figure(name: str, statistic: str) -> float | None:
            value: float | None = (stats.get(name) or {}).get(statistic)
            return value

        return Said(
            ok=found["num_completed_requests"],
            failed=found["num_error_requests"],
            ttft_p50_ms=figure("ttft", "p50"),
            ttft_p95_ms=figure("ttft", "p95"),
            tpot_ms=figure("tpot", "p50"),
            e2e_p50_ms=figure("e2e_latency", "p50"),
            requests_per_s=found["requests_per_second"],
            output_tokens=figure("num_output_tokens", "sum"),
            warnings=tuple(f"{count} with code {code}" for code, count in errors.items()),
        )
