"""GPTQ checkpoints (AutoGPTQ, GPTQModel, auto-round's auto_gptq), 2, 3, 4 and 8 bits.

    W[o, i] = scales[g, o] · (q[i, o] − z[g, o])        g = g_idx[i], without g_idx i // group_size

qweight int32 [I · bits / 32, O]: a column is one string of I codes, lowest bits first (codes of 3 bits straddle words).
qzeros int32 [G, O · bits / 32]: the same along the outputs. Version 1 stores z − 1 (mod 2^bits), version 2
(`checkpoint_format: gptq_v2`) z itself. scales float16 [G, O]. g_idx int32 [I] is shuffled where `desc_act` was used;
rows of qweight stay in the order of the inputs. `dynamic` (GPTQModel) has other settings for some modules: the first
expression that matches the beginning of a module's name counts, "-:" before it leaves the module as it was.
Sources: Frantar et al. 2022 (the method); AutoGPTQ's and GPTQModel's file layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.core.errors import ModelError, WeightsError
from jaxserve.quantization.codes import Form, GroupCodes, Host
from jaxserve.quantization.formats.scheme import (
    WORD_BITS,
    Scheme,
    Settings,
    Stored,
    finite,
    groups,
    scale_dtype,
    tensor,
    unpack,
)

FLOATS = ("float16", "bfloat16", "float32")
# How the codes were found, by whom, and which kernels others should run.
HARMLESS = frozenset({
    "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "sym", "dataset", "tokenizer", "meta",
    "model_name_or_path", "model_file_base_name", "model_seqlen", "block_name_to_quantize", "batch_size",
    "module_name_preceding_first_block", "pad_token_id", "max_input_length", "use_exllama", "disable_exllama",
    "exllama_config", "use_cuda_fp16", "cache_block_outputs", "modules_in_block_to_quantize", "backend", "quantizer",
    "mse", "act_group_aware", "modules_to_not_convert", "lm_head", "use_triton", "hyb_act", "offload_to_disk",
    "iters", "nsamples", "seqlen", "lr", "autoround_version", "low_gpu_mem_usage", "minmax_lr", "enable_minmax_tuning",
    "enable_quanted_input", "provider", "amp", "gradient_accumulate_steps", "to_quant_block_names", "quant_block_list",
    "block_quantizer", "packing_format", "data_type", "super_bits", "super_group_size", "enable_norm_bias_tuning",
    "act_bits", "desc_act", "method", "format", "quant_format", "static_kv_granularity", "static_attention_granularity",
})


BITS = (4, 8, 3, 2)
# Of a rule of `dynamic`: what else can be said of a module.
HARMLESS_OF_RULES = frozenset({"sym", "desc_act", "damp_percent", "mse", "act_group_aware", "damp_auto_increment"})
LEFT_OUT, TAKEN_IN = "-:", "+:"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """The settings of modules whose names begin as an expression says; None: they are not packed."""

    names: re.Pattern[str]
    settings: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class GptqScheme(Scheme):
    """One checkpoint's settings; `rules` come before `bits` and `group_size`."""

    bits: int
    group_size: int
    zero_add: int           # 1 of version 1
    rules: tuple[Rule, ...] = ()

    method = "gptq"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    marks = ("qweight",)

    @staticmethod
    def parse(config: Mapping[str, Any]) -> GptqScheme:
        """From a `quantization_config`, or the file that old checkpoints have beside config.json."""
        settings = Settings("gptq", config)
        bits, size = _sizes(settings, None, -1)
        dynamic = settings.take("dynamic", dict, {})
        version = settings.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        settings.choice("pack_dtype", ("int32",), "int32")
        settings.choice("is_marlin_format", (False,), False)
        settings.finish(HARMLESS)
        rules = tuple(_rule(name, content, bits, size) for name, content in dynamic.items())
        return GptqScheme(bits=bits, group_size=size, zero_add=1 if version == "gptq" else 0, rules=rules)

    def shape(self, module: str, stored: Stored) -> tuple[int, int]:
        bits, size = self._settings(module)
        words = tensor(module, stored, "qweight", ("int32", "uint32"), (None, None))
        outs, strings = words.shape[1], words.shape[0] * WORD_BITS
        ins = strings // bits
        count = groups(ins, size, module)
        if strings % bits or outs * bits % WORD_BITS:
            raise WeightsError(f"{module}.qweight is {list(words.shape)}, which is no whole number of {bits} bits")
        tensor(module, stored, "qzeros", ("int32", "uint32"), (count, outs * bits // WORD_BITS))
        tensor(module, stored, "scales", FLOATS, (count, outs))
        if "g_idx" in stored:
            tensor(module, stored, "g_idx", ("int32", "int64"), (ins,))
        return outs, ins

    def form(self, module: str, stored: Stored) -> Form:
        _, ins = self.shape(module, stored)
        bits, size = self._settings(module)
        group = ins // groups(ins, size, module)
        return Form(
            code="int8" if bits == 8 else "int4", group=None if group == ins else group, extra="zero",
            scale=scale_dtype(stored["scales"]), has_order=_order(module, stored, ins, size) is not None,
        )

    def codes(self, module: str, stored: Stored) -> GroupCodes:
        _, ins = self.shape(module, stored)
        bits, size = self._settings(module)
        zero_GO = unpack(stored["qzeros"], bits)
        zero_GO = (zero_GO.astype(np.int32) + self.zero_add) % (1 << bits)
        return GroupCodes(
            code_OI=unpack(stored["qweight"].T, bits), bits=bits,
            scale_OG=finite(module, "scales", stored["scales"]).T, zero_OG=zero_GO.T.astype(np.uint8),
            group_I=_order(module, stored, ins, size),
        )

    def _settings(self, module: str) -> tuple[int, int]:
        """Bits and group size."""
        for rule in self.rules:
            if rule.names.match(module):
                if rule.settings is None:
                    raise WeightsError(f"{module} is packed, but dynamic leaves it out by {rule.names.pattern!r}")
                return rule.settings
        return self.bits, self.group_size


def _sizes(settings: Settings, bits: int | None, size: int) -> tuple[int, int]:
    """Bits and group size, where nothing is said the given ones."""
    found_bits, found_size = settings.choice("bits", BITS, bits), settings.take("group_size", int, size)
    if found_size != -1 and found_size < 1:
        raise WeightsError(f"quantization_config: group_size is {found_size}; expected -1 or at least 1")
    return found_bits, found_size


def _rule(name: str, content: Any, bits: int, size: int) -> Rule:
    """An entry of `dynamic`; what it does not say is the checkpoint's."""
    expression = name.removeprefix(LEFT_OUT).removeprefix(TAKEN_IN)
    try:
        names = re.compile(expression)
    except re.error as error:
        raise ModelError(f"quantization_config: {expression!r} in dynamic is no regular expression: {error}") from error
    if name.startswith(LEFT_OUT):
        return Rule(names=names, settings=None)
    if not isinstance(content, Mapping):
        raise ModelError(f"quantization_config: {name!r} in dynamic is {content!r}; expected an object")
    settings = Settings(f"gptq's dynamic {name!r}", content)
    found = _sizes(settings, bits, size)
    settings.finish(HARMLESS_OF_RULES)
    return Rule(names=names, settings=found)


def _order(module: str, stored: Stored, ins: int, size: int) -> Host | None:
    """The group of each input, where it is not its place that says so."""
    if "g_idx" not in stored or size == -1:
        return None
    group_I, count = np.asarray(stored["g_idx"]), groups(ins, size, module)
    if group_I.min() < 0 or group_I.max() >= count:
        raise WeightsError(f"{module}.g_idx has {group_I.min()} to {group_I.max()}; groups are 0 to {count - 1}")
    if (group_I == np.arange(ins) // size).all():
        return None
    if (np.bincount(group_I, minlength=count) != size).any():
        raise WeightsError(f"{module}.g_idx has groups of other sizes than {size}")
    return group_I.astype(np.int32)
