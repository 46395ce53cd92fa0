"""Where a served model's calibrated scales come from: its own checkpoint, or a calibration made when it starts.

The engine's configuration is made once, in the process that the user started; :func:`find_scales` runs there, and the
folder's name is left in ``additional_config``, which vLLM hands to every worker. A draft model (``drafts.py``) has
scales of its own there, under another key.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kv_cache.errors import ParetoError
from kv_cache.formats import CODED, MIXED, KVFormat, get_format
from kv_cache.scales import SCALES_FILE, KVScales, LayerScales
from quant_methods.model_source import hub_trouble
from vllm_ext.drafts import draft_config, is_draft
from vllm_ext.layers import layer_shape
from vllm_ext.names import DRAFT_SCALES_KEY, SCALES_KEY

if TYPE_CHECKING:
    from vllm_ext.auto_calibration import Origin
    from vllm_ext.compat import Attention, LoadConfig, ModelConfig, VllmConfig


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep PyTorch to this thread: vLLM may fork its workers from here, and OpenMP's threads do not survive a fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=4)
def _load_once(folder: str, changed_ns: int) -> KVScales:
    return KVScales.load(folder)


def _load(folder: str) -> KVScales:
    """Read a folder's scales once, and again when the file was replaced."""
    file = Path(folder) / SCALES_FILE
    return _load_once(folder, file.stat().st_mtime_ns if file.is_file() else 0)


def find_scales(config: VllmConfig, *, draft: bool = False) -> Path:
    """Return the folder whose ``kv_scales/`` fits the model: named by the user, the checkpoint's own, or made now.

    Beside random weights (``--load-format dummy``) they are random.

    Args:
        config: the engine's.
        draft: for the draft model, not for the one that answers.

    Raises:
        ParetoError: there is none and none can be made, or it belongs to another model.

    """
    model, load = (config.model_config, config.load_config) if not draft else draft_config(config)
    named = _additional(config).get(_key(draft))
    with _one_thread():
        folder = _named(named, _key(draft)) if named else _find(model, load)
        check_geometry(_load(str(folder)), model, folder)
    return folder


def _key(draft: bool) -> str:
    return DRAFT_SCALES_KEY if draft else SCALES_KEY


def _additional(config: VllmConfig) -> dict[str, Any]:
    """Return the engine's additional configuration, in which scales are named and passed on to workers.

    Raises:
        ParetoError: it is no mapping; vLLM lets other platforms' plugins have objects of their own.

    """
    found = config.additional_config
    if not isinstance(found, dict):
        raise ParetoError(
            f"--additional-config is {type(found).__name__}, and --kv-cache-dtype {config.cache_config.cache_dtype} "
            f'needs a mapping to name its scales in, such as \'{{"{SCALES_KEY}": "DIR"}}\': give one or none'
        )
    return found


def _named(named: Any, key: str) -> Path:
    if not isinstance(named, str):
        raise ParetoError(f"{key} in --additional-config is a folder's name, not {named!r}")
    if not (Path(named) / SCALES_FILE).is_file():
        raise ParetoError(f"{key}: there is no {SCALES_FILE} in {named}")
    return Path(named)


def _find(model: ModelConfig, load: LoadConfig) -> Path:
    from vllm_ext.auto_calibration import Origin, calibrate

    origin = Origin.of(model, load)
    # Scales in a checkpoint are for the model that it is, not for what --hf-overrides makes of it.
    folder = _checkpoint_folder(origin) if origin.overrides is None else None
    if folder is not None and (folder / SCALES_FILE).is_file():
        return folder
    if load.load_format == "dummy":
        from vllm_ext import dummy_scales

        return dummy_scales.make(model)
    from vllm_ext.compat import current_platform

    return calibrate(origin, device="cuda" if current_platform.is_cuda() else "cpu")


def _checkpoint_folder(origin: Origin) -> Path | None:
    """Return the checkpoint's local folder, fetching only the scales of a hub model; None where it has none."""
    if Path(origin.model).is_dir():
        return Path(origin.model)
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError

    where: dict[str, Any] = {"revision": origin.revision, "cache_dir": origin.download_dir}
    try:
        found = huggingface_hub.hf_hub_download(origin.model, str(SCALES_FILE), token=origin.token, **where)
    except RemoteEntryNotFoundError:
        return None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        # Told to stay offline, the cache is all there is. Otherwise trouble with the hub is no answer, unless an
        # earlier one is remembered: scales made here in place of the checkpoint's own would serve other tokens.
        remembered = huggingface_hub.try_to_load_from_cache(origin.model, str(SCALES_FILE), **where)
        if HF_HUB_OFFLINE or remembered is huggingface_hub._CACHED_NO_EXIST:
            return None
        raise ParetoError(
            f"cannot find out whether {origin.model} has KV scales of its own ({hub_trouble(error)}): try again, set "
            "HF_HUB_OFFLINE=1 to go by what this machine has, or name a folder with scales, --additional-config "
            f'\'{{"{SCALES_KEY}": "DIR"}}\''
        ) from error
    return Path(found).parent.parent


