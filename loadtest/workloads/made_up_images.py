"""Made-up images in front of made-up prompts, for models that see."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, replace

import numpy as np

from loadtest.errors import LoadTestError
from loadtest.workloads.prompt import FIRST, BodyFormat, Phase, Prompt, PromptSource

MOST_PIXELS = 8192
_GRAIN = 16
_QUALITY = 85


@dataclass(frozen=True)
class Images:
    """How many images a prompt has, and their size in pixels."""

    count: int
    width: int
    height: int


def parse_images(text: str) -> Images:
    """Read ``COUNT:WIDTHxHEIGHT``.

    Raises:
        LoadTestError: it is not of that form, or a number is out of range.

    """
    match = re.fullmatch(r"(\d+):(\d+)x(\d+)", text)
    if match is None:
        raise LoadTestError(f"--images {text}: expected COUNT:WIDTHxHEIGHT, as 1:512x512")
    count, width, height = (int(part) for part in match.groups())
    if count < 1 or not 1 <= width <= MOST_PIXELS or not 1 <= height <= MOST_PIXELS:
        raise LoadTestError(f"--images {text}: expected 1 or more images of 1 to {MOST_PIXELS} pixels a side")
    return Images(count, width, height)


def image_url(rng: np.random.Generator, width: int, height: int) -> str:
    """Return a JPEG as a data URL: patches of random colours, which no other image has and no cache knows.

    It compresses about as well as a photograph does, so that a request is as long as a real one.
    """
    # Here, as the flags need this file, and only these prompts need the library.
    from PIL import Image

    coarse = rng.integers(0, 256, size=(-(-height // _GRAIN) + 1, -(-width // _GRAIN) + 1, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


class PicturedPrompts:
    """The prompts of another source with images of their own; in a conversation the first turn has them.

    Args:
        source: makes the text.
        images: how many, and how large.
        endpoint: knows the form of a message that holds both.

    """

    def __init__(self, source: PromptSource, images: Images, endpoint: BodyFormat) -> None:
        self._source, self._images, self._endpoint = source, images, endpoint

    def prompt(self, rng: np.random.Generator, index: int, phase: Phase = FIRST) -> Prompt:
        """Return a prompt whose length in tokens is unknown, since only the server knows what an image costs."""
        prompt, images = self._source.prompt(rng, index, phase), self._images
        assert isinstance(prompt.content, str)
        urls = [image_url(rng, images.width, images.height) for _ in range(images.count)]
        message = {"role": "user", "content": self._endpoint.parts(prompt.content, urls)}
        return replace(prompt, content=[message], tokens=None)
