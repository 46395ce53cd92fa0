"""HTTP to the endpoint: JSON calls, and one streamed generation measured chunk by chunk.

Built on geventhttpclient, whose sockets are gevent's own: it works with and without gevent's monkey-patching, parses
HTTP in C, and hands over each line of a stream at the moment it arrives.
"""

from __future__ import annotations

import json
import ssl
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
import gevent.ssl
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError

from loadtest import clock
from loadtest.endpoint.answer import Answer
from loadtest.endpoint.apis.api import Api
from loadtest.endpoint.apis.registry import BY_PATH
from loadtest.endpoint.descriptors import shortage
from loadtest.endpoint.sse import Event, MalformedSSEError, SSEParser
from loadtest.errors import LoadTestError
from loadtest.results import records
from loadtest.results.records import Record

# The pool is a cap on open connections; load is shaped by users and arrivals, so the pool must never be what waits.
_STREAMS = 1_000_000
# A GET whose connection is closed without an answer is tried again once for every connection of its pool.
_CALLS = 2
_READ_SIZE = 65536


class HTTPStatusError(Exception):
    """A JSON call was answered with another status than 200."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}: {error_message(body)}")
        self.status = status


def error_message(body: bytes) -> str:
    """Return the message in an OpenAI-style error body, or the start of the body."""
    text = body.decode("utf-8", "replace")
    try:
        data = json.loads(text)
        error = data.get("error", data)
        message = error.get("message", error) if isinstance(error, dict) else error
        return " ".join(str(message).split())[:300]
    except (ValueError, AttributeError):
        return " ".join(text.split())[:300]


def retry_after(text: str) -> float | None:
    """Read a Retry-After header: seconds, or an HTTP date (RFC 9110, 10.2.3); None when it is neither."""
    try:
        return max(0.0, float(int(text)))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - clock.to_unix(clock.now()))
    except (ValueError, TypeError):
        return None


def is_http_url(url: str) -> bool:
    """Return whether ``url`` is the address of an HTTP or HTTPS server."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
    return bool(valid)


def normalize_base_url(url: str) -> str:
    """Return ``url`` without a trailing slash or ``/v1``.

    Raises:
        LoadTestError: it is no http or https URL.

    """
    if not is_http_url(url):
        raise LoadTestError(f"--base-url {url}: expected http://HOST:PORT or https://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def ssl_context(insecure: bool, ca_cert: Path | None) -> Any:
    """Return the context of our connections.

    Raises:
        LoadTestError: ``ca_cert`` is no file of certificates.

    """
    # gevent.ssl.create_default_context makes a context of the standard library's, whose sockets would block every other
    # request of an unpatched process.
    context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    context.load_default_certs()
    if ca_cert:
        try:
            context.load_verify_locations(ca_cert)
        except (OSError, ValueError) as error:
            # OpenSSL's errors are OSErrors too; only those of the file system have a text worth reading.
            why = error.strerror if isinstance(error, FileNotFoundError | PermissionError) else "no certificates in it"
            raise LoadTestError(f"--ca-cert {ca_cert}: {why}; expected a PEM file") from error
    return context


class Client:
    """Connections to one server, shared by all users and kept alive between requests.

    Args:
        base_url: as :func:`normalize_base_url` returns it; a path in it goes in front of every request's path.
        timeout: seconds that one request may take from being sent to its end.
        headers: sent with every request.
        insecure: do not verify the server's certificate.
        ca_cert: file of certificates (PEM) to trust beside those of the system.

    """

    def __init__(
        self,
        base_url: str,
        timeout: float,
        headers: dict[str, str] | None = None,
        insecure: bool = False,
        ca_cert: Path | None = None,
    ) -> None:
        self.base_url = base_url
        self.timeout = timeout
        parts = urlsplit(base_url)
        self._prefix = parts.path
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **(headers or {})}
        self._streams, self._calls = (
            HTTPClient(
                parts.hostname or "",
                port=parts.port,
                ssl=parts.scheme == "https",
                insecure=insecure,
                ssl_context_factory=lambda cafile=None: ssl_context(insecure, ca_cert),
                concurrency=connections,
                connection_timeout=timeout,
                network_timeout=timeout,
                block_size=_READ_SIZE,
            )
            for connections in (_STREAMS, _CALLS)
        )

    def close(self) -> None:
        """Close the idle connections."""
        self._streams.close()
        self._calls.close()

    def close_idle(self) -> None:
        """Close the connections that no request uses now; new ones can be made later."""
        # The library can only close a pool for good.
        idle = self._streams._connection_pool._socket_queue
        while not idle.empty():
            idle.get(block=False).close()

    def get(self, path: str, timeout: float) -> bytes:
        """Return the body of ``GET path``; see :meth:`call` for errors."""
        return self._read("GET", path, b"", timeout)

    def call(self, path: str, body: dict[str, Any] | None = None, timeout: float = 10.0) -> dict[str, Any]:
        """GET (no body) or POST JSON and return the JSON object of the answer.

        Raises:
            HTTPStatusError: the status is not 200.
            OSError, TimeoutError: no connection, or no answer in time.
            ValueError: the answer is no HTTP or no JSON object.

        """
        data = self._read(
            "GET" if body is None else "POST", path, b"" if body is None else json.dumps(body).encode(), timeout
        )
        answer = json.loads(data)
        if not isinstance(answer, dict):
            raise ValueError("the answer is not a JSON object")
        return answer

    def _read(self, method: str, path: str, body: bytes, timeout: float) -> bytes:
        try:
            with gevent.Timeout(timeout):
                response = self._calls.request(method, self._prefix + path, body=body, headers=self._headers)
                data = bytes(response.read())
        except gevent.Timeout:
            raise TimeoutError(f"no answer within {timeout:g} s") from None
        except ssl.SSLError as error:
            # A failed verification is a ValueError too, which here would mean a senseless answer.
            raise ConnectionError(f"TLS: {getattr(error, 'verify_message', None) or error.reason or error}") from error
        except HTTPConnectionClosed:
            raise ConnectionError("the connection was closed without an answer") from None
        except HTTPParseError as error:
            raise ValueError(f"not HTTP: {error}") from error
        if response.status_code != 200:
            raise HTTPStatusError(response.status_code, data)
        return data

    def stream(self, path: str, body: bytes, record: Record, intended: float) -> Answer:
        """Send one request and note in ``record`` when what arrived, or how it failed; returns what was answered.

        Args:
            path: of one of :data:`loadtest.endpoint.apis.registry.APIS`.
            body: the JSON request, which asks for a stream where there is one.
            record: filled in; its times count from ``intended``.
            intended: the intended start by :data:`loadtest.clock.now`, not after the present.

        Only the greenlet being killed raises; then the record is marked cancelled.

        """
        answer = Answer(record)
        try:
            with gevent.Timeout(self.timeout):
                record.start_s = clock.now() - intended
                response = self._streams.request("POST", self._prefix + path, body=body, headers=self._headers)
                record.status = response.status_code
                _read(response, BY_PATH[path], answer, intended)
        except gevent.Timeout:
            record.fail(records.TIMEOUT, f"not finished after {self.timeout:g} s")
        except gevent.GreenletExit:
            record.outcome = records.CANCELLED
            raise
        except MalformedSSEError as error:
            record.fail(records.MALFORMED_SSE, str(error))
        except ConnectionRefusedError as error:
            record.fail(records.CONNECTION_REFUSED, str(error))
        except (HTTPParseError, OSError) as error:
            _classify_broken(error, record)
        except Exception as error:
            # A defect of the generator must not end the run; it is counted apart and never taken for the server's.
            record.fail(records.CLIENT_ERROR, f"{type(error).__name__}: {error}")
        finally:
            record.end_s = clock.now() - intended if answer.ended_s is None else answer.ended_s
        return answer


