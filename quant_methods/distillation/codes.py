"""The codes that a student lives with while it learns: of its weights, and of its KV cache.

It computes with what would be read from codes, and gradients pass through the rounding as if it were not there (the
straight-through estimator; Bengio et al. 2013, https://arxiv.org/abs/1308.3432), as in Liu et al., "LLM-QAT" (2023),
https://arxiv.org/abs/2305.17888, sections 2 and 3.1, which does so for weights, activations and the KV cache.

Of keys and values the gradient knows more: each token's step follows its range, and what is lost grows with the step.
So it passes through the range too, and a student learns keys and values of small range (Esser et al., "LSQ" (2019),
https://arxiv.org/abs/1902.08153, section 2.1, has this gradient of a step; there the step itself learns).

Weights are rounded to nearest within each group's range, anew at every step, which ``pareto compress --recipe rtn-w4
--search minmax`` does to the result. Keys and values are coded as the KV-cache dtypes do, with calibrated scales, which
follow the student as it changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kv_cache import codec
from kv_cache.calibration import KVCalibrator, LayerShape
from kv_cache.errors import ParetoError
from kv_cache.formats import GAIN, PLANES, RANGE_SHARE
from kv_cache.scales import KVScales
from quant_methods.calibration.calibrator import Decoder
from quant_methods.calibration.kv_codes import KINDS, LayerCodes
from quant_methods.calibration.kv_observer import ATTENTION, AttentionCall, observing, unserved_kv
from quant_methods.calibration.kv_pass import calibrate, first_tokens
from quant_methods.calibration.text_source import load_tokenizer
from quant_methods.formats.grid import Grid, nearest
from quant_methods.steps import GROUP_SIZES
from quant_methods.training.tuned_model import straight

GROUP = 128


class _Rounded:
    """Takes the place of a linear layer's forward pass: multiplies by the rounded weight."""

    def __init__(self, module: nn.Linear, grid: Grid) -> None:
        self.module, self.grid = module, grid
        self.kept: Tensor | None = None
        """The rounded weight, while it does not change; None: it is rounded for each call."""

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.kept if self.kept is not None else straight(self.module.weight, self.rounded)
        return functional.linear(x, weight, self.module.bias)

    def rounded(self, weight: Tensor) -> Tensor:
        """Return a weight as its codes read."""
        return nearest(weight.float(), self.grid).to(weight.dtype)


def round_weights(model: Any, bits: int, group_size: int = GROUP) -> int:
    """Let the linear layers of a model's blocks compute with rounded weights; return how many there are.

    Parameters and their names stay what they are, so that what is saved is an ordinary checkpoint.

    Args:
        model: of transformers.
        bits: of a code.
        group_size: input channels that share a scale, or -1 for a whole row; where it does not divide a layer's width,
            the next smaller one that does, as in ``group_sizes.py``.

    Raises:
        ParetoError: no number of bits that there are codes of.

    """
    if not 2 <= bits <= 8:
        raise ParetoError(f"--weight-bits {bits} is not between 2 and 8")
    layers = [module for module in model.get_decoder().modules() if isinstance(module, nn.Linear)]
    for module in layers:
        fitting = next((s for s in GROUP_SIZES if s <= group_size and module.in_features % s == 0), -1)
        module.forward = _Rounded(module, Grid(bits, fitting, symmetric=False))
    return len(layers)


@contextlib.contextmanager
def rounded_once(model: Any) -> Iterator[None]:
    """Round weights once for all that a model computes inside the context, in which they do not change.

    A student that writes computes with every weight for each token; rounded ones take as much memory as the weights.
    """
    found = [module.forward for module in model.modules() if isinstance(module.forward, _Rounded)]
    try:
        for one in found:
            with torch.no_grad():
                one.kept = one.rounded(one.module.weight)
        yield
    finally:
        for one in found:
            one.kept = None


