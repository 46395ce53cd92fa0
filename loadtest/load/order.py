"""What one of several processes of ``--processes`` is to send, and how it begins."""

from __future__ import annotations

import signal
import socket
from dataclasses import dataclass

from loadtest import clock
from loadtest.load.counts import SharedCounts
from loadtest.request_settings import RequestSettings
from loadtest.results.schema import Server
from loadtest.unpatched import import_locust
from loadtest.workloads.prompts import TokenCost


@dataclass(frozen=True)
class Order:
    """What a process is to send.

    Attributes:
        part: (i, n): it is number i of n.
        base_url: of the endpoint.
        request: what is asked.
        server: the endpoint, as the parent found it.
        cost: what text costs there; None where the prompts need not know.
        anchor: of the parent's clock.

    """

    part: tuple[int, int]
    base_url: str
    request: RequestSettings
    server: Server
    cost: TokenCost | None
    anchor: float


def obey(end: socket.socket, counts: SharedCounts, order: Order) -> None:
    """Be a process that sends requests, until the parent says ``quit`` or is gone; the start of that process."""
    # Ctrl-C reaches all processes of a terminal at once; what is to happen then is for the parent to say.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    clock.share_anchor(order.anchor)
    counts.take_place(order.part[0])
    import_locust()
    from loadtest.load.generator import GeneratorProcess

    GeneratorProcess(end, counts, order).run()
