from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loadtest.errors import LoadTestError
from loadtest.results.percentiles import distribution
from loadtest.results.records import CANCELLED, ERROR_CLASSES, Record, RecordWriter, read_records, write_json_atomically
from loadtest.results.schema import MetricSeries
from loadtest.results.summary import summarize
from loadtest.stage_spec import StageSpec

SPEC = StageSpec(0, concurrency=2)


def record(index: int, ttft: float = 0.2, gap: float = 0.02, tokens: int = 5, start: float = 0.0) -> Record:
    times = [ttft + i * gap for i in range(tokens)]
    return Record(
        stage=0,
        index=index,
        intended_unix_s=1000.0 + start,
        start_s=0.001,
        first_token_s=times[0],
        last_token_s=times[-1],
        end_s=times[-1] + 0.005,
        token_s=times,
        requested_prompt_tokens=100,
        requested_output_tokens=tokens,
        prompt_tokens=101,
        output_tokens=tokens,
        finish_reason="length",
        status=200,
    )


def failure(index: int, kind: str) -> Record:
    failed = Record(stage=0, index=index, intended_unix_s=1000.0, start_s=0.0, end_s=0.1)
    failed.fail(kind, f"planted {kind}")
    return failed


def test_percentiles_interpolate_between_ranks() -> None:
    values = distribution([10.0, 20.0, 30.0, 40.0])
    assert values is not None
    assert (values.p50, values.p90, values.p95, values.p99) == (25.0, 37.0, 38.5, 39.7)
    assert (values.count, values.mean, values.min, values.max) == (4, 25.0, 10.0, 40.0)
    assert distribution([]) is None


def test_percentiles_are_numpys_on_many_values() -> None:
    data = np.random.default_rng(0).lognormal(3, 1, 1001)
    values = distribution(list(data))
    assert values is not None
    assert values.p99 == pytest.approx(np.percentile(data, 99), abs=1e-4)


def test_latencies_of_known_records() -> None:
    (stage,) = summarize([record(i, ttft=0.1 * (i + 1)) for i in range(3)], [SPEC])
    latency = stage.latency
    assert latency.ttft_ms is not None
    assert (latency.ttft_ms.min, latency.ttft_ms.p50, latency.ttft_ms.max) == pytest.approx((100, 200, 300))
    assert latency.tpot_ms is not None
    assert latency.tpot_ms.p50 == pytest.approx(20)
    assert latency.itl_ms is not None
    assert latency.itl_ms.count == 12
    assert latency.e2e_ms is not None
    assert latency.e2e_ms.max == pytest.approx(385)
    assert latency.schedule_lag_ms is not None
    assert latency.schedule_lag_ms.max == pytest.approx(1)


def test_throughput_is_over_first_start_to_last_end() -> None:
    items = [record(0, ttft=0.5, gap=0.1, tokens=6, start=0.0), record(1, ttft=0.5, gap=0.1, tokens=6, start=0.995)]
    (stage,) = summarize(items, [SPEC])
    assert stage.throughput is not None
    assert stage.throughput.window_s == pytest.approx(2.0)
    assert stage.throughput.requests_per_s == pytest.approx(1.0)
    assert stage.throughput.output_tokens_per_s == pytest.approx(6.0)
    assert stage.throughput.total_tokens_per_s == pytest.approx(6.0 + 101.0)
    assert stage.throughput.mean_in_flight == pytest.approx(2 * 1.004 / 2)


def test_failures_are_counted_by_class_and_kept_out_of_the_latencies() -> None:
    items = [record(0), *(failure(i, kind) for i, kind in enumerate(ERROR_CLASSES, 1)), failure(99, "timeout")]
    (stage,) = summarize(items, [SPEC])
    assert stage.failures == {**dict.fromkeys(ERROR_CLASSES, 1), "timeout": 2}
    assert stage.failure_examples["http_5xx"] == "planted http_5xx"
    assert (stage.requests.ok, stage.requests.failed) == (1, len(ERROR_CLASSES) + 1)
    assert stage.latency.ttft_ms is not None
    assert stage.latency.ttft_ms.count == 1


