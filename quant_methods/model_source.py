"""Where a model comes from: the embedded reference model, a local directory, or the Hugging Face hub.

``resolve_model`` is the one door: what it returns is a directory that holds a complete, unquantized safetensors
checkpoint of a decoder that this project supports, or it raises one clear line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kv_cache.errors import ParetoError
from quant_methods.embedded import MODELS, unpack
from quant_methods.embedded import names as embedded_names

DEFAULT_MODEL = "ref-7m"

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What AutoGPTQ calls the one file that it writes.
AUTOGPTQ = "gptq_model-*.safetensors"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt"]
TOKENIZER_PATTERNS = [pattern for pattern in HUB_PATTERNS if pattern != "*.safetensors"]
Token = str | bool | None
# Bytes per element of safetensors' dtype names, to check that a header's ranges are what its shapes say.
_DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8,
    "U16": 16, "U32": 32, "U64": 64, "F8_E4M3": 8, "F8_E5M2": 8,
}  # fmt: skip


def resolve_model(
    name: str | os.PathLike[str],
    *,
    quantized: bool = False,
    revision: str | None = None,
    download_dir: str | None = None,
    token: Token = None,
) -> Path:
    """Return the directory of a model's checkpoint, validated.

    Args:
        name: an embedded model's name (``ref-7m``), a directory, or a hub name such as ``Qwen/Qwen3-0.6B``. An
            existing directory wins over an embedded name, and both win over the hub.
        quantized: accept a checkpoint that is already quantized (to serve or evaluate it).
        revision: branch, tag or commit of a hub model; others have none.
        download_dir: where to keep a hub model; None: in the hub's own cache.
        token: the hub's, True for the one that was logged in with; None for what the environment says.

    Returns:
        A local directory.

    Raises:
        ParetoError: not found, offline, incomplete, truncated, or not a supported decoder.

    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.is_dir():
        pass
    elif path.exists():
        raise ParetoError(f"{text} is a file; a model is a directory with config.json and *.safetensors")
    elif text in embedded_names():
        path = embedded_model(text)
    elif text.count("/") == 1 and not text.startswith((".", "~", "/")) and not text.endswith("/"):
        path = _download(text, revision, download_dir, token)
    else:
        raise ParetoError(
            f"model {text!r} not found: no such directory, and not one of the embedded models "
            f"({', '.join(embedded_names())}); a hub name has the form owner/name"
        )
    validate_checkpoint(path, quantized=quantized)
    return path


def resolve_shape(name: str | os.PathLike[str]) -> Path:
    """Return the folder of a model of which only the shape matters, because vLLM draws its weights at random.

    Raises:
        ParetoError: it is no folder with a config.json.

    """
    path = Path(name).expanduser()
    if not (path / "config.json").is_file():
        raise ParetoError(f"{os.fspath(name)} has no config.json: --load-format dummy takes a folder with one")
    read_config(path)
    return path


def name_of(model: str | os.PathLike[str]) -> str:
    """Return what to call a model: its hub name, also for its folder in the hub's cache, or else its folder's name."""
    path = Path(model)
    if not path.is_dir():
        return os.fspath(model)
    parts = path.resolve().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return f"{parts[-3].removeprefix('models--').replace('--', '/')}@{parts[-1]}"
    return path.name


def embedded_model(name: str) -> Path:
    """Return the folder of a model that ships with the package.

    Raises:
        ParetoError: its weights are packed and cannot be unpacked there.

    """
    path = MODELS / name
    try:
        unpack()
    except OSError as error:
        if not (path / "model.safetensors").is_file():
            raise ParetoError(
                f"the weights of {name} are packed and cannot be unpacked to {path}: {error.strerror or error}; "
                "install the package where it can be written to"
            ) from error
    return path


def _download(name: str, revision: str | None, download_dir: str | None, token: Token) -> Path:
    import huggingface_hub

    with hub_errors(name, revision):
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, cache_dir=download_dir, allow_patterns=HUB_PATTERNS, token=token
            )
        )


def check_on_hub(name: str, *, revision: str | None = None, token: Token = None) -> None:
    """Raise unless the hub, or its cache on this machine, has a model; at most its config.json is fetched.

    Raises:
        ParetoError: it has not, or not in that revision, or cannot be asked.

    """
    import huggingface_hub
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with hub_errors(name, revision), contextlib.suppress(RemoteEntryNotFoundError):
        huggingface_hub.hf_hub_download(name, "config.json", revision=revision, token=token)


