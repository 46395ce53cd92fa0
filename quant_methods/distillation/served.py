"""A teacher that a server runs: asked for its most likely tokens by vLLM's ``prompt_logprobs``, over HTTP.

vLLM adds the token that follows where it is not among the most likely; that one is left out, so that every position has
k. The server says probabilities at temperature 1, and nothing of the rest but its sum: other temperatures are refused.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.distillation.teacher import TopK
from quant_methods.training.losses import FLOOR

SECONDS = 600.0
"""That an answer may take."""


class Served:
    """A vLLM server; makes the rows of a cache (``cached.py``), so that each sequence is asked for once.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``, with or without ``/v1``.
        key: sent as a bearer token; None: none is.

    Raises:
        ParetoError: nothing answers there, or it serves no model.

    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url, self.key = url.rstrip("/").removesuffix("/v1"), key
        models = self._ask("/v1/models", None).get("data") or []
        if not models:
            raise ParetoError(f"{self.url} serves no model")
        self.name = str(models[0]["id"])
        self.identity = f"served: {self.name}"

    @property
    def description(self) -> dict[str, object]:
        """What a model card says of it."""
        return {"teacher": self.name, "kind": "served"}

    def top(self, tokens: Tensor, k: int, temperatures: tuple[float, ...]) -> TopK:
        """Ask about sequences; see ``cached.Producer``.

        Raises:
            ParetoError: another temperature than 1 is wanted, or the server refuses.

        """
        if set(temperatures) != {1.0}:
            raise ParetoError("a server says probabilities at temperature 1; give --temperature 1")
        ids, known = [], []
        for row in tokens.tolist():
            # One token has to be asked for, and is not used.
            body = {"model": self.name, "prompt": row, "max_tokens": 1, "temperature": 0, "prompt_logprobs": k}
            answer = self._ask("/v1/completions", body)
            found = answer["choices"][0].get("prompt_logprobs")
            if found is None:
                raise ParetoError(f"{self.url} gives no prompt_logprobs: a teacher has to be served by vLLM")
            for position in found[1:]:
                best = sorted((entry["rank"], int(token), entry["logprob"]) for token, entry in position.items())[:k]
                if len(best) < k:
                    raise ParetoError(f"{self.url} gave {len(best)} tokens where --top-k {k} were asked for")
                ids.append([token for _, token, _ in best])
                known.append([value for _, _, value in best])
        probabilities = torch.tensor(known, dtype=torch.float64)
        rest = (1 - probabilities.exp().sum(-1)).clamp_min(0).log().clamp_min(FLOOR)
        return TopK(torch.tensor(ids), probabilities.float(), {1.0: rest.float()})

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:300]
            hint = "; start the server with --max-logprobs of at least --top-k" if "logprobs" in said else ""
            raise ParetoError(f"{self.url}{path}: HTTP {error.code}: {said}{hint}") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ParetoError(f"{self.url}{path}: {reason}; is a vLLM server running there?") from error
