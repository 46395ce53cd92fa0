"""Images of local files in chat messages, put into the request: a server cannot read the client's disk."""

from __future__ import annotations

import base64
import mimetypes
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loadtest.errors import LoadTestError


def inline_images(messages: list[dict[str, Any]], folder: Path, where: str) -> list[dict[str, Any]]:
    """Return the messages with every ``image_url`` that is a path replaced by the file's contents as a data URL.

    URLs stay as they are, ``file:`` ones included: the server may have been told to read those.

    Args:
        messages: chat messages.
        folder: where relative paths begin: that of the file of prompts.
        where: the row, for errors.

    Raises:
        LoadTestError: a file cannot be read, or is no image by its name.

    """
    return [_message(message, folder, where) for message in messages]


def _message(message: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    return {**message, "content": [_part(part, folder, where) for part in parts]}


def _part(part: Any, folder: Path, where: str) -> Any:
    if not isinstance(part, dict):
        return part
    image = part.get("image_url")
    # Chat has {"image_url": {"url": ...}}, responses {"image_url": ...}.
    if isinstance(image, dict) and isinstance(image.get("url"), str) and not urlsplit(image["url"]).scheme:
        return {**part, "image_url": {**image, "url": _data_url(folder / image["url"], where)}}
    if isinstance(image, str) and not urlsplit(image).scheme:
        return {**part, "image_url": _data_url(folder / image, where)}
    return part


def _data_url(path: Path, where: str) -> str:
    kind = mimetypes.guess_type(path.name)[0] or ""
    if not kind.startswith("image/"):
        raise LoadTestError(f"{where}: image_url {path}: not the name of an image")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LoadTestError(f"{where}: image_url {path}: {error.strerror or error}") from error
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
