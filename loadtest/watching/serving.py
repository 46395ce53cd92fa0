"""Serves a registry's metrics over HTTP, and knows when they were last fetched."""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections.abc import Callable, Iterator
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from loadtest.errors import LoadTestError

_CHECK_S = 0.05
# A scraper that has connected and asks for nothing must not hold a thread for ever.
_IDLE_S = 30


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = _IDLE_S

    def log_message(self, format: str, *words: Any) -> None:
        """Say nothing: the terminal has the load test's progress."""


class _Sent:
    """The body of an answer; WSGI closes it when all of it was sent."""

    def __init__(self, body: list[bytes], done: Callable[[], None]) -> None:
        self._body, self._done = body, done

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        self._done()


class Serving:
    """Serves ``/metrics`` from a thread.

    Args:
        registry: whose metrics.
        host: address to listen on.
        port: to listen on.

    Raises:
        LoadTestError: the address cannot be bound.

    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self._app: Any = make_wsgi_app(registry)
        self._scraped_at: float | None = None
        try:
            self._server = make_server(host, port, self._answer, _Server, _Handler)
        except (OSError, OverflowError) as error:
            in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            why = "the port is in use" if in_use else str(error)
            raise LoadTestError(f"--exporter-port {port}: cannot listen on {host}: {why}") from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_CHECK_S,), daemon=True)
        self._thread.start()

    def linger(self, limit_s: float, wait: Callable[[float], object]) -> bool:
        """Wait for a scrape of all that is counted by now.

        Args:
            limit_s: for so many seconds at most.
            wait: sleeps so many seconds; true when it was told to stop, which ends the waiting at once.

        Returns:
            whether the scrape came.

        """
        since = time.monotonic()
        while not self._scraped_since(since):
            left = since + limit_s - time.monotonic()
            if left <= 0 or wait(min(left, _CHECK_S)):
                return self._scraped_since(since)
        return True

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _scraped_since(self, moment: float) -> bool:
        return self._scraped_at is not None and self._scraped_at >= moment

    def _answer(self, environ: dict[str, Any], start_response: Any) -> _Sent:
        began = time.monotonic()

        def sent() -> None:
            if environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"] == "/metrics":
                self._scraped_at = max(began, self._scraped_at or began)

        return _Sent(self._app(environ, start_response), sent)


def await_last_scrape(serving: Serving, limit_s: float, wait: Callable[[float], object]) -> None:
    """Wait until the last values were scraped, and say so on stderr; see :meth:`Serving.linger`."""
    if limit_s <= 0:
        return
    print(
        f"exporter: waiting for Prometheus to fetch the last values, {limit_s:g} s at most; Ctrl-C ends it "
        "(--exporter-linger)",
        file=sys.stderr,
        flush=True,
    )
    if not serving.linger(limit_s, wait):
        print("exporter: closed before the last values were fetched", file=sys.stderr, flush=True)
