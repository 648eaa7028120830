"""bitsandbytes checkpoints: NF4 and FP4 in blocks, their scales themselves in 8 bits where asked; LLM.int8's weights.

4 bits   W = quant_map[code] · absmax[block]: the matrix [O, I] is one run of elements, cut into blocks of `blocksize`
         whatever its rows; weight uint8 [O · I / 2, 1] (or the same bytes as another dtype) has the first of two
         elements in the upper half. weight.absmax float32 [blocks], or, quantised once more, uint8:
         absmax = nested_quant_map[code] · nested_absmax[block // nested_blocksize] + nested_offset.
         Sizes and offsets are JSON in weight.quant_state.bitsandbytes__nf4 (or __fp4), as uint8.
8 bits   W = weight · SCB / 127: weight int8 [O, I], SCB float32 [O].

LLM.int8 rounds activations to 8 bits but for outliers above a threshold, which it takes as they are; here all are taken
as they are. Blocks that straddle rows are cut at the rows' ends: groups are as long as blocks and rows allow.
Sources: Dettmers et al. 2022, 2023 (the methods); bitsandbytes' file layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.core.errors import UnsupportedModelError, WeightsError
from jaxserve.quantization.codes import Codes, Form, GroupCodes, Host, TableCodes
from jaxserve.quantization.formats.scheme import Scheme, Settings, Stored, finite, tensor

STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
STORAGES = ("uint8", "bfloat16", "float16", "float32")
NESTED_MAP = 256
INT8_MAX = 127
INT8_MIDDLE = 128
# How activations are computed with, what is not packed, where a GPU's memory ends: nothing about what is stored.
HARMLESS = frozenset({
    "bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage",
    "llm_int8_skip_modules", "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload", "load_in_4bit", "load_in_8bit",
    "_load_in_4bit", "_load_in_8bit", "unsloth_fixed",
})


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """What quant_state says of one matrix."""

    shape: tuple[int, int]
    block: int
    nested_block: int
    nested_offset: float

    @property
    def blocks(self) -> int:
        return -(-self.shape[0] * self.shape[1] // self.block)

    @property
    def group(self) -> int:
        """Elements of one row that share a scale."""
        return math.gcd(self.block, self.shape[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class BitsAndBytesScheme(Scheme):
    """Nothing but tensors says how a matrix is stored."""

    method = "bitsandbytes"
    suffixes = (
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *STATES,
        "SCB", "weight_format",
    )
    marks = ("weight.absmax", "SCB")

    @staticmethod
    def parse(config: Mapping[str, Any]) -> BitsAndBytesScheme:
        """From a `quantization_config`."""
        settings = Settings("bitsandbytes", config)
        settings.choice("llm_int8_has_fp16_weight", (False,), False)
        settings.finish(HARMLESS)
        return BitsAndBytesScheme()

    def shape(self, module: str, stored: Stored) -> tuple[int, int]:
        if "SCB" in stored:
            outs, ins = tensor(module, stored, "weight", ("int8",), (None, None)).shape
            tensor(module, stored, "SCB", ("float32",), (outs,))
            if "weight_format" in stored and int(np.asarray(stored["weight_format"]).reshape(-1)[0]) != 0:
                raise UnsupportedModelError(
                    f"{module}.weight_format is {stored['weight_format']}; only 0, rows after one another, is supported"
                )
            return outs, ins
        state = _state(module, stored)
        outs, ins = state.shape
        weight = tensor(module, stored, "weight", STORAGES, (None,) * np.ndim(stored.get("weight")))
        if weight.nbytes != (size := -(-outs * ins // 2)):
            raise WeightsError(f"{module}.weight has {weight.nbytes} bytes; {outs} x {ins} codes of 4 bits have {size}")
        tensor(module, stored, "weight.quant_map", ("float32",), (16,))
        absmax = tensor(module, stored, "weight.absmax", ("float32", "uint8"), (state.blocks,))
        if absmax.dtype == np.uint8:
            tensor(module, stored, "weight.nested_quant_map", ("float32",), (NESTED_MAP,))
            tensor(module, stored, "weight.nested_absmax", ("float32",), (-(-state.blocks // state.nested_block),))
        return outs, ins

    def form(self, module: str, stored: Stored) -> Form:
        _, ins = self.shape(module, stored)
        if "SCB" in stored:
            return Form(code="int8", extra="zero")
        group = _state(module, stored).group
        return Form(code="lut4", group=None if group == ins else group, extra="shared table")

    def codes(self, module: str, stored: Stored) -> Codes:
        outs, ins = self.shape(module, stored)
        if "SCB" in stored:
            scale_OG = finite(module, "SCB", stored["SCB"]).reshape(outs, 1) / np.float32(INT8_MAX)
            # Adding 128 to a signed byte turns its uppermost bit.
            return GroupCodes(
                code_OI=np.ascontiguousarray(stored["weight"]).view(np.uint8) ^ np.uint8(INT8_MIDDLE), bits=8,
                scale_OG=scale_OG, zero_OG=np.full((outs, 1), INT8_MIDDLE, np.uint8),
            )
        state = _state(module, stored)
        raw = np.ascontiguousarray(stored["weight"]).view(np.uint8).reshape(-1)
        code = np.empty((len(raw), 2), np.uint8)
        np.right_shift(raw, 4, out=code[:, 0])
        np.bitwise_and(raw, 15, out=code[:, 1])
        block_OG = np.arange(0, outs * ins, state.group) // state.block
        return TableCodes(
            code_OI=code.reshape(-1)[: outs * ins].reshape(outs, ins),
            table_ET=finite(module, "weight.quant_map", stored["weight.quant_map"]).reshape(1, -1),
            scale_OG=_absmax(module, stored, state)[block_OG].reshape(outs, -1),
        )


def _absmax(module: str, stored: Stored, state: _State) -> Host:
    """The scale of each block, float32."""
    absmax = np.asarray(stored["weight.absmax"])
    if absmax.dtype == np.float32:
        return finite(module, "weight.absmax", absmax)
    value = finite(module, "weight.nested_quant_map", stored["weight.nested_quant_map"])[absmax]
    outer = finite(module, "weight.nested_absmax", stored["weight.nested_absmax"])
    return value * outer[np.arange(state.blocks) // state.nested_block] + np.float32(state.nested_offset)


def _state(module: str, stored: Stored) -> _State:
    """The JSON beside a matrix. Raises WeightsError."""
    name = next((name for name in STATES if name in stored), STATES[0])
    raw = tensor(module, stored, name, ("uint8",), (None,))
    try:
        content = json.loads(raw.tobytes())
        shape, block = content["shape"], content["blocksize"]
        nested, offset = content.get("nested_blocksize", 0), float(content.get("nested_offset", 0.0))
        sizes = [*shape, block, nested]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{module}.{name} is not a state of bitsandbytes: {error!r}") from error
    is_nested = stored.get("weight.absmax") is not None and stored["weight.absmax"].dtype == np.uint8
    if (
        len(shape) != 2 or not all(type(size) is int and size > 0 for size in (sizes if is_nested else sizes[:-1]))
        or not math.isfinite(offset)
    ):
        raise WeightsError(f"{module}.{name} has shape {shape}, blocks of {block} and {nested}, offset {offset}")
    return _State(shape=(shape[0], shape[1]), block=block, nested_block=nested, nested_offset=offset)
