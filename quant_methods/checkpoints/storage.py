"""How a run stores quantized layers: as compressed-tensors where stock vLLM serves all of them, else in our format.

vLLM reads one ``quant_method`` a checkpoint, so one layer that needs our format takes all others along.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from kv_cache.errors import ParetoError
from quant_methods.checkpoints import checkpoint
from quant_methods.formats import native_format
from quant_methods.formats.form import Form, form_of
from quant_methods.formats.native_format import NativeConfig, local_tensors
from quant_methods.formats.parts.bitmap_codes import BitmapCodes
from quant_methods.formats.parts.grid_codes import GridCodes
from quant_methods.formats.parts.part import Bulk, Shapes
from quant_methods.formats.parts.semi_sparse import SemiSparseCodes
from quant_methods.formats.quantized import QuantizedLinear
from quant_methods.model_source import read_header
from quant_methods.steps import RoundStep

if TYPE_CHECKING:
    from quant_methods.plan import Plan


class Storage(Protocol):
    """A checkpoint format."""

    def pack(self, name: str, linear: QuantizedLinear, step: RoundStep) -> dict[str, Tensor]:
        """Return the tensors that store a layer (on the CPU), by full name."""
        ...

    def unpack(self, name: str, tensors: Mapping[str, Tensor], step: RoundStep) -> QuantizedLinear:
        """Return the layer again from a checkpoint's (or a block's) tensors by full name."""
        ...

    def bits_per_weight(
        self, name: str, tensors: Mapping[str, Tensor], step: RoundStep, shape: tuple[int, int]
    ) -> float:
        """Return the storage of a layer of this shape in bits a weight, everything included."""
        ...

    def config(self, plan: Plan, parts: Iterable[Path]) -> dict[str, Any]:
        """Return ``quantization_config`` for the layers that lie in some safetensors files.

        Raises:
            ParetoError: a layer of the plan is not there as the format wants it, so it would not be used.

        """
        ...


def storage_of(plan: Plan) -> Storage:
    """Return the format that a plan's layers are stored in."""
    return Native() if plan.native else Standard()


WITHOUT_ZEROS: dict[str, type[SemiSparseCodes] | type[BitmapCodes]] = {"2:4": SemiSparseCodes, "bitmap": BitmapCodes}
"""What holds codes without their zeros, as a rounding step's ``store`` says."""


class Standard:
    """compressed-tensors."""

    def pack(self, name: str, linear: QuantizedLinear, step: RoundStep) -> dict[str, Tensor]:
        """Return a layer's tensors; see :class:`Storage`."""
        if others := [part for part in linear.parts if not isinstance(part, GridCodes)]:
            raise ParetoError(
                f"{name}: {step.method} made {others[0].what}, which compressed-tensors has no place for; its step "
                "must say that it is not plain"
            )
        return checkpoint.pack_linear(name, linear, step)

    def unpack(self, name: str, tensors: Mapping[str, Tensor], step: RoundStep) -> QuantizedLinear:
        """Return a layer again; see :class:`Storage`."""
        return checkpoint.unpack_linear(name, dict(tensors), step.grid)

    def bits_per_weight(
        self, name: str, tensors: Mapping[str, Tensor], step: RoundStep, shape: tuple[int, int]
    ) -> float:
        """Return a layer's bits a weight; see :class:`Storage`."""
        return step.grid.bits_per_weight(*shape)

    def config(self, plan: Plan, parts: Iterable[Path]) -> dict[str, Any]:
        """Return ``quantization_config``; see :class:`Storage`."""
        modules = _modules(parts)
        for name, step in plan.steps.items():
            wanted = {"weight_packed" if step.activations == "none" else "weight", "weight_scale"}
            wanted |= {"input_scale"} if step.static else set()
            _refuse_unused(name, wanted <= modules.get(name, {}).keys())
        return checkpoint.quantization_config(plan.schemes, plan.ignored)


class Native:
    """The format of ours, ``native_format.py``."""

    def pack(self, name: str, linear: QuantizedLinear, step: RoundStep) -> dict[str, Tensor]:
        """Return a layer's tensors; see :class:`Storage`."""
        if step.store != "dense":
            linear = _with_bulk(WITHOUT_ZEROS[step.store].of(linear.part(GridCodes)), linear)
        return native_format.pack(name, linear)

    def unpack(self, name: str, tensors: Mapping[str, Tensor], step: RoundStep) -> QuantizedLinear:
        """Return a layer again; see :class:`Storage`."""
        own = local_tensors(name, tensors)
        linear = native_format.unpack(name, own, _form(name, {n: tuple(t.shape) for n, t in own.items()}, step))
        # Steps that follow know codes on a grid, zeros among them.
        for part in WITHOUT_ZEROS.values():
            if isinstance(linear.bulk, part):
                return _with_bulk(linear.bulk.grid(), linear)
        return linear

    def bits_per_weight(
        self, name: str, tensors: Mapping[str, Tensor], step: RoundStep, shape: tuple[int, int]
    ) -> float:
        """Return a layer's bits a weight; see :class:`Storage`."""
        own = {local: tuple(tensor.shape) for local, tensor in local_tensors(name, tensors).items()}
        return _form(name, own, step).stored_bits(own) / (shape[0] * shape[1])

    def config(self, plan: Plan, parts: Iterable[Path]) -> dict[str, Any]:
        """Return ``quantization_config``; see :class:`Storage`."""
        modules = _modules(parts)
        forms = {}
        for name, step in plan.steps.items():
            own = modules.get(name, {})
            forms[name] = _form(name, own, step)
            native_format.check_complete(name, own, forms[name])
        return NativeConfig(forms, tuple(plan.ignored)).to_dict()


def _with_bulk(bulk: Bulk, linear: QuantizedLinear) -> QuantizedLinear:
    """Return a layer with another bulk that means the same."""
    return QuantizedLinear(bulk, *linear.additions, input_scale=linear.input_scale)


def _modules(parts: Iterable[Path]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of the tensors in some files, by module and by local name, biases left out."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for part in parts:
        for full, entry in read_header(part).items():
            module, _, local = full.rpartition(".")
            if local != "bias":
                shapes.setdefault(module, {})[local] = tuple(entry["shape"])
    return shapes


def _form(name: str, shapes: Shapes, step: RoundStep) -> Form:
    """Return the form of a layer that lies in tensors of these shapes, and refuse one that does not."""
    form = form_of(shapes, step.activations)
    _refuse_unused(name, form is not None)
    assert form is not None
    return form


def _refuse_unused(name: str, stored: bool) -> None:
    if not stored:
        raise ParetoError(f"no-op: {name} was quantized, and the checkpoint does not hold its codes; nothing was kept")
