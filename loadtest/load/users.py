"""Locust users that generate text, in a closed or an open loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import gevent
from gevent.lock import DummySemaphore, Semaphore
from gevent.pool import Group
from locust import User, task
from locust.env import Environment
from locust.exception import StopUser

from loadtest import clock
from loadtest.endpoint.answer import Answer
from loadtest.endpoint.apis.registry import APIS
from loadtest.endpoint.client import Client
from loadtest.load.ahead import Ahead
from loadtest.load.counts import share
from loadtest.load.sink import Sink
from loadtest.load.stage import Stage, Ticket
from loadtest.results import records
from loadtest.results.records import Record
from loadtest.workloads.workload import Conversation, Request, Workload

# A closed loop against a server that has gone must not spin: a refused connection ends at once, and so does one for
# which this process has no file descriptor.
_DEAD_SERVER_PAUSE_S = 0.1
# A user of a closed loop that is told to slow down does; an open loop keeps its rate, whatever it is told.
_UNASKED_BACK_OFF_S, _LONGEST_BACK_OFF_S = 1.0, 60.0


class RequestFailedError(Exception):
    """What Locust counts as a failure: the error's class and message."""


@dataclass(frozen=True)
class Prepared:
    """A conversation, mostly of one turn, with its first request ready to be sent."""

    conversation: Conversation
    first: Request


class Session:
    """What the users of one process share while a stage runs.

    Args:
        environment: Locust's; every request is fired as its ``request`` event, so its statistics, web UI and reports
            are right.
        client: connections to the endpoint.
        workload: makes the requests.
        stage: says which request is next.
        sink: takes the records.
        stream_id: sets the prompts and arrivals of this process apart from those of other workers.
        part: (i, n): this process sends every n-th request of one stream that n processes share, and has every n-th
            user of a closed loop. None: each user of an open loop is a stream of its own, at the whole rate.

    """

    def __init__(
        self,
        environment: Environment,
        client: Client,
        workload: Workload,
        stage: Stage,
        sink: Sink,
        *,
        stream_id: int = 0,
        part: tuple[int, int] | None = (0, 1),
    ) -> None:
        self.stage = stage
        self.part = part
        self.stream_id = stream_id
        self._environment = environment
        self._client = client
        self._workload = workload
        self._sink = sink
        self._path = APIS[workload.endpoint.name].path
        limit = stage.spec.max_concurrency
        self._slots: Semaphore | DummySemaphore = Semaphore(share(limit, part or (0, 1))) if limit else DummySemaphore()
        self._streams = 0
        self._users = 0

    def next_stream(self) -> int:
        """Return a number for another arrival stream of this process, unique over all workers below 1000 streams."""
        self._streams += 1
        return self.stream_id * 1000 + self._streams - 1

    def next_user(self) -> int:
        """Return the number of another user of a closed loop, from 0; this process has every n-th of its part."""
        first, step = self.part or (0, 1)
        self._users += 1
        return first + (self._users - 1) * step

    def prepare(self, ticket: Ticket, stream_id: int | None = None) -> Prepared:
        """Build a conversation's first request before it is due, so that its making costs no latency."""
        stream = self.stream_id if stream_id is None else stream_id
        conversation = self._workload.conversation(self.stage.spec.index, ticket.index, ticket.warmup, stream)
        return Prepared(conversation, conversation.request())

    def send(self, ticket: Ticket, prepared: Prepared, intended: float | None = None) -> Record:
        """Send a request now, and after its answer and a pause each further turn of its conversation.

        A failure ends the conversation, and so does the end of the stage: no turn begins after that.

        Args:
            ticket: what :class:`Stage` handed out: one for the whole conversation.
            prepared: what :meth:`prepare` built.
            intended: when it was meant to start; None means now (closed loop).

        Returns:
            The record of the last turn.

        """
        request = prepared.first
        begin = clock.now() if intended is None else intended
        try:
            while True:
                record, answer = self._exchange(ticket, request, begin)
                following = prepared.conversation.proceed(answer.text) if record.outcome == records.OK else None
                if following is None:
                    return record
                request = following
                # A turn is due when its user has thought, which begins at the end of the answer; without that it is
                # due when it is there to be sent.
                begin = begin + record.end_s + request.think_s if request.think_s else clock.now()
                gevent.sleep(max(0.0, min(begin - clock.now(), self._left())))
                if self.stage.closed or self._left() <= 0:
                    return record
        finally:
            self.stage.done(ticket)

    def _left(self) -> float:
        """Return the seconds in which further turns of the stage may begin."""
        limit = self.stage.spec.duration_s
        return math.inf if limit is None else limit - self.stage.elapsed()

    def _exchange(self, ticket: Ticket, request: Request, intended: float) -> tuple[Record, Answer]:
        """Send one request, record it and tell Locust, whatever becomes of it."""
        record = Record(
            self.stage.spec.index,
            ticket.index,
            ticket.warmup,
            clock.to_unix(intended),
            requested_prompt_tokens=request.prompt_tokens,
            requested_output_tokens=request.output_tokens,
            turn=request.turn,
        )
        self._sink.begin()
        try:
            answer = self._stream(request, record, intended)
            self._count(record, answer)
        finally:
            self._sink.end(record)
            self._tell_locust(record)
        return record, answer

    def _stream(self, request: Request, record: Record, intended: float) -> Answer:
        ready = clock.now()
        try:
            with self._slots:
                record.held_s = clock.now() - ready
                return self._client.stream(self._path, request.body, record, intended)
        except gevent.GreenletExit:
            if record.start_s is None:
                record.end_s = clock.now() - intended
            record.outcome = records.CANCELLED
            raise

    def _count(self, record: Record, answer: Answer) -> None:
        """Count the tokens of an answer for which the server did not."""
        if record.outcome == records.OK and record.output_tokens is None and self._workload.count_tokens:
            text = answer.generated
            record.retokenized_output_tokens = self._workload.count_tokens(text) if text else None

    def _tell_locust(self, record: Record) -> None:
        if record.outcome == records.CANCELLED:
            return
        error = None
        if record.outcome == records.ERROR:
            # Locust groups failures by this text: the class alone keeps the groups few.
            error = RequestFailedError(record.error)
        self._environment.events.request.fire(
            request_type="WARMUP" if record.warmup else "POST",
            name=self._path,
            response_time=record.end_s * 1000,
            response_length=record.counted_output_tokens or 0,
            exception=error,
            context={},
            start_time=record.intended_unix_s,
            url=self._client.base_url + self._path,
        )


