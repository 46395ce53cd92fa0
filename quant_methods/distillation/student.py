"""Which model learns: one that is given, one of a shape that a file gives, or a part of its teacher (``cut.py``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.calibration.text_source import load_tokenizer, quiet_transformers
from quant_methods.checkpoints.checkpoint import copy_companions

KINDS_OF_LAYERS = ("layer_types", "mlp_layer_types")
"""Lists of configurations that have an entry for each layer."""


def config_with(config: Any, changes: dict[str, Any], layers: list[int] | None = None) -> Any:
    """Return a configuration with other sizes.

    Args:
        config: of transformers.
        changes: values by name; those of a name that the configuration lacks are refused by the caller.
        layers: which of the layers are left, for lists with an entry for each; None: as many as the changes say, spread
            evenly.

    """
    total = config.num_hidden_layers
    left = changes.get("num_hidden_layers", total) if layers is None else len(layers)
    chosen = [i * total // left for i in range(left)] if layers is None else layers
    values = config.to_dict()
    for name in KINDS_OF_LAYERS:
        if isinstance(values.get(name), list) and name not in changes:
            values[name] = [values[name][i] for i in chosen]
    for name in ("quantization_config", "architectures", "dtype"):
        values.pop(name, None)
    return type(config).from_dict({**values, **changes, "num_hidden_layers": left})


def fresh(teacher: Path, shape: Path, seed: int) -> Any:
    """Return a model with random weights of its teacher's kind, float32.

    Args:
        teacher: the teacher's folder, whose configuration stands for what the file does not name.
        shape: a YAML mapping of configuration values, such as ``hidden_size: 256``.
        seed: of the weights.

    Raises:
        ParetoError: the file is missing, or no mapping of known names, or makes no model.

    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        given = yaml.safe_load(shape.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParetoError(f"--student-config {shape}: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ParetoError(f"--student-config {shape} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict) or not given:
        raise ParetoError(f"--student-config {shape}: expected a mapping such as hidden_size: 256")
    config = AutoConfig.from_pretrained(teacher)
    known = config.to_dict()
    if unknown := sorted(str(name) for name in given if name not in known):
        sizes = [name for name, value in known.items() if isinstance(value, int) and not isinstance(value, bool)]
        raise ParetoError(f"--student-config {shape}: unknown key {unknown[0]!r}; sizes: {', '.join(sorted(sizes))}")
    if given.get("vocab_size", config.vocab_size) != config.vocab_size:
        raise ParetoError(
            f"--student-config {shape}: vocab_size {given['vocab_size']} is not the teacher's {config.vocab_size}, "
            "whose tokenizer the student has"
        )
    try:
        made = config_with(config, given)
        torch.manual_seed(seed)
        with quiet_transformers():
            model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
        model.eval()(torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    except Exception as error:  # transformers checks a configuration wherever it uses it.
        reason = " ".join(str(error).split())[:200]
        raise ParetoError(f"--student-config {shape} makes no model: {reason}") from error
    return model


def check_tokenizer(teacher: Path, student: Path) -> None:
    """Refuse a student whose tokens mean something else than its teacher's.

    Raises:
        ParetoError: they do.

    """
    names = teacher, student
    first, second = (load_tokenizer(folder).get_vocab() for folder in names)
    if first != second:
        different = sum(second.get(token) != number for token, number in first.items())
        raise ParetoError(
            f"{student} has another tokenizer than {teacher}: {different:,} of {len(first):,} tokens differ; a student "
            "learns from probabilities of its own tokens"
        )


def save(model: Any, teacher: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a model as a checkpoint with its teacher's tokenizer and chat template.

    Args:
        model: of transformers.
        teacher: the teacher's folder.
        folder: where to.
        dtype: of the weights there.

    """
    folder.mkdir(parents=True, exist_ok=True)
    copy_companions(teacher, folder)
    with quiet_transformers():
        # Tensors that are one stay one, which the library stores once; converted each by itself they would be two.
        made: dict[tuple[int, torch.Size], Tensor] = {}
        state = {
            name: made.setdefault((value.data_ptr(), value.shape), value.detach().to(dtype))
            for name, value in model.state_dict().items()
        }
        model.config.dtype = dtype
        model.save_pretrained(folder, state_dict=state)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~_umask())  # The library makes files that only their owner may read.


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def let_learn(model: Any, targets: Sequence[str]) -> None:
    """Let some layers of a student learn, and the others stay as they are.

    A student that is its teacher at the start, and has only codes to learn to live with, comes nearer to it by few
    layers than by all: AdamW moves every weight by about its learning rate, whatever there is to gain.

    Args:
        model: the student.
        targets: last names of the layers; none: all learn.

    Raises:
        ParetoError: no layer has one of the names.

    """
    if not targets:
        return
    layers = [(name.rpartition(".")[2], module) for name, module in model.named_modules() if module._parameters]
    names = {name for name, _ in layers}
    if wrong := [target for target in targets if target not in names]:
        raise ParetoError(f"--targets: no layer is called {wrong[0]!r}; layers: {', '.join(sorted(names))}")
    model.requires_grad_(False)
    # After that: parameters that two layers share learn where one of them shall.
    for name, module in layers:
        if name in targets:
            module.requires_grad_(True)
