"""The mock server itself: HTTP/1.1 on asyncio, answers with planted delays and faults.

It serves ``/v1/completions`` and ``/v1/chat/completions`` (streaming or not), ``/v1/models``, ``/tokenize``,
``/version``, ``/health`` and ``/metrics``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

from loadtest.mock_server.config import LONG_WORD, MockConfig, count_tokens
from loadtest.mock_server.token_log import Served, TokenLog

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed"}
_WORDS = ("lorem", "ipsum", "dolor", "größe", "日本", "amet", "sit", "elit")


class _Reply(Exception):
    """Answer with this status and JSON body."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(status)
        self.status, self.body = status, body


def _error(status: int, message: str) -> _Reply:
    return _Reply(status, {"error": {"message": message, "type": "mock_error", "code": status}})


class MockServer:
    """The server, on an event loop in a thread of its own.

    A context manager: listens on loopback from ``with`` on; ``url`` is its address, ``requests`` every JSON body
    received for generation, ``accepted`` the number of connections so far, and ``log`` says when each token left.

    Args:
        config: what it does.
        host: address to listen on.
        port: 0 takes a free one.
        tls: speaks TLS with this.
        log: takes what is served; by default one that keeps it in memory.

    """

    def __init__(
        self,
        config: MockConfig | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        log: TokenLog | None = None,
    ) -> None:
        self.config = config or MockConfig()
        self.requests: list[dict[str, Any]] = []
        self.accepted = 0
        self.log = log or TokenLog()
        self._host, self._port, self._tls = host, port, tls
        self._streamed = 0
        self._running = self._waiting = 0
        self._prompt_tokens = self._output_tokens = 0
        self._first_at: float | None = None
        self._loop = asyncio.new_event_loop()
        self._slots: asyncio.Semaphore | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mock-server", daemon=True)

    @property
    def url(self) -> str:
        """``http://host:port``, or https with TLS."""
        return f"http{'s' if self._tls else ''}://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen; ``port`` 0 takes a free one."""
        if self.config.capacity:
            self._slots = asyncio.Semaphore(self.config.capacity)
        self._server = await asyncio.start_server(self._serve, self._host, self._port, limit=1 << 24, ssl=self._tls)
        self._port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening and drop every connection."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self.log.close()

    def __enter__(self) -> MockServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.start(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.accepted += 1
        try:
            while await self._serve_one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            with contextlib.suppress(OSError, RuntimeError):
                writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; whether the connection may serve another."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ", 2)
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        try:
            routes = {"/v1/completions": False, "/v1/chat/completions": True}
            if path in routes:
                if method != "POST":
                    raise _error(405, "use POST")
                return await self._generate(self._json(body), routes[path], writer)
            self._send(writer, 200, *self._page(method, path, body))
        except _Reply as reply:
            self._send(writer, reply.status, json.dumps(reply.body).encode(), "application/json")
        await writer.drain()
        return True

    @staticmethod
    def _json(body: bytes) -> dict[str, Any]:
        try:
            data = json.loads(body)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise _error(400, "the body is not a JSON object")
        return data

    @staticmethod
    def _send(writer: asyncio.StreamWriter, status: int, body: bytes, content_type: str) -> None:
        head = f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}\r\nContent-Type: {content_type}\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def _page(self, method: str, path: str, body: bytes) -> tuple[bytes, str]:
        config = self.config
        if path == "/metrics":
            return self._metrics().encode(), "text/plain; version=0.0.4"
        if path == "/v1/models":
            data = [{"id": name, "object": "model", "owned_by": config.owner} for name in config.models]
            answer: dict[str, Any] = {"object": "list", "data": data}
        elif path == "/version":
            answer = {"version": "0.0-mock"}
        elif path == "/health":
            answer = {}
        elif path == "/tokenize" and method == "POST" and config.tokenize:
            answer = self._tokenize(self._json(body))
        else:
            raise _error(404, f"no such path: {path}")
        return json.dumps(answer).encode(), "application/json"

    def _tokenize(self, data: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {"count": self._prompt_cost(data), "max_model_len": 1 << 20}
        if data.get("return_token_strs"):
            pieces = [[w[:LONG_WORD], w[LONG_WORD:]] for w in str(data.get("prompt", "")).split()]
            answer["token_strs"] = ["<s>", *(p for a, b in pieces for p in ([f"Ġ{a}", b] if b else [f"Ġ{a}"]))]
        return answer

    @staticmethod
    def _prompt_cost(data: dict[str, Any]) -> int:
        if "messages" in data:
            return 5 + sum(count_tokens(str(message.get("content", ""))) for message in data["messages"])
        prompt = data.get("prompt", "")
        return len(prompt) if isinstance(prompt, list) else 1 + count_tokens(str(prompt))

    def _metrics(self) -> str:
        label = f'{{engine="0",model_name="{self.config.models[0]}"}}'
        usage = min(1.0, self._running / (self.config.capacity or 100))
        values = {
            "vllm:num_requests_running": self._running,
            "vllm:num_requests_waiting": self._waiting,
            "vllm:kv_cache_usage_perc": usage,
            "vllm:prompt_tokens_total": self._prompt_tokens,
            "vllm:generation_tokens_total": self._output_tokens,
        }
        lines = [f"{name}{label} {float(value)}" for name, value in values.items()]
        lines.append('vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="1000"} 1.0')
        return "\n".join(["# HELP vllm:num_requests_running Requests running", *lines, "process_open_fds 9.0", ""])

    async def _generate(self, data: dict[str, Any], chat: bool, writer: asyncio.StreamWriter) -> bool:
        if data.get("model") not in self.config.models:
            raise _error(404, f"The model `{data.get('model')}` does not exist.")
        if ("messages" if chat else "prompt") not in data:
            raise _error(400, "no prompt")
        self.requests.append(data)
        served = self.log.begin(len(self.requests) - 1)
        fault = None
        if data.get("stream"):
            if self._first_at is None:
                self._first_at = self._loop_time()
            self._streamed += 1
            fault = next((f for f, every in self.config.faults.items() if self._streamed % every == 0), None)
        try:
            if fault is not None and fault.startswith("http_"):
                raise _error(int(fault.removeprefix("http_")), f"planted {fault}")
            if fault == "reset":
                return False
            if fault == "hang":
                await asyncio.sleep(3600)
            async with self._slot():
                self.log.start(served)
                return await self._answer(data, chat, writer, fault, served)
        finally:
            self.log.end(served)

    @staticmethod
    def _loop_time() -> float:
        return asyncio.get_running_loop().time()

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        self._waiting += 1
        try:
            if self._slots is not None:
                await self._slots.acquire()
        finally:
            self._waiting -= 1
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if self._slots is not None:
                self._slots.release()

    async def _sleep_until(self, moment: float) -> None:
        """Sleep until ``moment`` of the loop's clock, and through the planted stall if it covers that."""
        await asyncio.sleep(max(0.0, moment - self._loop_time()))
        if self.config.stall_at_s >= 0 and self._first_at is not None:
            begin = self._first_at + self.config.stall_at_s
            if begin <= self._loop_time() < begin + self.config.stall_s:
                await asyncio.sleep(begin + self.config.stall_s - self._loop_time())

    async def _answer(
        self, data: dict[str, Any], chat: bool, writer: asyncio.StreamWriter, fault: str | None, served: Served
    ) -> bool:
        config = self.config
        tokens = 1 if fault == "empty" else int(data.get("max_tokens") or 16)
        prompt_tokens = self._prompt_cost(data)
        self._prompt_tokens += prompt_tokens
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
        }
        first = self._loop_time() + config.ttft_ms / 1000
        if not data.get("stream"):
            await self._sleep_until(first + (tokens - 1) * config.itl_ms / 1000)
            text = " ".join(_WORDS[i % len(_WORDS)] for i in range(tokens))
            answer = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            whole = self._head(chat) | {"choices": [{"index": 0, "finish_reason": "length", **answer}]}
            whole["usage"] = usage if config.usage else None
            self.log.token(served, tokens)
            self._send(writer, 200, json.dumps(whole).encode(), "application/json")
            await writer.drain()
            return True
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        head = self._head(chat, "chunk")
        if chat:
            self._event(writer, head | {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await writer.drain()
        for sent in range(0, tokens, config.tokens_per_chunk):
            count = min(config.tokens_per_chunk, tokens - sent)
            await self._sleep_until(first + (sent + count - 1) * config.itl_ms / 1000)
            empty = fault == "empty"
            if fault and not empty and sent >= tokens // 2 and not self._strike(writer, fault):
                return False
            text = "" if empty else "".join(f" {_WORDS[(sent + i) % len(_WORDS)]}" for i in range(count))
            self._output_tokens += count
            reason = "stop" if empty else "length" if sent + count == tokens else None
            choice = {"index": 0, "finish_reason": reason} | ({"delta": {"content": text}} if chat else {"text": text})
            if not empty:
                self.log.token(served, count)
            self._event(writer, head | {"choices": [choice]})
            await writer.drain()
        if config.usage and (data.get("stream_options") or {}).get("include_usage"):
            self._event(writer, head | {"choices": [], "usage": usage})
        self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    def _head(self, chat: bool, part: str = "") -> dict[str, Any]:
        """Return the fields in front of every answer, or of each ``part`` of one; some clients go by ``object``."""
        kind = ("chat.completion" if chat else "text_completion") + (f".{part}" if chat and part else "")
        return {"id": "mock", "object": kind, "created": int(time.time()), "model": self.config.models[0]}

    def _strike(self, writer: asyncio.StreamWriter, fault: str) -> bool:
        """Commit a fault in the middle of a stream; whether the connection survives it."""
        if fault == "malformed":
            self._chunk(writer, b"data: {not json\n\n")
        elif fault == "error_event":
            self._event(writer, {"error": {"message": "planted error event", "type": "mock_error", "code": 500}})
        return False

    def _event(self, writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
        self._chunk(writer, b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n")

    @staticmethod
    def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))
