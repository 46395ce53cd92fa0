"""What tests of ``pareto serve`` share."""

import pytest

from vllm_ext import serve


@pytest.fixture
def started(monkeypatch):
    """The commands that ``pareto serve`` would become, without a look at ports and dtypes."""
    commands = []
    monkeypatch.setenv("VLLM_PARETO_LOW_BIT_KERNEL", "0")  # What a server sets for itself is no other test's.
    monkeypatch.setattr(serve, "check_port", lambda host, port: None)
    monkeypatch.setattr(serve, "check_plugin", lambda dtype: None)
    monkeypatch.setattr(serve.os, "execv", lambda program, command: commands.append(command))
    return commands
