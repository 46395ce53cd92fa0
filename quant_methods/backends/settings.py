"""Our recipe in the words of another tool's runner, or why the tool cannot do it."""

from __future__ import annotations

from typing import Any

from kv_cache.errors import ParetoError
from quant_methods.backends.environment import Backend
from quant_methods.methods.awq import AWQ
from quant_methods.methods.gptq import GPTQ, PAPERS_DAMPING
from quant_methods.methods.rtn import RTN
from quant_methods.methods.smoothquant import SmoothQuant
from quant_methods.methods.sparsegpt import SparseGPT
from quant_methods.recipe import Recipe
from quant_methods.steps import PruneStep, RoundStep, ScaleStep, Step


def tool_settings(backend: Backend, recipe: Recipe) -> dict[str, Any]:
    """Return a recipe in the words of the runners.

    Raises:
        ParetoError: it has a step, or a setting, that the tool does not.

    """
    where = f"recipe {recipe.name}: {backend.name}"
    kinds: dict[type, str] = {RTN: "rtn", GPTQ: "gptq", AWQ: "awq", SmoothQuant: "smoothquant"}
    prunes = [step for step in recipe.steps if isinstance(step, PruneStep) and step.method in backend.prunes]
    steps = [step for step in recipe.steps if step not in prunes]
    names = [kinds.get(type(step), "") for step in steps]
    transform, rounding = names[0] if len(names) == 2 else None, names[-1] if names else None
    # A prune step is first, and what comes between it and the rounding would move its zeros.
    in_order = not prunes or (len(prunes) == 1 and recipe.steps[0] is prunes[0] and transform is None)
    rounds = len(names) in (1, 2) and (transform, rounding) in backend.combinations
    if not in_order or not (rounds or (prunes and not steps)):
        pairs = [" then ".join(filter(None, pair)) for pair in backend.combinations]
        known = [*pairs, *(f"{name}, alone or before a rounding" for name in backend.prunes)]
        asked = " then ".join(step.method for step in recipe.steps) or "no step"
        raise ParetoError(f"{where} cannot do {asked}; it does: {'; '.join(known)}")
    if any(s.targets != ("*",) for s in recipe.steps if isinstance(s, RoundStep | ScaleStep | PruneStep)):
        raise ParetoError(f"{where} treats all layers alike; leave targets out")
    found: dict[str, Any] = {"transform": transform, "rounding": rounding, "prune": None}
    found |= {"activations": "none", "group_size": -1, "seed": recipe.calibration.seed}
    if prunes:
        found |= _pruning(prunes[0], where)
    if rounding is not None:
        found |= _rounding(backend, steps, where)
    return found


def _pruning(step: PruneStep, where: str) -> dict[str, Any]:
    if step.rounding is not None:
        raise ParetoError(f"{where} does not round while it prunes; leave bits out and let gptq follow")
    own = step if isinstance(step, SparseGPT) else None
    return {
        "prune": step.method,
        "sparsity": step.sparsity,
        "pattern": step.pattern,
        "prune_damping": _damping(own.damping, SparseGPT.damping) if own else None,
    }


def _rounding(backend: Backend, steps: list[Step], where: str) -> dict[str, Any]:
    step = steps[-1]
    assert isinstance(step, RoundStep)
    if step.bits not in backend.bits:
        raise ParetoError(f"{where} writes {', '.join(map(str, backend.bits))} bits, not {step.bits}")
    if step.symmetric not in backend.symmetric:
        kind, flag = ("with", "--no-symmetric") if step.symmetric else ("without", "--symmetric")
        raise ParetoError(f"{where} writes 4-bit codes {kind} zero-points only; add {flag}")
    if step.activations != "none" and not (backend.activations and step.activations == "int8"):
        raise ParetoError(f"{where} does not round activations to {step.activations}")
    gptq = step if isinstance(step, GPTQ) else None
    smooth = next((s for s in steps if isinstance(s, SmoothQuant)), None)
    return {
        "bits": step.bits,
        "group_size": step.group_size,
        "symmetric": step.symmetric,
        "activations": step.activations,
        "act_order": gptq.act_order if gptq else False,
        "damping": _damping(gptq.damping, GPTQ.damping) if gptq else PAPERS_DAMPING,
        "alpha": smooth.alpha if smooth else None,
    }


def _damping(given: float, default: float) -> float:
    """Return the damping for the tool: our own default was found for our own shift, and theirs stays what they ship."""
    return PAPERS_DAMPING if given == default else given
