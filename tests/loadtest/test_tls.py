from __future__ import annotations

import json
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest

from loadtest import clock
from loadtest.endpoint.client import Client, ssl_context
from loadtest.errors import LoadTestError
from loadtest.load.preflight import check_server
from loadtest.mock_server import MockConfig, MockServer
from loadtest.results.records import Record

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MockServer]:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {key} -out {certificate}"
    subprocess.run(
        [*words.split(), "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True, timeout=60
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with MockServer(MockConfig(ttft_ms=400), tls=context) as running:
        yield running


def test_an_unknown_certificate_is_refused_and_named(server: MockServer) -> None:
    with pytest.raises(LoadTestError, match=r"cannot reach https://.*TLS: self-signed certificate"):
        check_server(Client(server.url, 10), None, 0)


def test_a_certificate_of_ones_own_is_trusted_where_it_is_named(server: MockServer, tmp_path: Path) -> None:
    client = Client(server.url, 10, ca_cert=tmp_path / "cert.pem")
    assert check_server(client, None, 0).model == "mock-model"
    record = Record(0, 0)
    body = json.dumps({"model": "mock-model", "prompt": "a", "max_tokens": 2, "stream": True}).encode()
    client.stream("/v1/completions", body, record, clock.now())
    assert record.outcome == "ok"
    (tmp_path / "empty.pem").write_text("no certificate")
    with pytest.raises(LoadTestError, match=r"--ca-cert .*empty.pem: no certificates in it; expected a PEM file"):
        ssl_context(False, tmp_path / "empty.pem")


def test_requests_over_tls_run_side_by_side(server: MockServer) -> None:
    client = Client(server.url, 10, insecure=True)
    assert check_server(client, None, 0).model == "mock-model"
    body = json.dumps({"model": "mock-model", "prompt": "a", "max_tokens": 2, "stream": True}).encode()
    items = [Record(0, index) for index in range(6)]
    began = clock.now()
    gevent.joinall([gevent.spawn(client.stream, "/v1/completions", body, record, began) for record in items])
    assert [record.outcome for record in items] == ["ok"] * 6
    assert all((record.first_token_s or 0) >= 0.398 for record in items)
    # One after the other would take 2.4 s.
    assert max(record.end_s for record in items) < 1.6
