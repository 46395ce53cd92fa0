"""A mock OpenAI-compatible server with known delays and planted faults, so that a load test can be tested itself."""

from loadtest.mock_server.config import FAULTS, MockConfig, count_tokens
from loadtest.mock_server.server import MockServer
from loadtest.mock_server.token_log import Served, TokenLog, read_token_log

__all__ = ["FAULTS", "MockConfig", "MockServer", "Served", "TokenLog", "count_tokens", "read_token_log"]
