"""Requests of an open loop are made before they are due."""

from __future__ import annotations

from itertools import count

from loadtest import clock
from loadtest.load.ahead import MOST, SECONDS, Ahead
from loadtest.load.stage import Ticket


def test_requests_of_one_moment_do_not_wait_for_each_other_to_be_made() -> None:
    offsets = [0.0] * 8 + [1.0] * 8
    made: list[int] = []

    def make(ticket: Ticket) -> int:
        made.append(ticket.index)
        return ticket.index

    ahead = Ahead(((offset, Ticket(i, False)) for i, offset in enumerate(offsets)), make)
    ahead.fill()
    yielded = []
    for number, (offset, ticket, request) in enumerate(ahead.due(clock.now())):
        yielded.append(len(made))
        assert request == ticket.index == number
        assert offset == offsets[number]
    # All sixteen were there when the first was sent.
    assert yielded == [len(offsets)] * len(offsets)


def test_what_is_due_later_is_made_later() -> None:
    made = []
    ahead = Ahead(((float(i), Ticket(i, False)) for i in range(10)), lambda ticket: made.append(ticket.index))
    ahead.fill()
    assert made == [i for i in range(10) if i <= SECONDS]


def test_so_many_are_made_ahead_and_no_more() -> None:
    made = []
    ahead = Ahead(((0.0, Ticket(i, False)) for i in count()), lambda ticket: made.append(ticket.index))
    ahead.fill()
    assert len(made) == MOST


def test_the_first_is_made_however_late_it_is_due() -> None:
    ahead = Ahead(iter([(SECONDS + 1, Ticket(0, False))]), lambda ticket: ticket.index)
    ahead.fill()
    assert len(ahead._made) == 1
