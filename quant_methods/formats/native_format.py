"""The checkpoint format of ours, for what compressed-tensors cannot express or stock vLLM does not serve.

``config.json`` holds ``quantization_config``::

    {"quant_method": "pareto", "version": 1, "ignore": [module, ...],
     "groups": [{"bits": 3, "group_size": 128, ..., "targets": [module, ...]}, ...]}

A group's other keys are those of :class:`Form`; what has its default may be left out. A module's tensors, rows being
output channels and k input channels kept apart:

- ``weight_plane8``, ``_plane4``, ``_plane2``, ``_plane1``: the bulk's codes from 0 to 2^bits - 1 (on a grid the signed
  code plus 2^(bits-1)), cut into bit planes of these widths, the code's lowest bits in the widest plane. int32
  [rows, inputs * width / 32]; the lowest bits of a word belong to the first of its input channels.
- ``weight_scale`` [rows, groups] in 16 bits and, with zero-points, ``weight_zero_point`` int8 [rows, groups], in the
  numbering of signed codes; or ``weight_table`` [rows, 2^bits] in 16 bits.
- ``column_index`` int32 [k], ``column_weight`` [rows, k] in 16 bits, or in int8 with ``column_scale`` [rows].
- ``sparse_starts`` int32 [rows + 1], ``sparse_columns`` int32 [n], ``sparse_values`` [n] in 16 bits.
- ``low_rank_up`` [rows, rank] and ``low_rank_down`` [rank, inputs] in 16 bits.

What they add up to is said in ``quantized.py``. Where ``activations`` is not ``none``, serving rounds each token's
inputs to symmetric integers for the bulk alone (``grid.round_tokens``); columns kept apart are left out of the rounding
and, like the sparse and the low-rank part, multiply the inputs as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.formats.quantized import Columns, LowRank, QuantizedLinear, Sparse

QUANT_METHOD = "pareto"
VERSION = 1

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Bits of a code to the widths of its planes, that of the lowest bits first."""

ACTIVATION_BITS = {"none": None, "int8": 8, "int6": 6}
"""What serving rounds activations to."""

INPUT_MULTIPLE = 32
"""Input channels come in multiples of this, so that every plane's rows are whole words."""


