"""aiperf, NVIDIA's load tester."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from bench.lab.load_testers.load import PROMPT_TOKENS, Load
from bench.lab.load_testers.tools.tool import Said, Target, Tool, read_results


class Aiperf(Tool):
    """The successor of genai-perf."""

    name = "aiperf"
    requirement = "aiperf==0.13.0"
    package = "aiperf"
    # Offline it takes a tokenizer from the cache of the Hub only, and not from a folder.
    variables: ClassVar = {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": ""}

    def words(self, load: Load, target: Target) -> list[str]:
        """Return the arguments of the program."""
        how = (
            ["--concurrency", str(load.users)]
            if load.users
            else ["--request-rate", str(load.rate), "--arrival-pattern", "constant"]
        )
        return [
            "profile", "--model", target.model, "--url", target.url, "--endpoint-type", "completions", "--streaming",
            *how, "--request-count", str(load.requests), "--synthetic-input-tokens-mean", str(PROMPT_TOKENS),
            "--output-tokens-mean", str(load.output_tokens), "--tokenizer", str(target.tokenizer),
            "--extra-inputs", "ignore_eos:true", "--ui", "none", "--output-artifact-dir", str(target.out),
        ]  # fmt: skip

    def read(self, load: Load, out: Path) -> Said:
        """Return what its JSON export says."""
        found = read_results(out / "profile_export_aiperf.json")

        def figure(name: str, statistic: str = "avg") -> float | None:
            values: dict[str, Any] = found.get(name) or {}
            return values.get(statistic)

        return Said(
            ok=int(figure("request_count") or 0),
            failed=int(figure("error_request_count") or 0),
            ttft_p50_ms=figure("time_to_first_token", "p50"),
            ttft_p95_ms=figure("time_to_first_token", "p95"),
            tpot_ms=figure("inter_token_latency", "p50"),
            e2e_p50_ms=figure("request_latency", "p50"),
            requests_per_s=figure("request_throughput"),
            output_tokens=figure("total_osl"),
            warnings=tuple(
                f"{one['count']} {one['error_details']['type']}: {one['error_details']['message']}"[:200]
                for one in found.get("error_summary") or ()
            ),
        )