class GenerationUser(User):
    """Asks for text: one request after the other (closed loop), or an arrival process of its own (open loop).

    In a closed loop the number of Locust users is the concurrency. In an open loop requests never wait for each
    other, and one Locust user sends the whole stream of arrivals, or this process's part of it. Without a part each
    user is a stream at the stage's rate: ``n`` users offer ``n`` times the rate.
    Needs ``environment.loadtest_session``; None there ends the user.
    """

    abstract = True
    _number: tuple[Session, int] | None = None

    @task
    def generate(self) -> None:
        """Send the next request, or run the whole arrival stream."""
        session: Session | None = self.environment.loadtest_session
        if session is None:
            raise StopUser
        if session.stage.spec.mode == "open":
            self._run_arrivals(session)
            raise StopUser
        if self._number is None or self._number[0] is not session:
            self._number = session, session.next_user()
        ticket = session.stage.take(self._number[1])
        if ticket is None:
            raise StopUser
        record = session.send(ticket, session.prepare(ticket))
        if record.error in (records.CONNECTION_REFUSED, records.CONNECTION_ERROR, records.CLIENT_ERROR):
            gevent.sleep(_DEAD_SERVER_PAUSE_S)
        elif record.error == records.HTTP_429 or record.retry_after_s is not None:
            self._back_off(session.stage, record.retry_after_s)

    @staticmethod
    def _back_off(stage: Stage, asked_s: float | None) -> None:
        """Wait as long as the server asked for, but not beyond the end of the stage."""
        pause = _UNASKED_BACK_OFF_S if asked_s is None else min(asked_s, _LONGEST_BACK_OFF_S)
        if stage.spec.duration_s is not None:
            pause = min(pause, max(0.0, stage.spec.duration_s - stage.elapsed()))
        gevent.sleep(pause)

    def _run_arrivals(self, session: Session) -> None:
        stage = session.stage
        stream_id = session.next_stream() if session.part is None else 0
        part = session.part or (0, 1)
        in_flight = Group()
        try:
            for warmup in (True, False):
                if warmup and not stage.spec.warmup:
                    continue
                made = Ahead(stage.arrivals(warmup, stream_id, part), partial(session.prepare, stream_id=stream_id))
                made.fill()
                zero = stage.begin(warmup)
                for offset, ticket, request in made.due(zero):
                    if stage.closed:
                        break
                    in_flight.spawn(session.send, ticket, request, zero + offset)
                in_flight.join()
        finally:
            in_flight.kill()
