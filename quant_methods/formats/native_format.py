"""The checkpoint format of ours, for what compressed-tensors cannot express or stock vLLM does not serve.

``config.json`` holds ``quantization_config``, which lists the parts that each layer's weight is the sum of::

    {"quant_method": "pareto", "version": 2, "ignore": [module, ...],
     "groups": [{"parts": [{"part": "grid", "bits": 3, "group_size": 128, "symmetric": false},
                           {"part": "columns", "count": 41, "bits": 16}],
                 "activations": "none", "targets": [module, ...]}, ...]}

A part's other keys are those of its form; what has its default may be left out. Which tensors a part has is said in its
file in ``parts/``. Version 1 said the same in one flat record a group (``flat_form.py``), and is still read.

Where ``activations`` is not ``none``, serving rounds each token's inputs to symmetric integers for the bulk alone
(``grid.round_tokens``); columns kept apart are left out of the rounding and, like the other additions, multiply the
inputs as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.flat_form import parse_flat
from quant_methods.formats.form import Form
from quant_methods.formats.quantized import QuantizedLinear

QUANT_METHOD = "pareto"
VERSION = 2
READERS: dict[Any, Callable[[Mapping[str, Any], str], Form]] = {1: parse_flat, VERSION: Form.parse}
"""Versions of the format, and what reads a group of each."""


def pack(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """Return the tensors that store a quantized layer, by full name.

    Args:
        name: the module's.
        linear: the layer.

    Raises:
        ParetoError: its input channels are no multiple of 32, or a code needs more bits than its part has.

    """
    try:
        tensors = {local: tensor for part in linear.parts for local, tensor in part.pack().items()}
    except ParetoError as error:
        raise ParetoError(f"{name}: {error}") from error
    return {f"{name}.{local}": tensor.contiguous() for local, tensor in tensors.items()}


def local_tensors(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a module's tensors by local name; its bias, which is none of this format's, is left out."""
    found = {full[len(name) + 1 :]: tensor for full, tensor in tensors.items() if full.rpartition(".")[0] == name}
    found.pop("bias", None)
    return found


def unpack(name: str, tensors: Mapping[str, Tensor], form: Form) -> QuantizedLinear:
    """Return the quantized layer that :func:`pack` stored.

    Args:
        name: the module's, for errors.
        tensors: its tensors by local name.
        form: how it is stored.

    Raises:
        ParetoError: a tensor is missing, too many, of another shape or dtype than the form says, or holds what its part
            does not know.

    """
    check_complete(name, tensors, form)
    rows, inputs = form.bulk.size({local: tuple(tensor.shape) for local, tensor in tensors.items()})
    for local, wanted in form.tensors(rows, inputs).items():
        tensor, damaged = tensors[local], "the checkpoint is damaged"
        found = tuple(tensor.shape)
        if len(found) != len(wanted.shape) or any(w not in (-1, f) for f, w in zip(found, wanted.shape, strict=True)):
            raise ParetoError(f"{name}.{local} is {list(found)}, expected {list(wanted.shape)}; {damaged}")
        if not (tensor.is_floating_point() if wanted.dtype is None else tensor.dtype == wanted.dtype):
            expected = "floating point" if wanted.dtype is None else wanted.dtype
            raise ParetoError(f"{name}.{local} is {tensor.dtype}, expected {expected}; {damaged}")
    try:
        return QuantizedLinear(*(part.unpack(tensors) for part in form.parts))
    except ParetoError as error:
        raise ParetoError(f"{name}: {error}") from error


def check_complete(name: str, found: Iterable[str], form: Form) -> None:
    """Refuse a layer that lacks tensors, or has others than its form says.

    Args:
        name: the module's.
        found: local names of its tensors, without a bias.
        form: how it is stored.

    Raises:
        ParetoError: naming one of them.

    """
    wanted, present = set(form.tensors(0, 0)), set(found)
    if missing := sorted(wanted - present):
        raise ParetoError(f"the checkpoint lacks {name}.{missing[0]}")
    if extra := sorted(present - wanted):
        raise ParetoError(f"the checkpoint has {name}.{extra[0]}, which its quantization_config does not speak of")


@dataclass(frozen=True)
class NativeConfig:
    """A checkpoint's ``quantization_config``.

    Attributes:
        forms: module name to form.
        ignore: modules that are not quantized.

    """

    forms: Mapping[str, Form]
    ignore: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        groups: dict[Form, list[str]] = {}
        for name, form in self.forms.items():
            groups.setdefault(form, []).append(name)
        return {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "ignore": list(self.ignore),
            "groups": [{**form.to_dict(), "targets": names} for form, names in groups.items()],
        }

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> NativeConfig:
        """Read what config.json holds.

        Raises:
            ParetoError: another version, an unknown key or part, a bad value, or a module that two groups name.

        """
        where = "quantization_config"
        if config.get("quant_method") != QUANT_METHOD:
            raise ParetoError(f"{where}: quant_method is {config.get('quant_method')!r}, expected {QUANT_METHOD!r}")
        version = config.get("version")
        if type(version) is not int or version not in READERS:
            raise ParetoError(
                f"{where}: version {version!r} of the format; this vllm-pareto reads versions "
                f"{' and '.join(map(str, READERS))}: compress the model again, or install the vllm-pareto that wrote it"
            )
        groups, ignore = config.get("groups"), config.get("ignore", [])
        if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
            raise ParetoError(f"{where}: groups: expected a list of mappings")
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise ParetoError(f"{where}: ignore: expected a list of module names")
        forms: dict[str, Form] = {}
        for index, group in enumerate(groups):
            values = dict(group)
            here = f"{where}: group {index}"
            targets = values.pop("targets", None)
            if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
                raise ParetoError(f"{here}: targets: expected a list of module names")
            form = READERS[version](values, here)
            if twice := sorted(set(targets) & set(forms)):
                raise ParetoError(f"{here}: {twice[0]} is in another group too")
            forms |= dict.fromkeys(targets, form)
        return cls(forms, tuple(ignore))