def test_warmup_and_cancelled_requests_are_in_no_result() -> None:
    slow = replace(record(0, ttft=9.0), warmup=True)
    cancelled = Record(stage=0, index=5, outcome=CANCELLED, intended_unix_s=900.0, end_s=500.0)
    (stage,) = summarize([slow, record(1), cancelled], [SPEC], {"ttft": 300.0})
    assert stage.latency.ttft_ms is not None
    assert stage.latency.ttft_ms.max == pytest.approx(200)
    assert (stage.requests.warmup, stage.requests.cancelled, stage.requests.ok) == (1, 1, 1)
    assert stage.throughput is not None
    assert stage.throughput.window_s < 1
    assert stage.goodput is not None
    assert stage.goodput.fraction == 1.0


def test_goodput_needs_every_limit_and_failures_are_never_good() -> None:
    items = [record(0), record(1, ttft=0.9), record(2, gap=0.2), failure(3, "timeout")]
    (stage,) = summarize(items, [SPEC], {"ttft": 500.0, "tpot": 50.0})
    assert stage.goodput is not None
    assert (stage.goodput.good, stage.goodput.fraction) == (1, 0.25)
    assert stage.throughput is not None
    assert stage.goodput.requests_per_s == pytest.approx(1 / stage.throughput.window_s)


def test_tpot_of_a_single_token_is_undefined_and_meets_its_limit() -> None:
    (stage,) = summarize([record(0, tokens=1)], [SPEC], {"tpot": 1.0})
    assert stage.latency.tpot_ms is None
    assert stage.latency.itl_ms is None
    assert stage.goodput is not None
    assert stage.goodput.good == 1


def test_tpot_counts_the_servers_tokens_when_chunks_hold_several() -> None:
    item = replace(record(0, gap=0.08, tokens=5), output_tokens=17)
    (stage,) = summarize([item], [SPEC])
    assert stage.latency.tpot_ms is not None
    assert stage.latency.tpot_ms.p50 == pytest.approx(20)
    assert stage.latency.itl_ms is not None
    assert stage.latency.itl_ms.p50 == pytest.approx(80)
    assert stage.tokens_per_chunk == pytest.approx(3.4)
    assert any("tokens a chunk" in note for note in stage.notes)


def test_tokens_that_nobody_counted_are_undefined_and_never_the_number_of_chunks() -> None:
    (stage,) = summarize([record(0), replace(record(1), output_tokens=None, prompt_tokens=None)], [SPEC])
    assert (stage.output_tokens, stage.prompt_tokens, stage.tokens_per_chunk) == (None, None, None)
    assert stage.throughput is not None
    assert (stage.throughput.output_tokens_per_s, stage.throughput.total_tokens_per_s) == (None, None)
    # The other answer was counted, so its TPOT is right.
    assert stage.latency.tpot_ms is not None
    assert (stage.latency.tpot_ms.count, stage.latency.tpot_ms.p50) == (1, pytest.approx(20))
    assert any("1 answers had no usage, and nothing counted" in note for note in stage.notes)


def test_text_that_was_tokenized_again_counts_and_a_note_says_so() -> None:
    # Four tokens a chunk: 5 chunks in 80 ms are 20 tokens, so 80 / 19 ms for each after the first.
    (stage,) = summarize([replace(record(0), output_tokens=None, retokenized_output_tokens=20)], [SPEC])
    assert stage.latency.tpot_ms is not None
    assert stage.latency.tpot_ms.p50 == pytest.approx(80 / 19, abs=1e-3)
    assert stage.output_tokens is not None
    assert (stage.output_tokens.total, stage.tokens_per_chunk) == (20, 4.0)
    assert any("tokenized again" in note for note in stage.notes)


def test_a_stage_of_failures_only_has_no_latencies() -> None:
    (stage,) = summarize([failure(0, "timeout")], [SPEC], {"ttft": 1.0})
    assert stage.latency.ttft_ms is None
    assert stage.output_tokens is None
    assert stage.goodput is not None
    assert stage.goodput.fraction == 0


