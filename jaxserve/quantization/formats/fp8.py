"""`quant_method: fp8` checkpoints: 8-bit floats with one scale a matrix, an output, or a block (DeepSeek, Qwen3-FP8).

    W[o, i] = scale[a, b] · float8_e4m3fn(weight[o, i])        a = o // block rows, b = i // block columns

`weight` float8_e4m3fn [O, I]; `weight_scale_inv` of blocks (multiplied, whatever its name says), `weight_scale` of
matrices ([] or [1]) and outputs ([O] or [O, 1]). Activations are rounded to the same floats by token, by blocks of one
token (`weight_block_size`), or by a stored `input_scale` (`activation_scheme: static`).
Sources: DeepSeek-V3's model repository (inference/kernel.py's layout); vLLM's fp8 checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.core.errors import UnsupportedModelError, WeightsError
from jaxserve.quantization.codes import Activations, FloatCodes, Form, Host
from jaxserve.quantization.formats.scheme import Scheme, Settings, Stored, finite, tensor

FLOAT8 = "float8_e4m3fn"
FLOATS = ("float32", "bfloat16", "float16")
NAN = 0x7F      # of e4m3, in either sign
HARMLESS = frozenset({
    "modules_to_not_convert", "ignored_layers", "fmt", "scale_fmt", "dequantize", "kv_cache_scheme",
    "weight_per_tensor", "act_per_tensor",
})


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Scheme(Scheme):
    """One checkpoint's settings."""

    block: tuple[int, int] | None
    activations: Activations

    method = "fp8"
    suffixes = ("weight", "weight_scale_inv", "weight_scale", "input_scale")
    marks = ("weight_scale_inv", "weight_scale")

    @staticmethod
    def parse(config: Mapping[str, Any]) -> Fp8Scheme:
        """From a `quantization_config`."""
        settings = Settings("fp8", config)
        kind = settings.choice("activation_scheme", ("dynamic", "static"), "dynamic")
        size = settings.take("weight_block_size", list)
        if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise UnsupportedModelError(f"quantization_config: fmt {config['fmt']!r} of fp8; only 'e4m3' is supported")
        settings.finish(HARMLESS)
        if size is not None and (len(size) != 2 or not all(isinstance(part, int) and part > 0 for part in size)):
            raise UnsupportedModelError(f"quantization_config: weight_block_size is {size}; expected two sizes")
        return Fp8Scheme(
            block=None if size is None else (size[0], size[1]),
            activations="static" if kind == "static" else "token" if size is None else "group",
        )

    def shape(self, module: str, stored: Stored) -> tuple[int, int]:
        outs, ins = tensor(module, stored, "weight", (FLOAT8,), (None, None)).shape
        scale_block(module, stored, self._name(stored), (outs, ins), self.block)
        return outs, ins

    def form(self, module: str, stored: Stored) -> Form:
        shape = self.shape(module, stored)
        block = scale_block(module, stored, self._name(stored), shape, self.block)[1]
        return Form(code="fp8", group=None if block[1] >= shape[1] else block[1], activations=self.activations)

    def codes(self, module: str, stored: Stored) -> FloatCodes:
        return float_codes(module, stored, self._name(stored), self.shape(module, stored), self.block, self.activations)

    def _name(self, stored: Stored) -> str:
        return "weight_scale_inv" if "weight_scale_inv" in stored else "weight_scale"


def scale_block(
    module: str, stored: Stored, name: str, shape: tuple[int, int], block: tuple[int, int] | None
) -> tuple[Host, tuple[int, int]]:
    """The scales as [rows of blocks, columns of blocks], and the block's size."""
    outs, ins = shape
    scale = tensor(module, stored, name, FLOATS, (None,) * np.ndim(stored.get(name)))
    if block is not None:
        wanted = (-(-outs // block[0]), -(-ins // block[1]))
        return tensor(module, stored, name, FLOATS, wanted), block
    if scale.size == 1:
        return scale.reshape(1, 1), (outs, ins)
    if scale.shape in ((outs,), (outs, 1)):
        return scale.reshape(outs, 1), (1, ins)
    raise WeightsError(f"{module}.{name} is {list(scale.shape)}; expected one, or one of {outs} outputs")


def float_codes(
    module: str, stored: Stored, name: str, shape: tuple[int, int], block: tuple[int, int] | None,
    activations: Activations,
) -> FloatCodes:
    """Codes of a checked module whose scales are called `name`."""
    scale_AB, block = scale_block(module, stored, name, shape, block)
    bits_OI = np.asarray(stored["weight"]).view(np.uint8)
    if ((bits_OI & NAN) == NAN).any():
        raise WeightsError(f"{module}.weight holds NaN")
    return FloatCodes(
        bits_OI=bits_OI, scale_AB=finite(module, name, scale_AB).astype(np.float32), block=block,
        activations=activations, input_scale=input_scale(module, stored, activations),
    )


def input_scale(module: str, stored: Stored, activations: Activations) -> float | None:
    """The stored scale of activations, where they are rounded by one."""
    if activations != "static":
        return None
    if "input_scale" not in stored or np.size(stored["input_scale"]) != 1:
        raise WeightsError(f"{module}.input_scale must be one number: activations are rounded by it (static)")
    value = float(np.asarray(stored["input_scale"]).reshape(()))
    if not np.isfinite(value) or value <= 0:
        raise WeightsError(f"{module}.input_scale is {value}; expected a positive number")
    return value
