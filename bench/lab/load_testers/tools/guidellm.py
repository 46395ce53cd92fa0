"""guidellm, vLLM's load tester."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.lab.load_testers.load import PROMPT_TOKENS, Load
from bench.lab.load_testers.tools.tool import Said, Target, Tool, read_results


class Guidellm(Tool):
    """Version 0.8, whose settings are ``key=value`` lists."""

    name = "guidellm"
    requirement = "guidellm==0.8.1"
    package = "guidellm"

    def words(self, load: Load, target: Target) -> list[str]:
        """Return the arguments of the program."""
        profile = f"kind=concurrent,streams={load.users}" if load.users else f"kind=constant,rate={load.rate}"
        return [
            "run", "--backend", f"kind=openai_http,target={target.url},request_format=/v1/completions",
            "--profile", profile, "--constraint", f"kind=max_requests,count={load.requests}",
            "--tokenizer", f"kind=hf_auto,model={target.tokenizer}",
            "--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={load.output_tokens}",
            "--output", f"kind=json,path={target.out / 'result.json'}", "--disable-progress",
        ]  # fmt: skip

    def read(self, load: Load, out: Path) -> Said:
        """Return what its JSON says of its one benchmark."""
        (benchmark,) = read_results(out / "result.json")["benchmarks"]
        metrics, totals = benchmark["metrics"], benchmark["metrics"]["request_totals"]

        def figure(name: str, quantile: str) -> float | None:
            values: dict[str, Any] | None = metrics[name]["successful"]
            return values["percentiles"][quantile] if values and values["count"] else None

        return Said(
            ok=totals["successful"],
            failed=totals["errored"],
            ttft_p50_ms=figure("time_to_first_token_ms", "p50"),
            ttft_p95_ms=figure("time_to_first_token_ms", "p95"),
            # Its time_per_output_token_ms is the whole latency over all tokens.
            tpot_ms=figure("inter_token_latency_ms", "p50"),
            e2e_p50_ms=_in_ms(figure("request_latency", "p50")),
            requests_per_s=metrics["requests_per_second"]["successful"]["mean"],
            output_tokens=metrics["output_token_count"]["successful"]["total_sum"],
            warnings=tuple(_texts(benchmark.get("warnings"))),
        )


def _in_ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _texts(warnings: Any) -> list[str]:
    return [str(one.get("message", one) if isinstance(one, dict) else one) for one in warnings or ()]
