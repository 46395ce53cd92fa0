from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from loadtest.mock_server import MockConfig, MockServer
from loadtest.unpatched import import_locust

# As in `pareto loadtest`: the process of the tests must not be monkey-patched by importing Locust.
import_locust()

ServerFactory = Callable[..., MockServer]


@pytest.fixture
def mock_server() -> Iterator[ServerFactory]:
    with ExitStack() as stack:

        def start(**config: Any) -> MockServer:
            return stack.enter_context(MockServer(MockConfig(**config)))

        yield start
