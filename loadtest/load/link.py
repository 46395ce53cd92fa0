"""Messages between two processes of one machine: in order, over a pair of sockets that nobody else can reach."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import gevent
import msgpack
from gevent.queue import Queue
from gevent.socket import socket as GeventSocket

_READ_SIZE = 1 << 18


class Link:
    """One end.

    Args:
        end: of ``socket.socketpair()``; it belongs to the link from now on.
        listen: called with the kind of each message and what it holds (what msgpack can pack).
        lost: called once when the other end is gone.

    """

    def __init__(self, end: socket.socket, listen: Callable[[str, Any], None], lost: Callable[[], None]) -> None:
        end.setblocking(True)
        self._socket = GeventSocket(end.family, end.type, end.proto, fileno=end.detach())
        self._listen, self._lost = listen, lost
        self._unsent: Queue[bytes | None] = Queue()
        self._writer = gevent.spawn(self._write)
        self._reader = gevent.spawn(self._read)

    def send(self, kind: str, content: Any = None) -> None:
        """Queue a message; never waits."""
        self._unsent.put(msgpack.packb([kind, content]))

    def close(self) -> None:
        """Send what is queued, unless the other end is gone, and hang up."""
        self._reader.kill()
        self._unsent.put(None)
        self._writer.join()
        self._socket.close()

    def _write(self) -> None:
        while (message := self._unsent.get()) is not None:
            try:
                self._socket.sendall(message)
            except OSError:
                # The reader notices, too, and tells.
                return

    def _read(self) -> None:
        unpacker = msgpack.Unpacker(max_buffer_size=0)
        while True:
            try:
                data = self._socket.recv(_READ_SIZE)
            except OSError:
                data = b""
            if not data:
                self._lost()
                return
            unpacker.feed(data)
            for kind, content in unpacker:
                self._listen(kind, content)
