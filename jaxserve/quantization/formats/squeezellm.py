"""SqueezeLLM checkpoints: codes of 3 or 4 bits into a table an output, and outliers that are kept exactly beside it.

    W[o, i] = lookup_table[o, code[o, i]] + sparse[o, i] + full[o, i]

qweight int32 [I · bits / 32, O]: a column is one string of I codes, lowest bits first, as GPTQ packs them.
lookup_table float32 [O, 2^bits], in no order. Dense-and-sparse checkpoints add a CSR matrix of float32 values: rows
int32 [O + 1], cols and vals [N]; a place in it has the code of the centroid nearest 0, which the value makes up for.
Hybrid ones add whole rows, full_rows float32 [I, X] at full_row_indices int32 [X]. startrows is for a kernel.
The settings are {"wbits": bits}, in a quant_config.json beside config.json.
Source: Kim et al. 2023 (the method); SqueezeLLM's file layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.core.errors import WeightsError
from jaxserve.quantization.codes import Form, Host, TableCodes
from jaxserve.quantization.formats.scheme import WORD_BITS, Scheme, Settings, Stored, finite, tensor, unpack

FLOATS = ("float32", "float16", "bfloat16")
INTEGERS = ("int32", "int64")


@dataclass(frozen=True, kw_only=True, slots=True)
class SqueezeLlmScheme(Scheme):
    """One checkpoint's settings."""

    bits: int

    method = "squeezellm"
    suffixes = ("qweight", "lookup_table", "rows", "cols", "vals", "full_rows", "full_row_indices", "startrows")
    marks = ("qweight",)

    @staticmethod
    def parse(config: Mapping[str, Any]) -> SqueezeLlmScheme:
        """From a quant_config.json."""
        settings = Settings("squeezellm", config)
        bits = settings.choice("wbits", (4, 3))
        settings.finish(frozenset())
        return SqueezeLlmScheme(bits=bits)

    def shape(self, module: str, stored: Stored) -> tuple[int, int]:
        words = tensor(module, stored, "qweight", ("int32", "uint32"), (None, None))
        strings, outs = words.shape[0] * WORD_BITS, words.shape[1]
        ins = strings // self.bits
        if strings % self.bits:
            raise WeightsError(f"{module}.qweight is {list(words.shape)}, which is no whole number of {self.bits} bits")
        tensor(module, stored, "lookup_table", FLOATS, (outs, 1 << self.bits))
        if "rows" in stored:
            tensor(module, stored, "rows", INTEGERS, (outs + 1,))
            (count,) = tensor(module, stored, "vals", FLOATS, (None,)).shape
            tensor(module, stored, "cols", INTEGERS, (count,))
        if "full_rows" in stored:
            full = tensor(module, stored, "full_rows", FLOATS, (ins, None))
            tensor(module, stored, "full_row_indices", INTEGERS, (full.shape[1],))
        return outs, ins

    def form(self, module: str, stored: Stored) -> Form:
        self.shape(module, stored)
        count = sum(int(stored[name].size) for name in ("vals", "full_rows") if name in stored)
        return Form(code="lut4", extra="table", sparse_count=count)

    def codes(self, module: str, stored: Stored) -> TableCodes:
        outs, ins = self.shape(module, stored)
        parts = []
        if "rows" in stored:
            parts.append(_sparse(module, stored, (outs, ins)))
        if "full_rows" in stored:
            parts.append(_full(module, stored, (outs, ins)))
        places = tuple(np.concatenate(of_parts) for of_parts in zip(*parts, strict=True)) or (None, None, None)
        is_sparse = places[0] is not None and len(places[0]) > 0
        return TableCodes(
            code_OI=unpack(stored["qweight"].T, self.bits),
            table_ET=finite(module, "lookup_table", stored["lookup_table"]).astype(np.float32),
            scale_OG=np.ones((outs, 1), np.float32),
            row_N=places[0] if is_sparse else None, column_N=places[1] if is_sparse else None,
            value_N=places[2] if is_sparse else None,
        )


def _sparse(module: str, stored: Stored, shape: tuple[int, int]) -> tuple[Host, Host, Host]:
    """Rows, columns and values of the CSR matrix."""
    starts, (outs, ins) = np.asarray(stored["rows"]).astype(np.int64), shape
    value_N = finite(module, "vals", stored["vals"]).astype(np.float32)
    if starts[0] != 0 or starts[-1] != len(value_N) or (np.diff(starts) < 0).any():
        raise WeightsError(f"{module}.rows must rise from 0 to {len(value_N)}, the number of {module}.vals")
    return np.repeat(np.arange(outs, dtype=np.int32), np.diff(starts)), _places(module, stored, "cols", ins), value_N


def _full(module: str, stored: Stored, shape: tuple[int, int]) -> tuple[Host, Host, Host]:
    """The same of the rows that are kept whole."""
    outs, ins = shape
    row_X = _places(module, stored, "full_row_indices", outs)
    value_XI = finite(module, "full_rows", stored["full_rows"]).astype(np.float32).T
    return np.repeat(row_X, ins), np.tile(np.arange(ins, dtype=np.int32), len(row_X)), value_XI.reshape(-1)


def _places(module: str, stored: Stored, name: str, bound: int) -> Host:
    """Indices below a bound."""
    found = np.asarray(stored[name])
    if found.size and (found.min() < 0 or found.max() >= bound):
        raise WeightsError(f"{module}.{name} has {found.min()} to {found.max()}; expected 0 to {bound - 1}")
    return found.astype(np.int32)
