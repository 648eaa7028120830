"""`quant_method: compressed-tensors` checkpoints (llm-compressor, auto-round): packed integers, int8, 8-bit floats.

pack-quantized   weight_packed int32 [O, I · bits / 32], a row is one string of codes, lowest bits first, stored with
                 2^(bits − 1) more; weight_scale [O, G]; weight_zero_point int32 [O · bits / 32, G], packed along the
                 outputs with the same offset, where the scheme is asymmetric; weight_shape int64 [2] = [O, I].
                 W = scale · (q − z)
int-quantized    weight int8 [O, I], weight_scale [O, 1] (or one); with `input_activations` rounded to int8 by token, or
                 by a stored input_scale; without, W = scale · code meets rows as they are.
float-quantized  weight float8_e4m3fn [O, I], weight_scale one, [O, 1], or a block; also called naive-quantized.

A module's group of settings is the first whose targets name it: a class ("Linear"), a module, "re:" and an expression.
Source: the compressed-tensors package (its compressors' state dicts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.core.errors import ModelError, UnsupportedModelError, WeightsError
from jaxserve.quantization.codes import Activations, Codes, Form, GroupCodes, IntCodes
from jaxserve.quantization.formats import fp8
from jaxserve.quantization.formats.scheme import (
    WORD_BITS,
    Scheme,
    Settings,
    Stored,
    finite,
    groups,
    is_named,
    scale_dtype,
    tensor,
    unpack,
)

PACKED, INTEGER, FLOATING = "pack-quantized", "int-quantized", "float-quantized"
FLOATS = ("float16", "bfloat16", "float32")
HARMLESS = frozenset({
    "ignore", "quantization_status", "global_compression_ratio", "version", "kv_cache_scheme", "provider",
    "autoround_version", "iters", "nsamples", "seqlen", "lr", "bits", "data_type",
    "group_size", "sym", "act_bits", "act_data_type", "act_group_size", "act_sym", "act_dynamic", "packing_format",
    "batch_size", "low_gpu_mem_usage", "enable_quanted_input", "block_name_to_quantize", "gradient_accumulate_steps",
    "static_kv_granularity", "static_attention_granularity",
})


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The settings of some modules."""

    targets: tuple[str, ...]
    format: str
    bits: int
    group_size: int         # of packed integers; -1: one of all inputs
    is_symmetric: bool
    block: tuple[int, int] | None
    activations: Activations

    def covers(self, module: str) -> bool:
        """Whether a target means the module; every module that is packed is a linear layer."""
        return "Linear" in self.targets or is_named(module, self.targets)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedTensorsScheme(Scheme):
    """One checkpoint's settings."""

    groups: tuple[Group, ...]

    method = "compressed-tensors"
    suffixes = (
        "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale",
        "input_zero_point",
    )
    marks = ("weight_packed", "weight_scale")

    @staticmethod
    def parse(config: Mapping[str, Any]) -> CompressedTensorsScheme:
        """From a `quantization_config`."""
        settings = Settings("compressed-tensors", config)
        status = settings.choice("quantization_status", ("compressed", "frozen"), "compressed")
        assert status
        outer = settings.take("format", str)
        found = settings.take("config_groups", dict, {})
        sparsity = settings.take("sparsity_config", dict, {})
        Settings("compressed-tensors sparsity_config", sparsity).choice("format", ("dense",), "dense")
        settings.finish(HARMLESS)
        if not found:
            raise ModelError("quantization_config: config_groups of compressed-tensors is empty or missing")
        return CompressedTensorsScheme(groups=tuple(_group(name, group, outer) for name, group in found.items()))

    def shape(self, module: str, stored: Stored) -> tuple[int, int]:
        group = self._group(module)
        if group.format == PACKED:
            return _packed_shape(module, stored, group)
        kind = "int8" if group.format == INTEGER else fp8.FLOAT8
        outs, ins = tensor(module, stored, "weight", (kind,), (None, None)).shape
        fp8.scale_block(module, stored, "weight_scale", (outs, ins), group.block)
        return outs, ins

    def form(self, module: str, stored: Stored) -> Form:
        group, (outs, ins) = self._group(module), self.shape(module, stored)
        if group.format == PACKED:
            size = ins // groups(ins, group.group_size, module)
            return Form(
                code="int8" if group.bits == 8 else "int4", group=None if size == ins else size, extra="zero",
                scale=scale_dtype(stored["weight_scale"]),
            )
        if group.format == INTEGER:
            if group.activations == "none":
                return Form(code="int8", extra="zero", scale=scale_dtype(stored["weight_scale"]))
            return Form(code="w8a8", activations=group.activations)
        _, block = fp8.scale_block(module, stored, "weight_scale", (outs, ins), group.block)
        return Form(code="fp8", group=None if block[1] >= ins else block[1], activations=group.activations)

    def codes(self, module: str, stored: Stored) -> Codes:
        group, shape = self._group(module), self.shape(module, stored)
        if group.format == FLOATING:
            return fp8.float_codes(module, stored, "weight_scale", shape, group.block, group.activations)
        scale = finite(module, "weight_scale", stored["weight_scale"])
        middle = 1 << (group.bits - 1)
        if group.format == PACKED:
            zero_OG = np.full(scale.shape, middle, np.uint8)
            if not group.is_symmetric:
                strings_GO = np.ascontiguousarray(stored["weight_zero_point"].T)
                zero_OG = unpack(strings_GO, group.bits).T[: shape[0]]
            code_OI = unpack(stored["weight_packed"], group.bits)[:, : shape[1]]
            return GroupCodes(code_OI=code_OI, bits=group.bits, scale_OG=scale, zero_OG=zero_OG)
        code_OI, scale_O1 = np.asarray(stored["weight"]), np.broadcast_to(scale.reshape(-1, 1), (shape[0], 1))
        if group.activations == "none":
            shifted_OI = (code_OI.astype(np.int16) + middle).astype(np.uint8)
            return GroupCodes(
                code_OI=shifted_OI, bits=8, scale_OG=scale_O1, zero_OG=np.full(scale_O1.shape, middle, np.uint8)
            )
        return IntCodes(
            code_OI=code_OI, scale_O=scale_O1[:, 0].astype(np.float32), activations=group.activations,
            input_scale=fp8.input_scale(module, stored, group.activations),
        )

    def _group(self, module: str) -> Group:
        for group in self.groups:
            if group.covers(module):
                return group
        raise WeightsError(f"{module} is packed, but no target of config_groups names it")


