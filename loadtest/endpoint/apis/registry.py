"""The APIs that ``--endpoint`` knows."""

from __future__ import annotations

from loadtest.endpoint.apis.api import Api
from loadtest.endpoint.apis.chat import Chat
from loadtest.endpoint.apis.completions import Completions
from loadtest.endpoint.apis.embeddings import Embeddings
from loadtest.endpoint.apis.responses import Responses

APIS: dict[str, Api] = {api.name: api for api in (Completions(), Chat(), Responses(), Embeddings())}
PATHS = {name: api.path for name, api in APIS.items()}
BY_PATH = {api.path: api for api in APIS.values()}
