"""Prints the decode kernel's relative error norms against float64, and writes them as JSON.

    python -m tests.kv_cache.cuda.measure_errors results/gpu-decode-kernel/errors.json

``rounding`` is the error of the exact result rounded to the output's dtype: what no kernel can be below.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from kv_cache.formats import FORMATS
from tests.kv_cache.cuda.random_batch import Batch, relative_error

CASES = {
    "8192 tokens": {"lens": [8192] * 4},
    "32768 tokens": {"lens": [32768] * 2},
    "8192 tokens, 5 query tokens": {"lens": [8192] * 2, "query_lens": [5] * 2},
    "8192 tokens, logits of deviation 9": {"lens": [8192] * 4, "sharpness": 3.0},
    "8192 tokens, soft cap 30": {"lens": [8192] * 4, "soft_cap": 30.0, "sharpness": 3.0},
}


def main() -> None:
    rows = []
    for name in FORMATS:
        for case, more in CASES.items():
            for dtype in (torch.float16, torch.bfloat16):
                options = {"query_lens": [1] * len(more["lens"]), **more}
                batch = Batch.make(
                    name, options.pop("lens"), options.pop("query_lens"), kv_heads=8, dtype=dtype, **options
                )
                want = batch.want()
                row = {
                    "format": name,
                    "case": case,
                    "dtype": str(dtype).removeprefix("torch."),
                    "error": relative_error(batch.run(), want),
                    "rounding": relative_error(want.to(dtype), want),
                }
                rows.append(row)
                print(f"{name:14} {case:36} {row['dtype']:8} {row['error']:.2e}, rounding {row['rounding']:.2e}")
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "command": f"python -m tests.kv_cache.cuda.measure_errors {path}",
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
        }
        path.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