def test_stages_do_not_mix_and_an_empty_stage_is_valid() -> None:
    items = [record(0), replace(record(1, ttft=0.7), stage=1)]
    first, second, third = summarize(items, [SPEC, StageSpec(1, rate=2.0), StageSpec(2, rate=4.0)])
    assert first.requests.ok == second.requests.ok == 1
    assert second.latency.ttft_ms is not None
    assert second.latency.ttft_ms.p50 == pytest.approx(700)
    assert (third.requests.sent, third.throughput, third.goodput) == (0, None, None)


def test_records_survive_the_file_to_the_microsecond(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "records.jsonl")
    items = [record(0, ttft=0.1234567), failure(1, "stream_cut")]
    for item in items:
        writer.write(item)
    # Flushed as they come: readable before the file is closed.
    back = list(read_records(tmp_path / "records.jsonl"))
    writer.close()
    assert back[0].first_token_s == 0.123457
    assert back[1] == items[1]
    assert summarize(back, [SPEC])[0].failures == {"stream_cut": 1}


def test_a_broken_record_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record(0).to_dict()) + "\n{}\n")
    with pytest.raises(LoadTestError, match=r"records\.jsonl:2"):
        list(read_records(path))


def test_the_first_failure_of_a_request_is_its_class() -> None:
    item = failure(0, "stream_error")
    item.fail("stream_cut", "aftermath")
    assert item.error == "stream_error"


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomically(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomically(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_note_says_that_the_prefix_cache_answered() -> None:
    def notes(cached: int | None, hits: float) -> list[str]:
        series = {
            f"vllm:prefix_cache_{name}_total": MetricSeries(2, 0.0, 0.0, 0.0, value, value)
            for name, value in (("hits", hits), ("queries", 400.0))
        }
        (stage,) = summarize([replace(record(i), cached_tokens=cached) for i in range(4)], [SPEC], None, {0: series})
        return [note for note in stage.notes if "prefix cache" in note]

    assert notes(0, 0.0) == notes(None, 1.0) == []
    assert notes(80, 0.0)[0].startswith("79% of the prompt tokens")
    assert notes(None, 300.0)[0].startswith("75% of the prompt tokens")


def late(index: int, start_s: float, held_s: float = 0.0) -> Record:
    sent = record(index, ttft=0.2 + start_s, start=index * 0.1)
    sent.start_s, sent.held_s = start_s, held_s
    return sent


def test_a_late_client_is_not_charged_to_the_server() -> None:
    spec = StageSpec(0, rate=10.0)
    (stage,) = summarize([late(i, 0.3) for i in range(20)], [spec])
    latency = stage.latency
    assert latency.ttft_ms is not None
    assert latency.ttft_ms.p50 == pytest.approx(500)
    assert latency.ttft_from_send_ms is not None
    assert latency.ttft_from_send_ms.p50 == pytest.approx(200)
    assert latency.send_lateness_ms is not None
    assert latency.send_lateness_ms.p95 == pytest.approx(300)
    assert stage.invalid is not None
    assert "300 ms" in stage.invalid
    assert stage.invalid in stage.notes


def test_a_wait_for_max_concurrency_is_not_the_generators_fault() -> None:
    spec = StageSpec(0, rate=10.0, max_concurrency=1)
    (stage,) = summarize([late(i, 0.301, held_s=0.3) for i in range(20)], [spec])
    assert stage.invalid is None
    assert stage.latency.send_lateness_ms is not None
    assert stage.latency.send_lateness_ms.max == pytest.approx(1)
    assert stage.latency.schedule_lag_ms is not None
    assert stage.latency.schedule_lag_ms.max == pytest.approx(301)
    assert any("--max-concurrency" in note for note in stage.notes)


def test_the_limit_of_lateness_grows_with_the_servers_latency() -> None:
    """15 ms are nothing beside a TTFT of 2 s, and much beside one of 20 ms; less than 10 ms are never too much."""
    spec = StageSpec(0, rate=10.0)

    def invalid(ttft_s: float, late_s: float) -> bool:
        items = [record(i, ttft=ttft_s + late_s, start=i * 0.1) for i in range(20)]
        for item in items:
            item.start_s = late_s
        return summarize(items, [spec])[0].invalid is not None

    assert not invalid(2.0, 0.015)
    assert invalid(0.02, 0.015)
    assert not invalid(0.02, 0.009)
    assert invalid(2.0, 0.11)
