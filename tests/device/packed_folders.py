"""Tiny quantised checkpoints, and the plain ones that they stand for, by an oracle of their own.

The oracle reads each stored code out of its column's (or row's) bits as one long number, and applies the format's
formula to it: no line of it is shared with `jaxserve.quantization`. What formats do to activations is not in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.weights.safetensors import write_file

WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB, LAYERS, GROUP = 64, 4, 2, 16, 128, 96, 2, 32
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": 2,
}
MATRICES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH), "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH), "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
    "mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH), "mlp.down_proj": (WIDTH, MLP),
}
EXPERTS = 4
MOE_CONFIG = CONFIG | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
}
OF_EXPERTS = {name: shape for name, shape in MATRICES.items() if name.startswith("self_attn")} | {
    f"block_sparse_moe.experts.{index}.{name}": (WIDTH, MLP) if name == "w2" else (MLP, WIDTH)
    for index in range(EXPERTS) for name in ("w1", "w2", "w3")
}
# Dettmers et al. 2023, appendix E: the values of NormalFloat4.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)      # of the nibbles of a word, lowest first

Host = np.ndarray[Any, np.dtype[Any]]
Module = tuple[dict[str, Host], Host]       # stored tensors by suffix, and the float32 matrix
Make = Callable[[np.random.Generator, int, int], Module]


def write_folders(kind: str, folder: Path, *, has_experts: bool = False) -> tuple[Path, Path]:
    """The quantised checkpoint and the plain one, as folders under `folder`; of a Mixtral, if it has experts."""
    config, make = KINDS[kind]
    rng = np.random.default_rng(7)
    packed: dict[str, Host] = {"model.embed_tokens.weight": _floats(rng, (VOCAB, WIDTH), 0.5)}
    packed["model.norm.weight"] = np.ones(WIDTH, np.float16)
    plain = dict(packed)
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"model.layers.{layer}.{norm}.weight"
            packed[name] = plain[name] = (1 + _floats(rng, (WIDTH,), 0.1)).astype(np.float16)
        if has_experts:
            name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
            packed[name] = plain[name] = _floats(rng, (EXPERTS, WIDTH), 0.3)
        for number, (part, (outs, ins)) in enumerate((OF_EXPERTS if has_experts else MATRICES).items()):
            module = f"model.layers.{layer}.{part}"
            stored, values = make(np.random.default_rng([number, outs, layer]), outs, ins)
            packed |= {f"{module}.{suffix}": np.ascontiguousarray(array) for suffix, array in stored.items()}
            plain[f"{module}.weight"] = values.astype(np.float32)
    found = []
    for name, tensors, extra in (("packed", packed, {"quantization_config": config}), ("plain", plain, {})):
        into = folder / name
        into.mkdir(parents=True)
        write_file(into / "model.safetensors", tensors)
        (into / "config.json").write_text(json.dumps({**(MOE_CONFIG if has_experts else CONFIG), **extra}))
        found.append(into)
    return found[0], found[1]


def _floats(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> Host:
    return (rng.standard_normal(shape) * size).astype(np.float16)


def _words(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    return rng.integers(-(2**31), 2**31, shape).astype(np.int32)


def _scales(rng: np.random.Generator, shape: tuple[int, ...], size: float, dtype: Any = np.float16) -> Host:
    return ((0.5 + rng.random(shape)) * size).astype(dtype)


def _number(words: Host) -> int:
    """A string of words as one number, the first word lowest."""
    return sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))


def _code(number: int, place: int, bits: int) -> int:
    return (number >> (place * bits)) & ((1 << bits) - 1)


def _gptq(
    *, bits: int, group: int = GROUP, version: int = 1, is_shuffled: bool = False, has_index: bool = True
) -> Make:
    def make(rng: np.random.Generator, outs: int, ins: int) -> Module:
        size = ins if group == -1 else group
        groups = ins // size
        qweight, qzeros = _words(rng, (ins * bits // 32, outs)), _words(rng, (groups, outs * bits // 32))
        scales = _scales(rng, (groups, outs), 0.3 / 2**bits)
        index = np.arange(ins, dtype=np.int32) // size
        if is_shuffled:     # q, k and v see one input, so they share an order
            index = np.random.default_rng(ins).permutation(index).astype(np.int32)
        values = np.empty((outs, ins), np.float32)
        zeros = [_number(row) for row in qzeros]
        for o in range(outs):
            column = _number(qweight[:, o])
            for i in range(ins):
                zero = _code(zeros[index[i]], o, bits)
                if version == 1:
                    zero = (zero + 1) % 2**bits
                values[o, i] = np.float32(scales[index[i], o]) * (_code(column, i, bits) - zero)
        stored = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
        return (stored | {"g_idx": index}) if has_index else stored, values

    return make


def _awq(rng: np.random.Generator, outs: int, ins: int) -> Module:
    qweight, qzeros = _words(rng, (ins, outs // 8)), _words(rng, (ins // GROUP, outs // 8))
    scales, values = _scales(rng, (ins // GROUP, outs), 0.02), np.empty((outs, ins), np.float32)
    for i, word, nibble in np.ndindex(ins, outs // 8, 8):
        o, g = 8 * word + AWQ_OUTPUTS[nibble], i // GROUP
        code, zero = (_code(int(words) & 0xFFFFFFFF, nibble, 4) for words in (qweight[i, word], qzeros[g, word]))
        values[o, i] = np.float32(scales[g, o]) * (code - zero)
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}, values


def _ct_packed(*, bits: int, is_symmetric: bool, group: int = GROUP) -> Make:
    def make(rng: np.random.Generator, outs: int, ins: int) -> Module:
        size, middle = ins if group == -1 else group, 2 ** (bits - 1)
        packed = _words(rng, (outs, ins * bits // 32))
        scale = _scales(rng, (outs, ins // size), 0.3 / 2**bits, ml_dtypes.bfloat16)
        zero_words = _words(rng, (outs * bits // 32, ins // size))
        values = np.empty((outs, ins), np.float32)
        zeros = [_number(zero_words[:, g]) for g in range(ins // size)]
        for o in range(outs):
            row = _number(packed[o])
            for i in range(ins):
                zero = 0 if is_symmetric else _code(zeros[i // size], o, bits) - middle
                values[o, i] = np.float32(scale[o, i // size]) * (_code(row, i, bits) - middle - zero)
        stored = {"weight_packed": packed, "weight_scale": scale, "weight_shape": np.array([outs, ins], np.int64)}
        return stored if is_symmetric else (stored | {"weight_zero_point": zero_words}), values

    return make


def _ct_int8(*, is_static: bool = False) -> Make:
    def make(rng: np.random.Generator, outs: int, ins: int) -> Module:
        weight, scale = rng.integers(-127, 128, (outs, ins)).astype(np.int8), _scales(rng, (outs, 1), 0.002, np.float32)
        stored = {"weight": weight, "weight_scale": scale}
        if is_static:
            stored["input_scale"] = np.array([0.03], np.float32)
        return stored, weight.astype(np.float32) * scale

    return make


def _fp8(*, scales: str, name: str, is_static: bool = False) -> Make:
    def make(rng: np.random.Generator, outs: int, ins: int) -> Module:
        weight = (rng.standard_normal((outs, ins)) * 100).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        block = {"tensor": (outs, ins), "channel": (1, ins), "block": (48, 48)}[scales]
        shape = {"tensor": (1,), "channel": (outs, 1), "block": (-(-outs // 48), -(-ins // 48))}[scales]
        scale, values = _scales(rng, shape, 0.001, np.float32), np.empty((outs, ins), np.float32)
        for o, i in np.ndindex(outs, ins):
            at = (0,) if scales == "tensor" else (o // block[0], i // block[1])
            values[o, i] = np.float32(weight[o, i]) * scale[at]
        stored = {"weight": weight, name: scale}
        if is_static:
            stored["input_scale"] = np.array([0.01], np.float32)
        return stored, values

    return make


def _squeezellm(*, bits: int, is_sparse: bool = False) -> Make:
    def make(rng: np.random.Generator, outs: int, ins: int) -> Module:
        qweight, table = _words(rng, (ins * bits // 32, outs)), rng.standard_normal((outs, 2**bits)).astype(np.float32)
        table *= 0.1
        values = np.empty((outs, ins), np.float32)
        for o in range(outs):
            column = _number(qweight[:, o])
            values[o] = [table[o, _code(column, i, bits)] for i in range(ins)]
        stored = {"qweight": qweight, "lookup_table": table}
        if not is_sparse:
            return stored, values
        counts = rng.integers(0, 3, outs)
        stored["rows"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        stored["cols"] = np.concatenate([rng.permutation(ins)[:count] for count in counts]).astype(np.int32)
        stored["vals"] = rng.standard_normal(counts.sum()).astype(np.float32)
        for o in range(outs):
            for n in range(stored["rows"][o], stored["rows"][o + 1]):
                values[o, stored["cols"][n]] += stored["vals"][n]
        return stored, values

    return make


def _nf4(rng: np.random.Generator, outs: int, ins: int) -> Module:
    """Scales in 8 bits themselves; blocks of 64 elements, 256 blocks to a scale of scales."""
    weight, count = rng.integers(0, 256, (outs * ins // 2, 1)).astype(np.uint8), outs * ins // 64
    nested_map = np.sort(rng.random(256)).astype(np.float32)
    absmax = rng.integers(0, 256, count).astype(np.uint8)
    nested_absmax = _scales(rng, (-(-count // 256),), 0.1, np.float32)
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [outs, ins], "nested_blocksize": 256,
        "nested_dtype": "float32", "nested_offset": 0.05,
    }
    values = np.empty(outs * ins, np.float32)
    for n in range(outs * ins):
        code = int(weight[n // 2, 0]) >> (0 if n % 2 else 4) & 15
        block = n // 64
        values[n] = np.float32(NF4[code]) * (nested_map[absmax[block]] * nested_absmax[block // 256] + np.float32(0.05))
    return {
        "weight": weight, "weight.absmax": absmax, "weight.quant_map": np.array(NF4, np.float32),
        "weight.nested_absmax": nested_absmax, "weight.nested_quant_map": nested_map,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }, values.reshape(outs, ins)


def _llm_int8(rng: np.random.Generator, outs: int, ins: int) -> Module:
    weight, scale = rng.integers(-127, 128, (outs, ins)).astype(np.int8), _scales(rng, (outs,), 0.2, np.float32)
    return {"weight": weight, "SCB": scale}, weight.astype(np.float32) * (scale[:, None] / np.float32(127))


def _ct(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group | ({"input_activations": inputs} if inputs else {})}, "ignore": ["lm_head"],
    }


def _gptq_config(bits: int, group: int = GROUP, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False, **more}


BY_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
KINDS: dict[str, tuple[dict[str, Any], Make]] = {
    "gptq-4bit": (_gptq_config(4), _gptq(bits=4)),
    "gptq-8bit": (_gptq_config(8), _gptq(bits=8)),
    "gptq-3bit": (_gptq_config(3), _gptq(bits=3)),
    "gptq-2bit": (_gptq_config(2), _gptq(bits=2)),
    "gptq-v2": (_gptq_config(4, checkpoint_format="gptq_v2"), _gptq(bits=4, version=2)),
    "gptq-channel": (_gptq_config(4, -1), _gptq(bits=4, group=-1, has_index=False)),
    "gptq-desc_act": (_gptq_config(4, desc_act=True), _gptq(bits=4, is_shuffled=True)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, _awq),
    "ct-w4a16": (
        _ct("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}),
        _ct_packed(bits=4, is_symmetric=True),
    ),
    "ct-w4a16-asym": (
        _ct("pack-quantized", {
            "num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": False
        }), _ct_packed(bits=4, is_symmetric=False),
    ),
    "ct-w8a16": (
        _ct("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        _ct_packed(bits=8, is_symmetric=True, group=-1),
    ),
    "ct-w8a8": (_ct("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, BY_TOKEN), _ct_int8()),
    "ct-w8a8-static": (
        _ct(
            "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"},
            {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True},
        ), _ct_int8(is_static=True),
    ),
    "ct-int8-weights": (_ct("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}), _ct_int8()),
    "ct-fp8": (
        _ct(
            "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, BY_TOKEN | {"type": "float"}
        ), _fp8(scales="channel", name="weight_scale"),
    ),
    "ct-fp8-static": (
        _ct(
            "float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"},
            {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
        ), _fp8(scales="tensor", name="weight_scale", is_static=True),
    ),
    "fp8-block": (
        {"quant_method": "fp8", "weight_block_size": [48, 48], "activation_scheme": "dynamic", "fmt": "e4m3"},
        _fp8(scales="block", name="weight_scale_inv"),
    ),
    "squeezellm-4bit": ({"quant_method": "squeezellm", "wbits": 4}, _squeezellm(bits=4)),
    "squeezellm-3bit-sparse": ({"quant_method": "squeezellm", "wbits": 3}, _squeezellm(bits=3, is_sparse=True)),
    "bitsandbytes-nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, _nf4),
    "bitsandbytes-int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, _llm_int8),
    "fp8-tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        _fp8(scales="tensor", name="weight_scale", is_static=True),
    ),
}