def _packed_shape(module: str, stored: Stored, group: Group) -> tuple[int, int]:
    if "weight_g_idx" in stored:
        raise UnsupportedModelError(f"{module}.weight_g_idx: act-order of compressed-tensors is not supported")
    size = [int(part) for part in tensor(module, stored, "weight_shape", ("int64", "int32"), (2,))]
    outs, ins = size
    if outs < 1 or ins < 1:
        raise WeightsError(f"{module}.weight_shape is {size}")
    tensor(module, stored, "weight_packed", ("int32",), (outs, -(-ins * group.bits // WORD_BITS)))
    count = groups(ins, group.group_size, module)
    tensor(module, stored, "weight_scale", FLOATS, (outs, count))
    if not group.is_symmetric:
        tensor(module, stored, "weight_zero_point", ("int32",), (-(-outs * group.bits // WORD_BITS), count))
    return outs, ins


def _group(name: str, content: Any, outer: str | None) -> Group:
    """One entry of config_groups; `outer` is the format where the entry names none."""
    if not isinstance(content, Mapping):
        raise ModelError(f"quantization_config: config_groups.{name} is {content!r}; expected an object")
    entry = Settings("compressed-tensors", content)
    targets = entry.take("targets", list, [])
    weights = Settings("compressed-tensors", entry.take("weights", dict, {}))
    inputs = entry.take("input_activations", dict)
    form = entry.take("format", str) or outer
    entry.finish(frozenset())
    if form == "naive-quantized":
        form = FLOATING if content["weights"].get("type") == "float" else INTEGER
    if form not in (PACKED, INTEGER, FLOATING):
        raise UnsupportedModelError(
            f"quantization_config: format {form!r} of compressed-tensors is not supported; supported are "
            f"{PACKED}, {INTEGER}, {FLOATING}"
        )
    kind = weights.choice("type", ("float",) if form == FLOATING else ("int",), "float" if form == FLOATING else "int")
    bits = weights.choice("num_bits", (4, 8) if form == PACKED else (8,), 8)
    strategies = ("group", "channel") if form == PACKED else ("channel", "tensor", "block")
    strategy = weights.choice("strategy", strategies[:2] if form == INTEGER else strategies)
    size = weights.take("group_size", int, -1) if strategy == "group" else -1
    weights.take("group_size", int)
    block = weights.take("block_structure", list) if strategy == "block" else None
    is_symmetric = weights.take("symmetric", bool, True)
    weights.choice("dynamic", (False,), False)
    weights.choice("actorder", (None, "weight", "static"), None)
    weights.finish(frozenset({"observer", "observer_kwargs", "block_structure", "zp_dtype", "scale_dtype"}))
    if not is_symmetric and form != PACKED:
        raise UnsupportedModelError(f"quantization_config: asymmetric {form} of compressed-tensors is not supported")
    return Group(
        targets=tuple(map(str, targets)), format=form, bits=bits, group_size=size, is_symmetric=is_symmetric,
        block=None if block is None else (int(block[0]), int(block[1])), activations=_activations(inputs, kind),
    )


def _activations(content: Mapping[str, Any] | None, kind: str) -> Activations:
    """How rows are rounded before the product."""
    if not content:
        return "none"
    inputs = Settings("compressed-tensors", content)
    inputs.choice("type", (kind,), kind)
    inputs.choice("num_bits", (8,), 8)
    inputs.choice("symmetric", (True,), True)
    is_dynamic = inputs.take("dynamic", bool, False)
    strategies = ("token", "group") if is_dynamic else ("tensor",)
    strategy = inputs.choice("strategy", strategies, strategies[0])
    inputs.take("group_size", int)
    inputs.finish(frozenset({"observer", "observer_kwargs", "zp_dtype", "scale_dtype", "block_structure", "actorder"}))
    return strategy if is_dynamic else "static"