def read_back(even: Tensor, bits: int) -> Tensor:
    """Return what is read from codes of even keys or values, with gradients for both their places and their range.

    Args:
        even: float32 [..., channels]; see kv_cache/codec.py, whose arithmetic this is.
        bits: of a code.

    """
    codes, scale, zero_byte = codec.quantize(even.detach(), bits)
    if not (torch.is_grad_enabled() and even.requires_grad):
        return codec.dequantize(codes, scale, zero_byte, bits)
    gain, top = GAIN[bits], 2**bits - 1
    share = RANGE_SHARE[bits] * gain
    low, high = even.amin(-1, keepdim=True).clamp_max(0), even.amax(-1, keepdim=True).clamp_min(0)
    step = ((high - low) * (share / top)).clamp_min(1e-12)
    step = straight(step, lambda x: codec.decode_scale(scale)[..., None] * 2.0 ** (2 - bits))
    zero = straight(-low * share / step, lambda x: zero_byte.float()[..., None] * 2.0 ** (bits - 8))
    place = (gain * even / step + zero).clamp(0, top)
    return (straight(place, lambda x: codes.float()) - zero) * step


class CodedCache:
    """Lets a student's attention read its keys and values from codes; an observer of the attention hook.

    A token's own are read from codes too, which a server takes as they are: the student meets a little more error.

    Args:
        bits: of keys and of values.
        folder: of the student's checkpoint, which the first scales are calibrated on.
        tokens: int64 [sequences, length], for calibration.
        seed: of calibration.
        device: torch device.

    Raises:
        ParetoError: no such bits, or a student whose cache nobody codes.

    """

    def __init__(self, bits: tuple[int, int], folder: Path, tokens: Tensor, seed: int, device: str) -> None:
        if not set(bits) <= set(PLANES):
            raise ParetoError(f"--kv-bits {bits[0]},{bits[1]}: there are codes of {', '.join(map(str, PLANES))} bits")
        self.bits, self.tokens, self.seed = bits, tokens, seed
        decoder = Decoder(folder, device=device)
        if reason := unserved_kv(decoder.base, decoder.config):
            raise ParetoError(f"{folder}: a quantized KV cache does not serve {reason}; leave out --kv-bits")
        self.firsts = first_tokens(load_tokenizer(folder), tokens, seed)
        # Which pairs of channels a layer turns together is found out once; it does not change by training.
        scales = calibrate(decoder, folder, tokens, seed).finish()
        self.shapes = [
            None if layer is None else LayerShape(len(layer.key_mean), layer.key_mean.shape[1], layer.rotary)
            for layer in scales.layers
        ]
        self.use(scales, torch.device(device))

    def use(self, scales: KVScales, device: torch.device) -> None:
        """Code by these scales."""
        self.scales = scales
        self.codes = [None if layer is None else LayerCodes(layer, device, read_back) for layer in scales.layers]

    @torch.no_grad()
    def follow(self, model: Any) -> None:
        """Calibrate again on a model as it is now; its own attention is ``kv_observer.ATTENTION``."""
        device, was_training = next(model.parameters()).device, model.training
        calibrator = KVCalibrator(self.shapes, self.seed)
        model.eval()
        with observing(_Known(calibrator)):
            for rows in (*self.tokens.split(1), *self.firsts.split(64)):
                model.get_decoder()(input_ids=rows.to(device), use_cache=False)
        model.train(was_training)
        self.use(calibrator.finish(), device)

    def attend(self, call: AttentionCall) -> Tensor:
        """Attend to what is read."""
        codes = self.codes[call.layer]
        if codes is None:
            return call.sdpa(call.key, call.value)
        read = []
        for kind, x, bits in zip(KINDS, (call.key, call.value), self.bits, strict=True):
            with torch.autocast(x.device.type, enabled=False):
                (error,) = codes.errors(kind, x.transpose(1, 2).float(), (bits,))
            read.append(x + error.transpose(1, 2).to(x.dtype))
        return call.sdpa(*read)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Let models built with ``ATTENTION`` read from codes inside the context."""
        with observing(self):
            yield


class _Known:
    """Shows a calibrator the layers that get scales."""

    def __init__(self, calibrator: KVCalibrator) -> None:
        self.calibrator = calibrator

    def observe(self, layer: int, *tensors: Any) -> None:
        """Take a layer's tensors."""
        if self.calibrator.shapes[layer] is not None:
            self.calibrator.observe(layer, *tensors)


def observe_attention(model: Any) -> None:
    """Give a model the attention that observers see."""
    model.set_attn_implementation(ATTENTION)