@dataclass(frozen=True)
class Form:
    """How a layer is stored.

    Attributes:
        bits: of a code of the bulk, 2 to 8; with a table at most 7.
        group_size: input channels that share a scale; -1 for one scale per output channel. A table has none.
        symmetric: without zero-points.
        table: codes are indices into a table of each output channel.
        columns: input channels kept apart.
        column_bits: bits of a weight there: 16 or 8.
        sparse: single weights are added.
        rank: of the product that is added; 0 for none.
        activations: ``none``, ``int8`` or ``int6``: what serving rounds each token's inputs to.

    """

    bits: int
    group_size: int = -1
    symmetric: bool = True
    table: bool = False
    columns: int = 0
    column_bits: int = 16
    sparse: bool = False
    rank: int = 0
    activations: str = "none"

    def check(self, where: str) -> None:
        """Refuse what is no form.

        Raises:
            ParetoError: ``where``, and what is wrong.

        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # A bool is an int to Python, and a count of `true` is a mistake.
            if type(value).__name__ != field.type:
                raise ParetoError(f"{where}: {field.name} is {value!r}, expected {field.type}")
        allowed: dict[str, Iterable[Any]] = {
            "bits": range(2, 8 if self.table else 9),
            "column_bits": (8, 16),
            "activations": ACTIVATION_BITS,
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                known = ", ".join(map(str, values))
                raise ParetoError(f"{where}: {name} is {getattr(self, name)!r}, expected one of {known}")
        if self.group_size != -1 and (self.group_size < 1 or self.table):
            expected = "-1 with a table" if self.table else "-1 or a positive number"
            raise ParetoError(f"{where}: group_size is {self.group_size}, expected {expected}")
        if min(self.columns, self.rank) < 0:
            raise ParetoError(f"{where}: columns and rank cannot be negative ({self.columns}, {self.rank})")

    def slow_on_cuda(self) -> str | None:
        """Return a line about a bulk that no CUDA kernel multiplies by, with what to choose instead; else None.

        It is said before a model is compressed so, and when it is served.
        """
        if self.table and self.bits > 4:
            return slow_on_cuda("look-up weights", self.bits, "compress to tables of 3 or 4 bits, or round to a grid")
        if not self.table and self.bits == 8 and not self.symmetric:
            return slow_on_cuda("weights with zero-points", self.bits, "compress with --symmetric")
        return None

    def shapes(self, rows: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Return a layer's tensors by local name, and their shapes; -1 for an extent that only the tensor knows."""
        groups = 1 if self.group_size == -1 else inputs // self.group_size
        found: dict[str, tuple[int, ...]] = {
            f"weight_plane{width}": (rows, inputs * width // 32) for width in PLANES[self.bits]
        }
        if self.table:
            found["weight_table"] = (rows, 1 << self.bits)
        else:
            found["weight_scale"] = (rows, groups)
            if not self.symmetric:
                found["weight_zero_point"] = (rows, groups)
        if self.columns:
            found |= {"column_index": (self.columns,), "column_weight": (rows, self.columns)}
            if self.column_bits == 8:
                found["column_scale"] = (rows,)
        if self.sparse:
            found |= {"sparse_starts": (rows + 1,), "sparse_columns": (-1,), "sparse_values": (-1,)}
        if self.rank:
            found |= {"low_rank_up": (rows, self.rank), "low_rank_down": (self.rank, inputs)}
        return found


def slow_on_cuda(what: str, bits: int, instead: str) -> str:
    """Return what is said of weights without a CUDA kernel: what serving costs, and what to choose instead."""
    return (
        f"{bits}-bit {what} have no CUDA kernel: PyTorch expands them to 16 bits at every step, which takes longer "
        f"than 16-bit weights do; {instead}"
    )


def pack_codes(codes: Tensor, bits: int) -> dict[int, Tensor]:
    """Cut codes into bit planes.

    Args:
        codes: [rows, inputs] integers from 0 to 2^bits - 1; 32 divides ``inputs``.
        bits: of a code.

    Returns:
        A plane's width to its words, int32 [rows, inputs * width / 32].

    """
    planes, shift = {}, 0
    for width in PLANES[bits]:
        part = (codes.int() >> shift) & ((1 << width) - 1)
        places = torch.arange(0, 32, width, dtype=torch.int32, device=codes.device)
        # The places do not overlap, so the sum sets their bits; int32 wraps around into the sign bit as it should.
        words = (part.unflatten(1, (-1, 32 // width)) << places).sum(-1, dtype=torch.int32)
        planes[width] = words
        shift += width
    return planes


def unpack_codes(planes: Mapping[int, Tensor], bits: int) -> Tensor:
    """Put codes together again; the inverse of :func:`pack_codes`.

    Returns:
        uint8 [rows, inputs].

    """
    codes: Tensor | None = None
    shift = 0
    for width in PLANES[bits]:
        words = planes[width]
        places = torch.arange(0, 32, width, dtype=torch.int32, device=words.device)
        part = ((words[:, :, None] >> places) & ((1 << width) - 1)).to(torch.uint8).flatten(1) << shift
        codes = part if codes is None else codes | part
        shift += width
    assert codes is not None
    return codes


def pack(name: str, linear: QuantizedLinear, bits: int, symmetric: bool) -> dict[str, Tensor]:
    """Return the tensors that store a quantized layer.

    Args:
        name: the module's.
        linear: the layer.
        bits: of its codes.
        symmetric: its grid has no zero-points.

    Raises:
        ParetoError: its input channels are no multiple of 32, or a code needs more bits.

    """
    inputs = linear.codes.shape[1]
    if inputs % INPUT_MULTIPLE:
        raise ParetoError(f"{name} has {inputs} input channels; this format holds multiples of {INPUT_MULTIPLE}")
    codes = linear.codes.int() + (0 if linear.table is not None else 1 << (bits - 1))
    if codes.min() < 0 or codes.max() >> bits:
        raise ParetoError(f"{name}: its codes do not fit into {bits} bits")
    tensors = {f"weight_plane{width}": words for width, words in pack_codes(codes, bits).items()}
    if linear.table is not None:
        tensors["weight_table"] = linear.table
    else:
        tensors["weight_scale"] = linear.scale
        if not symmetric:
            tensors["weight_zero_point"] = linear.zero_point
    if linear.columns is not None and len(linear.columns.index):
        tensors |= {"column_index": linear.columns.index.int(), "column_weight": linear.columns.weight}
        if linear.columns.scale is not None:
            tensors["column_scale"] = linear.columns.scale
    if linear.sparse is not None and len(linear.sparse.values):
        tensors["sparse_starts"] = linear.sparse.starts.int()
        tensors["sparse_columns"] = linear.sparse.columns.int()
        tensors["sparse_values"] = linear.sparse.values
    if linear.low_rank is not None and linear.low_rank.up.shape[1]:
        tensors |= {"low_rank_up": linear.low_rank.up, "low_rank_down": linear.low_rank.down}
    return {f"{name}.{local}": tensor.contiguous() for local, tensor in tensors.items()}


def form_of(shapes: Mapping[str, tuple[int, ...]], activations: str) -> Form:
    """Return the form of a stored layer.

    Args:
        shapes: its tensors' shapes by local name.
        activations: what serving rounds its inputs to, which the tensors do not say.

    """
    widths = tuple(width for width in (8, 4, 2, 1) if f"weight_plane{width}" in shapes)
    inputs = shapes[f"weight_plane{widths[0]}"][1] * 32 // widths[0]
    groups = shapes["weight_scale"][1] if "weight_scale" in shapes else 1
    return Form(
        bits=sum(widths),
        group_size=-1 if groups == 1 else inputs // groups,
        symmetric="weight_zero_point" not in shapes,
        table="weight_table" in shapes,
        columns=shapes["column_index"][0] if "column_index" in shapes else 0,
        column_bits=8 if "column_scale" in shapes else 16,
        sparse="sparse_starts" in shapes,
        rank=shapes["low_rank_up"][1] if "low_rank_up" in shapes else 0,
        activations=activations,
    )


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
        ParetoError: a tensor is missing, too many, or of another shape than the form says.

    """
    widest = PLANES[form.bits][0]
    check_complete(name, tensors, form)
    planes = {width: tensors[f"weight_plane{width}"] for width in PLANES[form.bits]}
    rows, inputs = planes[widest].shape[0], planes[widest].shape[1] * 32 // widest
    for local, wanted in form.shapes(rows, inputs).items():
        found = tuple(tensors[local].shape)
        if len(found) != len(wanted) or any(w not in (-1, f) for f, w in zip(found, wanted, strict=True)):
            raise ParetoError(f"{name}.{local} is {list(found)}, expected {list(wanted)}; the checkpoint is damaged")
    codes = unpack_codes(planes, form.bits)
    if form.table:
        table = tensors["weight_table"]
        none = codes.new_empty((rows, 0), dtype=torch.int8)
        linear = QuantizedLinear(codes.to(torch.int8), table[:, :0], none, table)
    else:
        scale = tensors["weight_scale"]
        signed = (codes.to(torch.int16) - (1 << (form.bits - 1))).to(torch.int8)
        zero = tensors.get("weight_zero_point")
        if zero is None:
            zero = torch.zeros(scale.shape, dtype=torch.int8, device=scale.device)
        linear = QuantizedLinear(signed, scale, zero)
    if form.columns:
        linear.columns = Columns(tensors["column_index"], tensors["column_weight"], tensors.get("column_scale"))
    if form.sparse:
        linear.sparse = Sparse(tensors["sparse_starts"], tensors["sparse_columns"], tensors["sparse_values"])
    if form.rank:
        linear.low_rank = LowRank(tensors["low_rank_up"], tensors["low_rank_down"])
    return linear


def check_complete(name: str, found: Iterable[str], form: Form) -> None:
    """Refuse a layer that lacks tensors, or has others than its form says.

    Args:
        name: the module's.
        found: local names of its tensors, without a bias.
        form: how it is stored.

    Raises:
        ParetoError: naming one of them.

    """
    wanted, present = set(form.shapes(0, 0)), set(found)
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
            "groups": [{**dataclasses.asdict(form), "targets": names} for form, names in groups.items()],
        }

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> NativeConfig:
        """Read what config.json holds.

        Raises:
            ParetoError: another version, an unknown key, a bad value, or a module that two groups name.

        """
        where = "quantization_config"
        if config.get("quant_method") != QUANT_METHOD:
            raise ParetoError(f"{where}: quant_method is {config.get('quant_method')!r}, expected {QUANT_METHOD!r}")
        if config.get("version") != VERSION:
            raise ParetoError(
                f"{where}: version {config.get('version')!r} of the format; this vllm-pareto reads version {VERSION}: "
                "compress the model again, or install the vllm-pareto that wrote it"
            )
        groups, ignore = config.get("groups"), config.get("ignore", [])
        if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
            raise ParetoError(f"{where}: groups: expected a list of mappings")
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise ParetoError(f"{where}: ignore: expected a list of module names")
        known = {field.name for field in dataclasses.fields(Form)}
        forms: dict[str, Form] = {}
        for index, group in enumerate(groups):
            values = dict(group)
            here = f"{where}: group {index}"
            targets = values.pop("targets", None)
            if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
                raise ParetoError(f"{here}: targets: expected a list of module names")
            if unknown := sorted(set(values) - known):
                raise ParetoError(f"{here}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
            if "bits" not in values:
                raise ParetoError(f"{here}: bits is missing")
            form = Form(**values)
            form.check(here)
            if twice := sorted(set(targets) & set(forms)):
                raise ParetoError(f"{here}: {twice[0]} is in another group too")
            forms |= dict.fromkeys(targets, form)
        return cls(forms, tuple(ignore))