def check_geometry(scales: KVScales, model: ModelConfig, folder: Path) -> None:
    """Raise unless the scales were made for a model of this shape.

    Layers without scales are passed over here: which layers vLLM codes is known only when it builds them.
    """
    count = model.get_total_num_hidden_layers()
    again = "make them with 'pareto compress --recipe kv-scales'"
    if scales.num_layers != count:
        raise ParetoError(
            f"the KV scales in {folder} are for {scales.num_layers} layers, the model has {count}: {again}"
        )
    for index in range(count):
        found, expected = scales.shape(index), layer_shape(model, index)
        if found not in (None, expected):
            raise ParetoError(
                f"the KV scales in {folder} are for {found[0]} KV heads of {found[1]} channels in layer {index}, the "
                f"model has {expected[0]} and {expected[1]}: {again}"
            )


def model_scales(config: VllmConfig, *, draft: bool = False) -> KVScales:
    """Return the scales of the whole model, or of the draft model.

    Args:
        config: the engine's, after :func:`find_scales`.
        draft: which one.

    Raises:
        ParetoError: there are none.

    """
    folder = config.additional_config.get(_key(draft))
    if not folder:
        whose = "of a draft model " if draft else ""
        raise ParetoError(f"a quantized KV cache {whose}needs calibrated scales, and the engine was given none")
    return _load(str(folder))


def layer_scales(config: VllmConfig, name: str, num_kv_heads: int) -> LayerScales:
    """Return a layer's scales for the KV heads that this rank holds.

    Args:
        config: the engine's, after :func:`find_scales`.
        name: vLLM's, of the layer. Its index counts over all ranks, also where each has some of the layers.
        num_kv_heads: of this rank.

    Raises:
        ParetoError: there are none, or they are for another number of heads.

    """
    from vllm_ext.compat import (
        extract_layer_index,
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    scales = model_scales(config, draft=is_draft(name)).layer(extract_layer_index(name))
    total = scales.key_mean.shape[0]
    ranks = get_tensor_model_parallel_world_size()
    # Ranks that outnumber the KV heads hold copies of them, one head each.
    if num_kv_heads != max(1, total // ranks):
        raise ParetoError(f"{name} has {num_kv_heads} KV heads on each of {ranks} ranks, its scales are for {total}")
    if num_kv_heads == total:
        return scales
    first = get_tensor_model_parallel_rank() // max(1, ranks // total) * num_kv_heads
    return scales.heads(first, first + num_kv_heads)


def layer_format_of(config: VllmConfig, index: int, *, draft: bool = False) -> KVFormat:
    """Return the format that a layer of the model has under the engine's dtype.

    Args:
        config: the engine's, after :func:`find_scales`; for the draft model, as vLLM makes it for that one.
        index: of the layer.
        draft: whether it is one of the draft model.

    Raises:
        ParetoError: the dtype's layers differ, and the scales name no bits for them.

    """
    name = config.cache_config.cache_dtype
    if name != MIXED:
        return get_format(name)
    return model_scales(config, draft=draft).format(name, index)


def layer_dtype(prefix: str) -> str:
    """Return the dtype that vLLM shall build the layer of that name with, in the engine that is being built now."""
    from vllm_ext.compat import extract_layer_index, get_current_vllm_config

    return layer_format_of(get_current_vllm_config(), extract_layer_index(prefix), draft=is_draft(prefix)).name


def check_layer(layer: Attention) -> None:
    """Raise if a layer that was just built has no scales, or would share those of another layer.

    The prefix tells a draft model's layers from the others. What else vLLM may build beside the model, now or in a
    version to come, may number its layers from 0 as well.
    """
    from vllm_ext.compat import extract_layer_index, get_current_vllm_config

    config, name = get_current_vllm_config(), layer.layer_name
    mine = is_draft(name), extract_layer_index(name)
    model_scales(config, draft=mine[0]).layer(mine[1])
    for other, module in config.compilation_config.static_forward_context.items():
        coded = module is not layer and getattr(module, "kv_cache_dtype", None) in CODED
        if coded and (is_draft(other), extract_layer_index(other)) == mine:
            raise ParetoError(
                f"{name} would be read with the KV scales of {other}: --kv-cache-dtype {layer.kv_cache_dtype} does not "
                "serve this model, use --kv-cache-dtype auto"
            )