def resolve_tokenizer(
    name: str, *, revision: str | None = None, download_dir: str | None = None, token: Token = None
) -> Path:
    """Return the folder of a tokenizer that is not the model's own; of a hub model no weights are fetched.

    Raises:
        ParetoError: it cannot be found.

    """
    import huggingface_hub

    if Path(name).is_dir():
        return Path(name)
    with hub_errors(name, revision):
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, cache_dir=download_dir, allow_patterns=TOKENIZER_PATTERNS, token=token
            )
        )


@contextlib.contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's library raises while it fetches from a model into one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.errors import RepositoryNotFoundError as NotFound

    try:
        yield
    except HFValidationError as error:
        raise ParetoError(f"model {name!r}: no such directory, and not a valid hub name") from error
    except RevisionNotFoundError as error:
        raise ParetoError(f"model {name!r}: the hub has it, and no revision {revision!r} of it") from error
    except GatedRepoError as error:
        raise ParetoError(
            f"model {name!r}: the hub gives it only to accounts that were granted access: ask for it on the model's "
            "page, then log in with 'hf auth login' or set HF_TOKEN"
        ) from error
    except NotFound as error:
        raise ParetoError(f"model {name!r}: no such directory, and the hub has no such (public) model") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ParetoError(
            f"model {name!r}: no such directory, and the hub cannot be reached ({hub_trouble(error)}); "
            f"give a local directory or the embedded model {DEFAULT_MODEL}"
        ) from error


def hub_trouble(error: BaseException) -> str:
    """Return what went wrong between this machine and the hub, on one short line."""
    # The library's own words for whatever keeps it from the hub are the same; the cause tells a time-out from a 500.
    told = error.__cause__ if error.__cause__ is not None and str(error.__cause__) else error
    return f"{type(told).__name__}: {' '.join(str(told).split())[:160]}"


def read_config(model_dir: Path) -> dict[str, Any]:
    """Return config.json.

    Raises:
        ParetoError: it is missing or no JSON object.

    """
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ParetoError(
            f"{model_dir}: no config.json; a model is a directory with config.json and weights"
        ) from error
    except ValueError as error:
        raise ParetoError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ParetoError(f"{path} is not a JSON object")
    return config


def quantization_settings(checkpoint: Path) -> dict[str, Any] | None:
    """Return how a checkpoint says that it is quantized; None for one that is not.

    It says so in config.json or, written by older tools, in ``quantize_config.json`` (AutoGPTQ) or
    ``quant_config.json`` (AutoAWQ).
    """
    config = read_config(checkpoint)
    if found := config.get("quantization_config") or config.get("compression_config"):
        return dict(found)
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (checkpoint / name).is_file():
            try:
                return {"quant_method": method, **json.loads((checkpoint / name).read_text())}
            except (ValueError, TypeError) as error:
                raise ParetoError(f"{checkpoint / name} is not a JSON object: {error}") from error
    return None


