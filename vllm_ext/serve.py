"""``pareto serve``: vLLM's own server with this project's defaults and a check that the plugin is active."""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
from pathlib import Path

from kv_cache.errors import ParetoError
from kv_cache.formats import FORMATS, MIXED, KVFormat
from vllm_ext.names import LOW_BIT_KERNEL_VARIABLE

HELP = "serve a model with vLLM over an OpenAI-compatible endpoint"
USER_ERRORS = (ParetoError,)
PASS_THROUGH = True


def _line(fmt: KVFormat) -> str:
    same = fmt.key_bits == fmt.value_bits
    bits = f"{fmt.key_bits} bits" if same else f"{fmt.key_bits} bits for keys, {fmt.value_bits} for values"
    return f"  {fmt.name:16}{bits}"


_DTYPES = "\n".join(_line(fmt) for fmt in FORMATS.values())
DESCRIPTION = f"""\
Serve a model: 'vllm serve' with loopback as the default address, a check that this plugin is active, and names of
embedded models resolved. Every flag of 'vllm serve' passes through.

examples:
  pareto serve ref-7m --kv-cache-dtype int4_per_head
  pareto serve ./qwen-w4 --kv-cache-dtype int8_per_head --port 8001 --max-model-len 8192

KV-cache dtypes of this plugin (vLLM's own stay available):
{_DTYPES}
  {MIXED:16}bits of its own for each layer: pareto compress MODEL --recipe kv-scales --kv-budget 3.5bits
Each token and head keeps four bytes beside its codes (0.25 bits an element at head size 64, 0.125 at 128).

4-bit checkpoints of any origin (GPTQ, AWQ, compressed-tensors) are multiplied by this project's kernel on CUDA where at
most 32 sequences run at once (--max-num-seqs 32); VLLM_PARETO_LOW_BIT_KERNEL=0 leaves them to vLLM's.

A checkpoint without calibrated scales is calibrated when it is first served; 'pareto compress --recipe kv-scales'
does it ahead of time.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that this command reads itself; the rest is vLLM's."""
    parser.add_argument("model", nargs="?", default="ref-7m", help="directory, hub name, or ref-7m (the default)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument("--kv-cache-dtype", default="auto", help="see above (default: %(default)s)")
    parser.add_argument(
        "--load-format", default="auto", help="vLLM's; dummy serves random weights of a config.json's shape"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model from the hub")
    parser.add_argument("--hf-token", nargs="?", const=True, help="the hub's token (default: the one logged in with)")
    parser.add_argument(
        "--hf-config-path",
        "--hf_config_path",
        metavar="DIR",
        help="vLLM's: where config.json is, if not with MODEL",
    )
    parser.add_argument("--served-model-name", nargs="+", help="names of the model in requests (default: as given)")


def ordered(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return the words with MODEL first, where it need not be told from the value of a flag.

    Whether a flag has a value only vLLM knows where it is one of vLLM's, and asking takes as long as importing vLLM: it
    is asked only when a flag of its own, followed by a word, comes before MODEL.

    Raises:
        ParetoError: vLLM is of a version that cannot be asked.

    """
    if not words or not words[0].startswith("-"):
        return words
    own: dict[str, argparse.Action] = dict(parser._option_string_actions)
    foreign = [i for i, word in enumerate(words) if _is_flag(word) and "=" not in word and word not in own]
    if not any(i + 1 < len(words) and not _is_flag(words[i + 1]) for i in foreign):
        return words
    actions = _vllm_flags() | own
    bare: list[str] = []
    flags: list[str] = []
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if not _is_flag(word):
            bare.append(word)
            continue
        flags.append(word)
        most = 0 if "=" in word else _values(actions, word)
        while most and place < len(words) and not _is_flag(words[place]):
            flags.append(words[place])
            place, most = place + 1, most - 1
    return [*bare, *flags]


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not re.fullmatch(r"-\d+(\.\d*)?|-\.\d+|-", word)


def _values(actions: dict[str, argparse.Action], word: str) -> int:
    """Return how many words a flag takes at most."""
    name, dot, _ = word.partition(".")
    if dot:
        return 1  # vLLM's way to set one field of a JSON value.
    action = actions.get(word) or actions.get("--" + name.removeprefix("--").replace("_", "-"))
    if action is None:
        return 0
    if action.nargs in ("*", "+", "..."):
        return sys.maxsize
    if isinstance(action.nargs, int):
        return action.nargs
    return 1


def _vllm_flags() -> dict[str, argparse.Action]:
    from vllm_ext.launch import name_vllm

    name_vllm()
    try:
        from vllm_ext.compat import FlexibleArgumentParser, make_arg_parser

        return dict(make_arg_parser(FlexibleArgumentParser())._option_string_actions)
    except (ImportError, AttributeError) as error:
        raise ParetoError("give MODEL first: pareto serve MODEL --flag value ...") from error


def check_port(host: str, port: int) -> None:
    """Raise unless the address can be listened on.

    Raises:
        ParetoError: the port is in use, or the address is not this machine's.

    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ParetoError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error


def check_plugin(kv_cache_dtype: str) -> None:
    """Raise unless vLLM will load this plugin and knows the dtype.

    Raises:
        ParetoError: no vLLM, one that is unsupported and shall serve a dtype of ours, a plugin switched off by
            VLLM_PLUGINS, or an unknown dtype.

    """
    from kv_cache.formats import DTYPES
    from vllm_ext.plugin import register
    from vllm_ext.versions import check_vllm_version, release_of, vllm_version

    vllm_version()
    if kv_cache_dtype in DTYPES:
        check_vllm_version()
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "pareto" not in allowed.split(","):
        raise ParetoError(f"VLLM_PLUGINS={allowed} keeps vLLM from loading this plugin: add 'pareto' to it or unset it")
    # Importing vLLM to check a default would double the start-up time, and a vLLM that we do not know says itself what
    # it does not take.
    if kv_cache_dtype == "auto" or release_of(vllm_version()) is None:
        return
    register()
    from vllm_ext.dtype_names import known_dtypes

    if kv_cache_dtype not in known_dtypes():
        raise ParetoError(f"unknown --kv-cache-dtype {kv_cache_dtype!r}; valid: {', '.join(known_dtypes())}")


def find_model(args: argparse.Namespace) -> str:
    """Return the model as vLLM shall be told it: an embedded one's folder, or what was given.

    A hub name stays one. vLLM resolves it with all flags that say which files are meant (``--revision``,
    ``--tokenizer-revision``, ``--code-revision``, ``--download-dir``), none of which means anything beside a folder.

    Raises:
        ParetoError: there is no such model.

    """
    from quant_methods.embedded import names as embedded_names
    from quant_methods.model_source import check_on_hub, embedded_model

    name: str = args.model
    path = Path(name).expanduser()
    if path.exists():
        if path.is_dir():
            config = Path(args.hf_config_path).expanduser() if args.hf_config_path is not None else path
            check_folder(path, config if config.is_dir() else None, dummy=args.load_format == "dummy")
        return str(path)
    if name in embedded_names():
        return str(embedded_model(name))
    if "://" in name:
        return name  # Object stores are vLLM's business.
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ParetoError(f"model {name!r} not found: no such directory")
    try:
        # What follows a colon says which file of a hub model is meant.
        check_on_hub(name.partition(":")[0], revision=args.revision, token=args.hf_token)
    except ParetoError as error:
        if "/" in name:
            raise
        raise ParetoError(f"{error}; the embedded models are {', '.join(embedded_names())}") from error
    return name


def check_folder(folder: Path, config: Path | None, *, dummy: bool) -> None:
    """Raise if no server can start from a folder: its config.json is no JSON, or its safetensors are cut short.

    Which architectures and file formats there are is vLLM's business: it knows more of them than ``pareto compress``.

    Args:
        folder: of the weights.
        config: of config.json; None: it is on the hub.
        dummy: no weights are read.

    Raises:
        ParetoError: what is wrong with which file.

    """
    from quant_methods.model_source import INDEX, SINGLE, read_config, read_header, weight_files

    if config is not None and ((config / "config.json").exists() or not (config / "params.json").exists()):
        read_config(config)
    if not dummy and ((folder / SINGLE).is_file() or (folder / INDEX).is_file()):
        for file in weight_files(folder):
            read_header(file)


def run(args: argparse.Namespace) -> int:
    """Become ``vllm serve``; only returns by raising."""
    check_port(args.host, args.port)
    check_plugin(args.kv_cache_dtype)
    model = find_model(args)
    names = args.served_model_name or [args.model]
    command = [sys.executable, "-m", "vllm_ext.launch", "serve", model, "--host", args.host]
    command += ["--port", str(args.port), "--kv-cache-dtype", args.kv_cache_dtype, "--load-format", args.load_format]
    command += ["--served-model-name", *names]
    if args.hf_config_path is not None:
        command += ["--hf-config-path", args.hf_config_path]
    if args.revision is not None:
        command += ["--revision", args.revision]
    if args.hf_token is not None:
        command += ["--hf-token"] if args.hf_token is True else ["--hf-token", args.hf_token]
    # Outside this command vLLM's own kernels serve other people's checkpoints: nobody chose anything else there.
    os.environ.setdefault(LOW_BIT_KERNEL_VARIABLE, "1")
    sys.stdout.flush()
    # The server replaces this process, so that signals reach it and nothing is left behind.
    os.execv(sys.executable, [*command, *args.rest])
