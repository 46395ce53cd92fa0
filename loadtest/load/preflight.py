"""What is checked and learnt before the first request: the server and its model."""

from __future__ import annotations

import time

import gevent

from loadtest.endpoint.client import Client, HTTPStatusError
from loadtest.errors import LoadTestError
from loadtest.results.schema import Server
from loadtest.watching.server_metrics import cache_config


def check_server(client: Client, model: str | None, ready_timeout: float) -> Server:
    """Ask the endpoint what it serves.

    Args:
        client: of the endpoint.
        model: the wanted model, or None for the first one served.
        ready_timeout: seconds to wait for a server that does not answer yet.

    Raises:
        LoadTestError: nothing listens, it is no OpenAI-compatible server, or it does not serve ``model``.

    """
    deadline = time.monotonic() + ready_timeout
    while True:
        try:
            return _look(client, model)
        except (OSError, HTTPStatusError) as error:
            # 502 to 504 is a gateway whose server is still starting.
            waiting = not isinstance(error, HTTPStatusError) or error.status in (502, 503, 504)
            if not waiting or time.monotonic() >= deadline:
                raise LoadTestError(_explain(client, error)) from error
            gevent.sleep(min(1.0, max(0.05, deadline - time.monotonic())))


def _explain(client: Client, error: Exception) -> str:
    url = client.base_url
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens at {url}; is the server started? (--ready-timeout S waits for it)"
    if isinstance(error, HTTPStatusError) and error.status in (401, 403):
        return f"{url} refuses access ({error}); give --api-key or set OPENAI_API_KEY"
    if isinstance(error, HTTPStatusError):
        return f"{url} is not an OpenAI-compatible server: GET /v1/models answered {error}"
    return f"cannot reach {url}: {error}{_tls_hint(client)}"


def _tls_hint(client: Client) -> str:
    if client.base_url.startswith("https:"):
        return "; does it speak TLS? without TLS its address starts with http://"
    return "; if it speaks TLS, its address starts with https://"


def _look(client: Client, model: str | None) -> Server:
    try:
        answer = client.call("/v1/models")
        entries = [entry for entry in answer["data"] if isinstance(entry["id"], str)]
    except (ValueError, KeyError, TypeError) as error:
        raise LoadTestError(
            f"{client.base_url} is not an OpenAI-compatible server: GET /v1/models gave no list of models"
            + (f" ({error}{_tls_hint(client)})" if str(error).startswith("not HTTP") else "")
        ) from error
    served = [entry["id"] for entry in entries]
    if not served:
        raise LoadTestError(f"{client.base_url} serves no model")
    if model is not None and model not in served:
        raise LoadTestError(f"{client.base_url} does not serve {model!r}; it serves: {', '.join(served)}")
    is_vllm = any(entry.get("owned_by") == "vllm" for entry in entries)
    return Server(client.base_url, model or served[0], served, _version(client), is_vllm, _cache_config(client))


def _version(client: Client) -> str | None:
    try:
        return str(client.call("/version")["version"])
    except (OSError, HTTPStatusError, ValueError, KeyError):
        return None


def _cache_config(client: Client) -> dict[str, str]:
    try:
        return cache_config(client.get("/metrics", 10.0).decode("utf-8", "replace"))
    except (OSError, HTTPStatusError, ValueError):
        return {}
