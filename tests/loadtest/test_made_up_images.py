"""Made-up images: the messages that hold them, their size, and that no two requests share one."""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loadtest import command
from loadtest.endpoint.apis.registry import APIS
from loadtest.errors import LoadTestError
from loadtest.load.runner import run_load_test
from loadtest.mock_server import MockServer
from loadtest.settings import Settings, load_settings
from loadtest.workloads.distributions import parse_distribution
from loadtest.workloads.made_up_images import Images, PicturedPrompts, parse_images
from loadtest.workloads.prefixes import PrefixPool
from loadtest.workloads.prompts import WORDS, TokenCost, WordPrompts
from loadtest.workloads.workload import Workload


def workload(endpoint: str, images: Images, seed: int = 7) -> Workload:
    words = WordPrompts(parse_distribution("20", "-"), PrefixPool((0,)), TokenCost(1.0, 1.0, WORDS, "known"), seed=seed)
    source = PicturedPrompts(words, images, APIS[endpoint])
    lengths = parse_distribution("5", "-")
    return Workload(APIS[endpoint], "m", source, lengths, False, None, {}, seed)


def opened(url: str) -> Image.Image:
    kind, _, data = url.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_chat_message_has_images_and_text() -> None:
    request = workload("chat", Images(2, 96, 64)).request(0, 0)
    (message,) = json.loads(request.body)["messages"]
    first, second, text = message["content"]
    for part in (first, second):
        assert part["type"] == "image_url"
        assert opened(part["image_url"]["url"]).size == (96, 64)
    assert first != second
    assert text["type"] == "text"
    assert len(text["text"].split()) == 19
    # Only the server knows what an image costs.
    assert request.prompt_tokens is None


def test_responses_have_another_form() -> None:
    (message,) = json.loads(workload("responses", Images(1, 8, 8)).request(0, 0).body)["input"]
    image, text = message["content"]
    assert (image["type"], text["type"]) == ("input_image", "input_text")
    assert opened(image["image_url"]).size == (8, 8)


def test_a_request_is_determined_by_its_seed_and_shares_no_image_with_another() -> None:
    images = Images(1, 32, 32)
    bodies = [workload("chat", images).request(0, i).body for i in range(20)]
    assert len(set(bodies)) == 20
    assert workload("chat", images).request(0, 3).body == bodies[3]
    assert workload("chat", images, seed=8).request(0, 3).body != bodies[3]


def settings(out: Path, url: str, words: str) -> Settings:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    common = f"--base-url {url} --out {out} --no-progress --no-server-metrics"
    return load_settings(parser.parse_args([*common.split(), *words.split()]))


def test_conversations_keep_the_images_of_their_first_turn(
    mock_server: Callable[..., MockServer], tmp_path: Path
) -> None:
    server = mock_server()
    words = "--endpoint chat --images 1:40x30 --turns 2 --requests 2 --prompt-tokens 16 --output-tokens 3"
    summary = run_load_test(settings(tmp_path, server.url, words))
    assert (summary.stages[0].requests.ok, summary.stages[0].requests.failed) == (4, 0)
    sent: list[list[dict[str, Any]]] = [body["messages"] for body in server.requests]
    first, second = sent[:2]
    assert opened(first[0]["content"][0]["image_url"]["url"]).size == (40, 30)
    assert second[0] == first[0]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert isinstance(second[2]["content"], str)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--images 1:512x512", "--images needs --endpoint chat or responses"),
        ("--images 1:512x512 --endpoint embeddings", "--images needs --endpoint"),
        ("--images 512x512 --endpoint chat", "expected COUNT:WIDTHxHEIGHT"),
        ("--images 0:8x8 --endpoint chat", "1 or more images"),
        ("--images 1:0x8 --endpoint chat", "1 to 8192 pixels"),
        ("--images 1:8x9000 --endpoint chat", "1 to 8192 pixels"),
        ("--images 1:8x8 --endpoint chat --prompts x.txt", "exclude each other"),
        ("--images 1:8x8 --endpoint chat --trace x.jsonl", "exclude each other"),
    ],
)
def test_what_has_no_images_is_refused(tmp_path: Path, words: str, why: str) -> None:
    with pytest.raises(LoadTestError, match=why) as error:
        settings(tmp_path, "http://127.0.0.1:9", words)
    assert "\n" not in str(error.value)


def test_images_are_parsed() -> None:
    assert parse_images("3:640x480") == Images(3, 640, 480)
