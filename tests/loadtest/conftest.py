from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

# As in `pareto loadtest`: the process of the tests must not be monkey-patched by importing Locust.
os.environ.setdefault("LOCUST_SKIP_MONKEY_PATCH", "1")

from loadtest.mock_server import MockConfig, MockServer

ServerFactory = Callable[..., MockServer]


@pytest.fixture
def mock_server() -> Iterator[ServerFactory]:
    with ExitStack() as stack:

        def start(**config: Any) -> MockServer:
            return stack.enter_context(MockServer(MockConfig(**config)))

        yield start
