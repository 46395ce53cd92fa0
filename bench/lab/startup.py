"""How long a server takes from its command to its first token, by KV-cache dtype.

Every dtype is started with empty caches (the compiled kernels of vLLM, Triton, PyTorch and this project, and the scales
that a start without calibrated ones measures), and then again with what the first start left there. All starts of one
kind come before the next kind, so files of the model are in the machine's memory for all but the first. --beside starts
the dtypes side by side, each on a GPU of its own where there are several; that needs cores enough that they do not wait
for each other, and memory for all that share a GPU: give vLLM --kv-cache-memory-bytes, since it counts what others take
as its own. A dtype that does not start is said, and the others are measured. The result is written after every kind.

    python -m bench.lab.startup MODEL --kv-cache-dtype auto fp8 int4_per_head --rounds 3 --out results/gpu-startup \\
        -- --max-model-len 8192
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.environment import VISIBLE_GPUS, environment, visible_gpus
from bench.files import write_json
from bench.server import serving
from kv_cache.errors import ParetoError

SCHEMA = "vllm-pareto/startup/1"
CACHES = {
    "PARETO_CACHE": "pareto",
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
}
"""Variables that name folders of what a start leaves for the next, and the folders' names here."""


@dataclass(frozen=True)
class Job:
    """A start: the model, the dtype, further flags, the server's log, the folder of its caches, and its GPU if told."""

    model: str
    dtype: str
    flags: Sequence[str]
    log: Path
    caches: Path
    gpu: str | None = None


def start(job: Job) -> dict[str, float]:
    """Start a server, ask for a token, and return the seconds until it was ready and until the token was there."""
    began = time.perf_counter()
    words = [job.model, "--kv-cache-dtype", job.dtype, "--served-model-name", "model", *job.flags]
    folders = {name: str(job.caches / part) for name, part in CACHES.items()}
    if job.gpu is not None:
        folders[VISIBLE_GPUS] = job.gpu
    with serving(words, job.log, variables=folders) as server:
        ready = time.perf_counter() - began
        body = {"model": "model", "prompt": [7] * 32, "max_tokens": 1, "temperature": 0}
        request = urllib.request.Request(
            f"{server.base_url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            response.read()
        return {"ready_s": ready, "first_token_s": time.perf_counter() - began}


def attempt(job: Job) -> dict[str, float] | str:
    """Return what :func:`start` does, or why the server did not start."""
    try:
        return start(job)
    except ParetoError as error:
        return str(error)


def measure(args: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Return a record for every dtype and kind of start, with all its starts; ``keep`` has them after every kind."""
    records: dict[tuple[str, str], dict[str, Any]] = {}
    gpus = visible_gpus() if args.beside else []
    for turn in range(args.rounds):
        with tempfile.TemporaryDirectory(prefix="startup-") as folder:
            for kind in ("empty caches", "filled caches"):
                jobs = [
                    Job(args.model, dtype, args.flags, args.out / "logs" / f"{turn}-{kind.split()[0]}-{dtype}.log",
                        Path(folder) / dtype, gpus[place % len(gpus)] if len(gpus) > 1 else None)
                    for place, dtype in enumerate(args.kv_cache_dtype)
                ]  # fmt: skip
                with ThreadPoolExecutor(len(jobs) if args.beside else 1) as pool:
                    all_found = list(pool.map(attempt, jobs))
                for dtype, found in zip(args.kv_cache_dtype, all_found, strict=True):
                    record = records.setdefault((dtype, kind), {"dtype": dtype, "caches": kind, "starts": []})
                    if isinstance(found, str):
                        record["error"] = found
                        print(f"round {turn + 1}, {kind}, {dtype}: failed: {found}", file=sys.stderr, flush=True)
                        continue
                    record["starts"].append(found)
                    for key in ("ready_s", "first_token_s"):
                        record[key] = statistics.median(one[key] for one in record["starts"])
                    print(f"round {turn + 1}, {kind}, {dtype}: first token after {found['first_token_s']:.1f} s",
                          flush=True)  # fmt: skip
                keep(list(records.values()))
    return list(records.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    flags = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["auto", "fp8", "int4_per_head"])
    parser.add_argument("--rounds", type=int, default=1, help="starts of each kind; the median counts")
    parser.add_argument("--beside", action="store_true", help="start the dtypes side by side")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    args.flags = flags
    about = {"schema": SCHEMA, "command": words, "environment": environment()}
    records = measure(args, lambda found: write_json(args.out / "startup.json", {**about, "results": found}))
    measured = [record for record in records if record["starts"]]
    for record in measured:
        print(f"{record['dtype']:16} {record['caches']:14} {record['first_token_s']:6.1f} s")
    return 0 if len(measured) == len(records) else 1


if __name__ == "__main__":
    sys.exit(main())
