"""`quant_method: mxfp4` checkpoints (gpt-oss): experts in four-bit floats, a power of two for every 32 inputs.

    W[e, o, i] = 2^(scales[e, o, i // 32] − 127) · float4_e2m1(code)

`NAME_blocks` uint8 [E, O, I / 32, 16], a byte holds two neighbours, the lower four bits first; `NAME_scales` uint8
[E, O, I / 32]. A module here is one expert. Rows of activations stay as they are.
Source: OCP Microscaling Formats 1.0 (E2M1 elements, E8M0 scales); the files of openai/gpt-oss-20b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.core.errors import WeightsError
from jaxserve.quantization.codes import Form, ShortFloatCodes
from jaxserve.quantization.formats.scheme import Scheme, Settings, Stored, tensor, unpack

BLOCK = 32
EXPONENT_MAX = 252      # 6 · 2^(253 − 127), the largest value with the next scale, is no float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Mxfp4Scheme(Scheme):
    """Nothing can be set."""

    method = "mxfp4"
    suffixes = ("blocks", "scales")
    marks = ("blocks",)
    joint = "_"
    is_of_stacks = True

    @staticmethod
    def parse(config: Mapping[str, Any]) -> Mxfp4Scheme:
        """From a `quantization_config`."""
        Settings("mxfp4", config).finish(frozenset({"modules_to_not_convert", "dequantize"}))
        return Mxfp4Scheme()

    def shape(self, module: str, stored: Stored) -> tuple[int, int]:
        outs, count, _ = tensor(module, stored, "blocks", ("uint8",), (None, None, BLOCK // 2)).shape
        tensor(module, stored, "scales", ("uint8",), (outs, count))
        return outs, count * BLOCK

    def form(self, module: str, stored: Stored) -> Form:
        return Form(code="fp4", group=BLOCK, scale="float8_e8m0fnu")

    def codes(self, module: str, stored: Stored) -> ShortFloatCodes:
        scale_OG = np.asarray(stored["scales"])
        if scale_OG.size and scale_OG.max() > EXPONENT_MAX:
            raise WeightsError(
                f"{module}_scales holds {scale_OG.max()}: NaN, or beyond float32 ({EXPONENT_MAX} at most)"
            )
        code_OI = unpack(stored["blocks"], 4).reshape(self.shape(module, stored))
        return ShortFloatCodes(code_OI=code_OI, scale_OG=scale_OG.view(ml_dtypes.float8_e8m0fnu))
