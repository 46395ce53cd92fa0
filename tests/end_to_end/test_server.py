"""A real server over HTTP: our gauges on vLLM's metrics page, a load test against it, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from bench.server import free_port, stop_group

pytestmark = pytest.mark.engine


def pareto(*words, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "vllm_ext.cli", *map(str, words)], capture_output=True, text=True, check=False, **kwargs
    )


def test_serve_load_metrics_and_stop(ref_7m, tmp_path):
    port = free_port()
    words = ["serve", ref_7m, "--port", port, "--kv-cache-dtype", "int4_per_head", "--max-model-len", 1024]
    words += ["--served-model-name", "small", "--enforce-eager", "--kv-cache-memory-bytes", 2**28]
    log = (tmp_path / "serve.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm_ext.cli", *map(str, words)], stdout=log, stderr=log, start_new_session=True
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "serve.log").read_text()[-2000:]
                time.sleep(0.5)
        page = urllib.request.urlopen(f"{url}/metrics").read().decode()
        gauges = {
            line.partition("{")[0]: float(line.rpartition(" ")[2])
            for line in page.splitlines()
            if line.startswith("pareto_") and 'kv_cache_dtype="int4_per_head"' in line
        }
        assert gauges["pareto_kv_cache_info"] == 1
        assert gauges["pareto_kv_cache_bits_per_element"] == 4.25
        assert gauges["pareto_kv_cache_bytes_per_token"] == 6 * 2 * 68
        assert gauges["pareto_kv_cache_compression_ratio"] == pytest.approx(16 / 4.25)

        busy = pareto(*words)
        assert busy.returncode == 2
        assert "Address already in use" in busy.stderr
        assert busy.stderr.count("\n") == 1

        load = pareto(
            "loadtest", "--base-url", url, "--concurrency", 2, "--requests", 6, "--warmup", 1, "--prompt-tokens", 100,
            "--output-tokens", 8, "--out", tmp_path / "load", "--no-progress",
        )  # fmt: skip
        assert load.returncode == 0, load.stderr
        stage = json.loads((tmp_path / "load" / "summary.json").read_text())["stages"][0]
        assert stage["requests"]["ok"] == 6
        assert stage["output_tokens"]["mean"] == 8
        assert stage["prompt_tokens"]["mean"] == pytest.approx(100, abs=5)
        assert stage["latency"]["ttft_ms"]["p95"] > 0
        os.kill(server.pid, signal.SIGINT)
        server.wait(timeout=60)
        left = b"?"
        for _ in range(120):  # vLLM's engine process ends after its parent
            left = subprocess.run(["pgrep", "-g", str(server.pid)], capture_output=True, check=False).stdout
            if not left:
                break
            time.sleep(0.5)
        assert not left
    finally:
        stop_group(server, grace_s=5)
        log.close()


@pytest.mark.long
def test_a_head_size_that_no_kernel_serves_is_refused_in_one_line(tmp_path):
    from tests.end_to_end.engines import write_model

    model = write_model(tmp_path / "model", head_dim=48)
    done = pareto("serve", model, "--port", free_port(), "--kv-cache-dtype", "int4_per_head", "--skip-tokenizer-init")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pareto serve: error: --kv-cache-dtype int4_per_head does not serve head size 48")
    assert "use --kv-cache-dtype auto" in last
    assert "Traceback" not in done.stderr
