from __future__ import annotations

import pytest

from loadtest.endpoint.sse import Event, MalformedSSEError, SSEParser

STREAM = 'data: {"text": "größe 日本"}\r\n\r\n: ping\n\nevent: error\ndata: one\ndata: two\n\ndata: [DONE]\r\r'.encode()
EVENTS = [Event("message", '{"text": "größe 日本"}'), Event("error", "one\ntwo"), Event("message", "[DONE]")]


def parse(chunks: list[bytes]) -> list[Event]:
    parser = SSEParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def test_events_of_a_whole_stream() -> None:
    # The lone CR at the end could be half of a CRLF, so the last event waits for the next byte.
    assert parse([STREAM]) == EVENTS[:2]
    assert parse([STREAM, b"\n"]) == EVENTS


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_any_boundaries_give_the_same_events(size: int) -> None:
    stream = STREAM + b"\n"
    assert parse([stream[i : i + size] for i in range(0, len(stream), size)]) == EVENTS


def test_every_single_split_gives_the_same_events() -> None:
    stream = STREAM + b"\n"
    for cut in range(len(stream)):
        assert parse([stream[:cut], stream[cut:]]) == EVENTS, cut


def test_an_event_comes_as_soon_as_its_blank_line_does() -> None:
    parser = SSEParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.pending()
    assert parser.feed(b"\n") == [Event("message", "a")]
    assert not parser.pending()


def test_only_one_leading_space_is_removed_and_a_byte_order_mark_is_skipped() -> None:
    assert parse([b"\xef\xbb\xbfdata:  x\n\ndata:y\n\n"]) == [Event("message", " x"), Event("message", "y")]


@pytest.mark.parametrize("line", [b"<html>\n", b'{"error": "no stream"}\n', b"data: \xff\xfe\n"])
def test_what_is_no_event_stream_is_an_error(line: bytes) -> None:
    with pytest.raises(MalformedSSEError):
        SSEParser().feed(line)
