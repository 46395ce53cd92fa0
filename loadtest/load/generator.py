"""One of several processes of ``--processes`` that send the requests of each stage together: the child's side.

See :mod:`loadtest.load.pool` for the parent's, and for what they say to each other.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import gevent
from gevent.event import AsyncResult, Event
from gevent.queue import Queue

from loadtest import clock
from loadtest.endpoint.client import Client
from loadtest.errors import LoadTestError
from loadtest.load.batches import RecordBatches
from loadtest.load.counts import SharedCounts
from loadtest.load.link import Link
from loadtest.load.local import LocalLoad
from loadtest.load.loop_lag import LoopLag
from loadtest.load.make_workload import make_workload
from loadtest.load.order import Order
from loadtest.load.sink import Sink
from loadtest.load.stage import Stage
from loadtest.shapes.registry import make_shape
from loadtest.stage_spec import StageSpec

_FLUSH_S = 0.1


class GeneratorProcess:
    """Does what the parent says.

    Args:
        end: of the socket pair whose other end the parent has.
        counts: of the present stage, shared by all processes.
        order: what to send.

    """

    def __init__(self, end: socket.socket, counts: SharedCounts, order: Order) -> None:
        self._counts, self._order = counts, order
        self._orders: Queue[StageSpec | None] = Queue()
        self._cancel = Event()
        self._go: AsyncResult = AsyncResult()
        # Without its parent nobody takes its records: a load that nobody watches must end.
        self._link = Link(end, self._listen, lambda: os._exit(1))

    def run(self) -> None:
        """Send one stage after the other."""
        order, request = self._order, self._order.request
        client = Client(order.base_url, request.timeout, request.headers, request.insecure, request.ca_cert)
        try:
            workload, _ = make_workload(client, order.server, request, order.cost)
        except LoadTestError as error:
            self._link.send("refused", str(error))
            self._link.close()
            sys.exit(2)
        lag = LoopLag()
        batches = RecordBatches(lambda batch: self._link.send("records", batch), lag.take, _FLUSH_S)
        sink = Sink(batches.add, counts=self._counts)
        load = LocalLoad(client, workload, sink, self._counts, lag, order.part)
        batches.flush()
        self._link.send("ready")
        while (spec := self._orders.get()) is not None:
            stage = Stage(spec, request.seed, self._gate, make_shape(spec, workload.times), self._counts)
            load.run(stage, self._cancel)
            batches.flush()
            self._link.send("ended")
        self._link.close()

    def _listen(self, kind: str, content: Any) -> None:
        if kind == "stage":
            self._cancel.clear()
            self._go = AsyncResult()
            self._orders.put(StageSpec(**content))
        elif kind == "go":
            self._go.set(content)
        elif kind == "cancel":
            self._cancel.set()
        elif kind == "quit":
            self._orders.put(None)

    def _gate(self) -> float:
        """Say that no warm-up request of this process is in flight, and wait for the moment at which all begin."""
        self._link.send("warm")
        gevent.wait([self._go, self._cancel], count=1)
        if not self._go.ready():
            return clock.now()
        moment = float(self._go.get())
        gevent.sleep(max(0.0, moment - clock.now()))
        return moment
