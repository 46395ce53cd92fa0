"""The load testers by name. A new one is a file and a line here."""

from __future__ import annotations

from bench.lab.load_testers.tools.aiperf import Aiperf
from bench.lab.load_testers.tools.genai_bench import GenaiBench
from bench.lab.load_testers.tools.guidellm import Guidellm
from bench.lab.load_testers.tools.pareto import Pareto
from bench.lab.load_testers.tools.tool import Tool
from bench.lab.load_testers.tools.vllm_bench import VllmBench

TOOLS: dict[str, Tool] = {tool.name: tool for tool in (Pareto(), Guidellm(), Aiperf(), VllmBench(), GenaiBench())}
