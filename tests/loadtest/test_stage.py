from __future__ import annotations

import gevent

from loadtest.load.stage import Stage, Ticket
from loadtest.stage_spec import StageSpec


def test_a_closed_stage_hands_out_warmup_then_the_measured_requests() -> None:
    stage = Stage(StageSpec(concurrency=1, warmup=2, requests=3), seed=0)
    taken = []
    while (ticket := stage.take()) is not None:
        taken.append(ticket)
        stage.done(ticket)
    assert taken == [Ticket(0, True), Ticket(1, True), Ticket(0, False), Ticket(1, False), Ticket(2, False)]


def test_measured_requests_wait_for_the_end_of_the_last_warmup() -> None:
    stage = Stage(StageSpec(concurrency=2, warmup=1, requests=5), seed=0)
    warm = stage.take()
    assert warm == Ticket(0, True)
    waiting = gevent.spawn(stage.take)
    gevent.sleep(0.02)
    assert not waiting.ready()
    assert stage.elapsed() == 0
    stage.done(warm)
    assert waiting.get(timeout=5) == Ticket(0, False)


def test_an_open_stage_limits_by_number_and_by_time() -> None:
    by_number = list(Stage(StageSpec(rate=10.0, arrival="constant", requests=4), 0).arrivals(warmup=False))
    assert [(round(offset, 3), ticket.index) for offset, ticket in by_number] == [(0, 0), (0.1, 1), (0.2, 2), (0.3, 3)]
    by_time = list(Stage(StageSpec(rate=10.0, arrival="constant", duration_s=0.5), 0).arrivals(warmup=False))
    assert [ticket.index for _, ticket in by_time] == [0, 1, 2, 3, 4]


def test_arrivals_differ_between_streams_and_stages() -> None:
    def offsets(index: int, stream: int) -> list[float]:
        stage = Stage(StageSpec(index, rate=5.0, requests=9), seed=1)
        return [offset for offset, _ in stage.arrivals(False, stream)]

    assert offsets(0, 0) == offsets(0, 0)
    assert len({tuple(offsets(i, s)) for i in range(3) for s in range(3)}) == 9


def test_progress_goes_from_nothing_to_all() -> None:
    stage = Stage(StageSpec(concurrency=1, requests=2), seed=0)
    seen = [stage.progress()]
    while (ticket := stage.take()) is not None:
        stage.done(ticket)
        seen.append(stage.progress())
    assert seen == [0.0, 0.5, 1.0]