def _classify_broken(error: Exception, record: Record) -> None:
    if (ours := shortage(error)) is not None:
        record.fail(records.CLIENT_ERROR, ours)
    elif isinstance(error, TimeoutError):
        record.fail(records.TIMEOUT, str(error))
    elif record.status is not None:
        record.fail(records.STREAM_CUT, f"the stream ended in the middle: {error}")
    elif isinstance(error, ssl.SSLError):
        record.fail(records.CONNECTION_ERROR, f"TLS: {error}")
    else:
        record.fail(records.CONNECTION_ERROR, str(error) or type(error).__name__)


def _read(response: Any, api: Api, answer: Answer, intended: float) -> None:
    """Read a whole response into its answer."""
    record, status = answer.record, response.status_code
    if status != 200:
        kind = (
            records.HTTP_429
            if status == 429
            else {4: records.HTTP_4XX, 5: records.HTTP_5XX}.get(status // 100, records.HTTP_OTHER)
        )
        record.retry_after_s = retry_after(str(response.get("retry-after", "")))
        record.fail(kind, f"HTTP {status}: {error_message(bytes(response.read()))}")
        return
    if not api.generates:
        _take(Event("message", bytes(response.read()).decode("utf-8", "replace")), api, answer, clock.now() - intended)
        answer.conclude(False, False)
        return
    content_type = str(response.get("content-type", ""))
    if not content_type.startswith("text/event-stream"):
        body = bytes(response.read())
        raise MalformedSSEError(f"content type {content_type!r} instead of text/event-stream: {body[:120]!r}")
    parser = SSEParser()
    while line := response.readline(b"\n"):
        arrived = clock.now() - intended
        for event in parser.feed(line):
            _take(event, api, answer, arrived)
    answer.conclude(parser.pending(), True)


def _take(event: Event, api: Api, answer: Answer, arrived: float) -> None:
    if event.data == "[DONE]":
        answer.end(arrived)
        return
    try:
        data = json.loads(event.data)
    except ValueError:
        raise MalformedSSEError(f"data is not JSON: {event.data[:120]!r}") from None
    if not isinstance(data, dict):
        raise MalformedSSEError(f"data is not a JSON object: {event.data[:120]!r}")
    if event.type == "error" or data.get("error") is not None:
        answer.fail(error_message(event.data.encode()))
        return
    api.take(event.type, data, answer, arrived)