def weight_files(model_dir: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, in order.

    Raises:
        ParetoError: there are none, or the index names a file that is missing.

    """
    if (model_dir / INDEX).is_file():
        try:
            names = sorted(set(json.loads((model_dir / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ParetoError(f"{model_dir / INDEX} is not a valid safetensors index") from error
        missing = [n for n in names if not (model_dir / n).is_file()]
        if missing:
            raise ParetoError(f"{model_dir}: {INDEX} names {len(missing)} missing file(s), first {missing[0]}")
        return [model_dir / n for n in names]
    if (model_dir / SINGLE).is_file():
        return [model_dir / SINGLE]
    named = sorted(model_dir.glob(AUTOGPTQ))
    if len(named) == 1:
        return named
    foreign = sorted(p.name for p in model_dir.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".ckpt"))
    hint = f" (found {foreign[0]}: convert it to safetensors first)" if foreign else ""
    raise ParetoError(f"{model_dir}: no {SINGLE} and no {INDEX}{hint}")


def weight_bytes(model_dir: Path) -> int:
    """Return the bytes of all tensors in a checkpoint's files.

    Raises:
        ParetoError: it has no such files, or one is damaged.

    """
    entries = [entry for path in weight_files(model_dir) for entry in read_header(path).values()]
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries)


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Return the header of a safetensors file: tensor name to dtype, shape and data_offsets.

    Raises:
        ParetoError: it is not a safetensors file, or shorter than its header says.

    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        # safetensors itself refuses headers over 100 MB; a longer one means that this is some other format.
        if not 2 <= length <= 100_000_000:
            raise ParetoError(f"{path} is not a safetensors file")
        if size < 8 + length:
            raise ParetoError(f"{path} is truncated: {size:,} bytes, and its header alone needs {8 + length:,}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ParetoError(f"{path} is not a safetensors file (its header is no JSON)") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "longer than its header says"
        raise ParetoError(f"{path} is {state}: {size:,} bytes on disk, {8 + length + end:,} expected")
    for name, entry in header.items():
        count = 1
        for extent in entry["shape"]:
            count *= extent
        begin, stop = entry["data_offsets"]
        bits = _DTYPE_BITS.get(entry["dtype"])
        if bits is not None and (stop - begin) * 8 != count * bits:
            raise ParetoError(f"{path}: tensor {name} has a size that contradicts its shape; the file is damaged")
    return header


def validate_checkpoint(model_dir: Path, *, quantized: bool = False) -> None:
    """Check a checkpoint without reading its weights.

    Raises:
        ParetoError: config.json is missing or names no supported decoder; weights are missing, truncated, of another
            format, incomplete for the architecture or (unless ``quantized``) already quantized.

    """
    config = read_config(model_dir)
    settings = quantization_settings(model_dir)
    if settings and not quantized:
        scheme = settings.get("quant_method", "unknown")
        if settings.get("sparsity_config") and not settings.get("config_groups"):
            raise ParetoError(
                f"{model_dir} stores sparse weights ({settings['sparsity_config'].get('format')}), which are served "
                "but not compressed; compress the original checkpoint, or a copy that is saved densely"
            )
        raise ParetoError(f"{model_dir} is already quantized ({scheme}); compress the original checkpoint")
    headers = [read_header(path) for path in weight_files(model_dir)]
    present = {name for header in headers for name in header}
    if (model_dir / INDEX).is_file():
        mapped = json.loads((model_dir / INDEX).read_text())["weight_map"]
        absent = sorted(set(mapped) - present)
        if absent:
            raise ParetoError(f"{model_dir}: {INDEX} lists {absent[0]}, which its file does not hold")
    architectures = config.get("architectures") or []
    layers = config.get("num_hidden_layers")
    if not config.get("model_type") or not any(str(a).endswith("ForCausalLM") for a in architectures) or not layers:
        found = ", ".join(map(str, architectures)) or config.get("model_type") or "no architecture"
        raise ParetoError(f"{model_dir}: {found} is not a supported decoder (a transformers ...ForCausalLM model)")
    if not any("layers." in name for name in present):
        raise ParetoError(
            f"{model_dir}: {architectures[0]} is not a supported decoder (its weights are not named ...layers.N...; "
            f"one is {min(present, default='none')})"
        )
    for index in range(int(layers)):
        if not any(f"layers.{index}." in name for name in present):
            raise ParetoError(
                f"{model_dir}: config.json says {layers} decoder layers and the weights of layer {index} are missing"
            )


def fingerprint(model_dir: Path) -> str:
    """Return a SHA-256 over config.json, tokenizer.json and every weight file (hex).

    Two checkpoints with the same fingerprint compress to the same bytes under the same recipe.
    """
    digest = hashlib.sha256()
    files = [model_dir / "config.json", model_dir / "tokenizer.json", *weight_files(model_dir)]
    for path in files:
        if path.is_file():
            digest.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


SAMPLE_BYTES = 1024


def sampled_fingerprint(model_dir: Path) -> str:
    """Return a SHA-256 (hex) over config.json, tokenizer.json, and the head of every tensor.

    For caches only, where reading tens of gigabytes would cost more than what is cached: training changes every tensor
    that it touches from its head on, so models that differ have different heads.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (model_dir / name).is_file():
            digest.update(name.encode() + b"\0" + (model_dir / name).read_bytes())
    for path in weight_files(model_dir):
        header = read_header(path)
        digest.update(json.dumps([path.name, header], sort_keys=True).encode())
        with path.open("rb") as file:
            start = 8 + struct.unpack("<Q", file.read(8))[0]
            for entry in header.values():
                begin, stop = entry["data_offsets"]
                file.seek(start + begin)
                digest.update(file.read(min(SAMPLE_BYTES, stop - begin)))
    return digest.hexdigest()


def digest(data: Any) -> str:
    """Return a SHA-256 (hex) over plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
