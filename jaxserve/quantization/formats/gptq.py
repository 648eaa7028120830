"""GPTQ checkpoints (AutoGPTQ, GPTQModel, auto-round's auto_gptq), 2, 3, 4 and 8 bits.

    W[o, i] = scales[g, o] · (q[i, o] − z[g, o])        g = g_idx[i], without g_idx i // group_size

qweight int32 [I · bits / 32, O]: a column is one string of I codes, lowest bits first (codes of 3 bits straddle words).
qzeros int32 [G, O · bits / 32]: the same along the outputs. Version 1 stores z − 1 (mod 2^bits), version 2
(`checkpoint_format: gptq_v2`) z itself. scales float16 [G, O]. g_idx int32 [I] is shuffled where `desc_act` was used;
rows of qweight stay in the order of the inputs.
Sources: Frantar et al. 2022 (the method); AutoGPTQ's and GPTQModel's file layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.core.errors import WeightsError
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
    "act_bits", "desc_act", "method", "format", "quant_format",
})


@dataclass(frozen=True, kw_only=True, slots=True)
class GptqScheme(Scheme):
    """One checkpoint's settings."""

    bits: int
    group_size: int
    zero_add: int           # 1 of version 1

    method = "gptq"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    marks = ("qweight",)

    @staticmethod
    def parse(config: Mapping[str, Any]) -> GptqScheme:
        """From a `quantization_config`, or the file that old checkpoints have beside config.json."""
        settings = Settings("gptq", config)
        bits = settings.choice("bits", (4, 8, 3, 2))
        size = settings.take("group_size", int, -1)
        version = settings.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        settings.choice("pack_dtype", ("int32",), "int32")
        settings.choice("is_marlin_format", (False,), False)
        settings.finish(HARMLESS)
        if size != -1 and size < 1:
            raise WeightsError(f"quantization_config: group_size is {size}; expected -1 or at least 1")
        return GptqScheme(bits=bits, group_size=size, zero_add=1 if version == "gptq" else 0)

    def shape(self, module: str, stored: Stored) -> tuple[int, int]:
        words = tensor(module, stored, "qweight", ("int32", "uint32"), (None, None))
        outs, strings = words.shape[1], words.shape[0] * WORD_BITS
        ins = strings // self.bits
        count = groups(ins, self.group_size, module)
        if strings % self.bits or outs * self.bits % WORD_BITS:
            raise WeightsError(f"{module}.qweight is {list(words.shape)}, which is no whole number of {self.bits} bits")
        tensor(module, stored, "qzeros", ("int32", "uint32"), (count, outs * self.bits // WORD_BITS))
        tensor(module, stored, "scales", FLOATS, (count, outs))
        if "g_idx" in stored:
            tensor(module, stored, "g_idx", ("int32", "int64"), (ins,))
        return outs, ins

    def form(self, module: str, stored: Stored) -> Form:
        _, ins = self.shape(module, stored)
        group = ins // groups(ins, self.group_size, module)
        return Form(
            code="int8" if self.bits == 8 else "int4", group=None if group == ins else group, extra="zero",
            scale=scale_dtype(stored["scales"]), has_order=self._order(module, stored, ins) is not None,
        )

    def codes(self, module: str, stored: Stored) -> GroupCodes:
        _, ins = self.shape(module, stored)
        zero_GO = unpack(stored["qzeros"], self.bits)
        zero_GO = (zero_GO.astype(np.int32) + self.zero_add) % (1 << self.bits)
        return GroupCodes(
            code_OI=unpack(stored["qweight"].T, self.bits), bits=self.bits,
            scale_OG=finite(module, "scales", stored["scales"]).T, zero_OG=zero_GO.T.astype(np.uint8),
            group_I=self._order(module, stored, ins),
        )

    def _order(self, module: str, stored: Stored, ins: int) -> Host | None:
        """The group of each input, where it is not its place that says so."""
        if "g_idx" not in stored or self.group_size == -1:
            return None
        group_I, count = np.asarray(stored["g_idx"]), groups(ins, self.group_size, module)
        if group_I.min() < 0 or group_I.max() >= count:
            raise WeightsError(f"{module}.g_idx has {group_I.min()} to {group_I.max()}; groups are 0 to {count - 1}")
        if (group_I == np.arange(ins) // self.group_size).all():
            return None
        if (np.bincount(group_I, minlength=count) != self.group_size).any():
            raise WeightsError(f"{module}.g_idx has groups of other sizes than {self.group_size}")
        return group_I.astype(np.int32)
