"""What a served endpoint is asked beside requests, and the tokenizer of a shape that has none."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

from bench.files import write_json, write_text
from bench.server import HOST, Server
from bench.speed.served_schema import Memory
from kv_cache.errors import ParetoError


def ask(server: Server, method: str) -> list[dict[str, Any]]:
    """Return what a method of the workers' returns, of each rank.

    Raises:
        ParetoError: the server has no door to its workers, or the method failed.

    """
    connection = http.client.HTTPConnection(HOST, int(server.base_url.rpartition(":")[2]), timeout=60)
    try:
        body = json.dumps({"method": method})
        connection.request("POST", "/collective_rpc", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise ParetoError(f"the server does not say what memory it takes: /collective_rpc answered {answer.status}")
        return list(json.loads(text)["results"])
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise ParetoError(f"the server does not say what memory it takes: {error} (log: {server.log})") from error
    finally:
        connection.close()


def memory_of(ranks: list[dict[str, Any]], on_disk: int | None) -> Memory:
    """Return the memory of all ranks together.

    Args:
        ranks: what :mod:`bench.speed.worker_memory` says of each.
        on_disk: bytes of the checkpoint's tensors, which are the weights where vLLM does not say.

    """

    def total(name: str) -> int | None:
        values = [rank[name] for rank in ranks]
        return None if None in values else sum(values)

    weights, cache = total("weights"), total("kv_cache") or 0
    rest, peak = total("allocated"), total("peak_allocated")
    if rest is None or peak is None:
        return Memory(on_disk if weights is None else weights, cache, None, None, total("peak_rss"), None)
    other = None if weights is None else rest - weights - cache
    return Memory(weights, cache, peak - rest, other, peak, total("profiled_activations"))


def word_tokenizer(folder: Path, vocabulary: int) -> Path:
    """Write a tokenizer whose every id is a word of its own, for a shape that has none, and return its folder.

    An endpoint sends text, so that what has no tokenizer cannot be served; random weights may answer with any id.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocabulary)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    write_text(folder / "tokenizer.json", made.to_str())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "model_max_length": 1 << 30}
    write_json(folder / "tokenizer_config.json", config)
    return folder
