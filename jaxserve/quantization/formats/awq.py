"""AWQ checkpoints in the "gemm" layout (AutoAWQ, auto-round's auto_awq), 4 bits.

    W[o, i] = scales[g, o] · (q[i, o] − z[g, o])        g = i // group_size

qweight int32 [I, O / 8] and qzeros int32 [G, O / 8]: nibble k of a word holds output 8 · word + ORDER[k], lowest bits
first. scales float16 [G, O]. Symmetric checkpoints (`zero_point: false`) store zeros of 8.
Source: Lin et al. 2023 (the method); AutoAWQ's file layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.core.errors import WeightsError
from jaxserve.quantization.codes import Form, GroupCodes, Host
from jaxserve.quantization.formats.gptq import FLOATS
from jaxserve.quantization.formats.gptq import HARMLESS as OF_GPTQ
from jaxserve.quantization.formats.scheme import (
    Scheme,
    Settings,
    Stored,
    finite,
    groups,
    scale_dtype,
    tensor,
    unpack,
)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLACES = tuple(int(place) for place in np.argsort(ORDER))      # where output k of eight lies
BITS = 4
# What says how the codes were found, and which kernels others should run.
HARMLESS = OF_GPTQ | {"zero_point", "do_fuse", "fuse_max_seq_len", "modules_to_fuse"}


@dataclass(frozen=True, kw_only=True, slots=True)
class AwqScheme(Scheme):
    """One checkpoint's settings."""

    group_size: int

    method = "awq"
    suffixes = ("qweight", "qzeros", "scales")
    marks = ("qweight",)

    @staticmethod
    def parse(config: Mapping[str, Any]) -> AwqScheme:
        """From a `quantization_config`, or from AutoAWQ's quant_config.json with its older names."""
        settings = Settings("awq", config)
        settings.choice("w_bit" if "w_bit" in config else "bits", (BITS,), BITS)
        size = settings.take("q_group_size" if "q_group_size" in config else "group_size", int, -1)
        version = settings.take("version", str, "gemm").lower()
        Settings("awq", {"version": version}).choice("version", ("gemm",))
        settings.finish(HARMLESS)
        if size != -1 and size < 1:
            raise WeightsError(f"quantization_config: group_size is {size}; expected -1 or at least 1")
        return AwqScheme(group_size=size)

    def shape(self, module: str, stored: Stored) -> tuple[int, int]:
        ins, words = tensor(module, stored, "qweight", ("int32", "uint32"), (None, None)).shape
        count = groups(ins, self.group_size, module)
        tensor(module, stored, "qzeros", ("int32", "uint32"), (count, words))
        tensor(module, stored, "scales", FLOATS, (count, words * len(ORDER)))
        return words * len(ORDER), ins

    def form(self, module: str, stored: Stored) -> Form:
        _, ins = self.shape(module, stored)
        group = ins // groups(ins, self.group_size, module)
        return Form(
            code="int4", group=None if group == ins else group, extra="zero", scale=scale_dtype(stored["scales"])
        )

    def codes(self, module: str, stored: Stored) -> GroupCodes:
        self.shape(module, stored)
        return GroupCodes(
            code_OI=np.ascontiguousarray(_in_order(stored["qweight"]).T), bits=BITS,
            scale_OG=finite(module, "scales", stored["scales"]).T, zero_OG=_in_order(stored["qzeros"]).T,
        )


def _in_order(words: Host) -> Host:
    """Codes [rows, O] of words [rows, O / 8]."""
    eights = unpack(words, BITS).reshape(len(words), -1, len(ORDER))
    return eights[:, :, PLACES].reshape(len(words), -1)
