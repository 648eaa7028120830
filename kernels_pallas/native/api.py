"""What the rest sees of the native kernels: whether they serve here, and each as a function of jax arrays.

Invariant: they serve only where the process has one device: XLA's partitioner cannot look into a native call, and would
gather what it should leave split.
"""

from __future__ import annotations

import functools
import os
import threading
from math import inf, pi, sqrt

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from kernels_pallas.native import attend, blocks, gated, host, kinds, lane_blocks, norm, packed, queries, tiles
from kernels_pallas.native.vectors import LOG2_E
from kernels_pallas.quantized import Pages, QuantizedPages
from kernels_pallas.quantized_matmul.weights import PackedWeight
from kernels_pallas.work import AttentionWork

NO_WINDOW = 1 << 30
GELU = 2 * sqrt(2 / pi)
GATES = {"silu": (1.0, 0.0), "gelu_tanh": (GELU, 0.044715 * GELU)}      # see `gated`
SHARES_MIN = 4               # of a step's attention, for each thread: they end at about the same time
INT8_INPUTS_MAX = 65_000     # products of 255 and 127, summed in int32


@functools.cache
def refusals() -> tuple[str, ...]:
    """Why no native kernel serves this process; empty where they do."""
    found = list(host.refusals())
    if jax.default_backend() != "cpu":
        found.append(f"they are for CPUs, the backend is {jax.default_backend()!r}")
    elif jax.device_count() != 1:
        found.append(f"they serve one device, there are {jax.device_count()}")
    return tuple(found)


def identity(*, is_packed: bool = False) -> str:
    """What a compiled program depends on beside its own text; registers the kernels that it may call.

    Args:
      is_packed: whether it may call those for packed weights, too.
    """
    if refusals():
        return ""
    return str(sorted(name for kernels in _sets(is_packed) for name in host.targets(kernels).values()))


def prepare(*, is_packed: bool = False) -> None:
    """Begins to compile in a thread of its own, so that who needs it later waits less."""
    if not refusals():
        threading.Thread(target=lambda: identity(is_packed=is_packed), name="compile-native", daemon=True).start()


def _sets(is_packed: bool) -> tuple[host.KernelSet, ...]:
    return ("plain", "packed") if is_packed else ("plain",)


def serves_dot(dtype: DTypeLike, width_out: int) -> bool:
    """Whether `matmul` takes weights of this type and width here."""
    return jnp.dtype(dtype) == jnp.bfloat16 and width_out >= lane_blocks.TILE and not refusals()


def has_tiles() -> bool:
    """Whether products go through AMX's tile registers, which makes many rows four times as fast."""
    return not refusals() and host.has_tiles()


def matmul(x_TI: Array, weight_OI: Array, *, rounds: bool = False) -> Array:
    """x · weightᵀ of bfloat16 in float32, [T, O]; a row gives the same bits beside any others.

    Args:
      rounds: to bfloat16 at the end.
    """
    numbers, dtype = (kinds.ROUNDED, jnp.bfloat16) if rounds else (kinds.BFLOAT16, jnp.float32)
    shape = jax.ShapeDtypeStruct((x_TI.shape[0], weight_OI.shape[0]), dtype)
    return jax.ffi.ffi_call(host.targets()[numbers.name], shape)(x_TI, weight_OI)


def serves_gated(dtype: DTypeLike, width: int, activation: str) -> bool:
    """Whether `matmul_gated` takes weights of this type and 2 x `width` outputs here."""
    return activation in GATES and serves_dot(dtype, width)


def matmul_gated(x_TI: Array, weight_OI: Array, activation: str) -> Array:
    """act(x · gateᵀ) * (x · upᵀ) in bfloat16, [T, O / 2]; rows of the weight are gate, then up.

    Products are rounded to bfloat16 first; what comes of them is computed in float32. A row gives the same bits beside
    any others.

    Args:
      activation: one of GATES.
    """
    shape = jax.ShapeDtypeStruct((x_TI.shape[0], weight_OI.shape[0] // 2), jnp.bfloat16)
    factors = jnp.array(GATES[activation], jnp.float32)
    return jax.ffi.ffi_call(host.targets()[gated.NAME], shape)(x_TI, weight_OI, factors)


def serves_norm(dtype: DTypeLike, width: int) -> bool:
    """Whether `rms_norm` takes rows of this type and width here."""
    return jnp.dtype(dtype) == jnp.bfloat16 and width % norm.STEP == 0 and not refusals()


def rms_norm(x_TD: Array, weight_D: Array, *, epsilon: float, offset: float) -> Array:
    """x / root(mean(x²) + epsilon) · (weight + offset) of bfloat16, [T, D], in float32 and rounded once."""
    settings = jnp.array([epsilon, offset], jnp.float32)
    call = jax.ffi.ffi_call(host.targets()[norm.NAME], jax.ShapeDtypeStruct(x_TD.shape, jnp.bfloat16))
    return call(x_TD, weight_D, settings)


def matmul_int8(x_TI: Array, weight_OI: Array) -> Array:
    """x · weightᵀ of int8 in int32, [T, O], exact; for sizes that `serves_int8` takes."""
    shape = jax.ShapeDtypeStruct((x_TI.shape[0], weight_OI.shape[0]), jnp.int32)
    product_TO = jax.ffi.ffi_call(host.targets("packed")[kinds.INT8.name], shape)(x_TI, weight_OI)
    if has_tiles() and x_TI.shape[1] % tiles.STEP_BYTES == 0:
        return product_TO       # tiles take both sides signed
    return product_TO - 128 * x_TI.astype(jnp.int32).sum(-1, keepdims=True)


def serves_int8(width_out: int, width_in: int) -> bool:
    """Whether `matmul_int8` takes weights of this size here."""
    return width_out >= lane_blocks.TILE and width_in <= INT8_INPUTS_MAX and not refusals()


def packed_refusals(x_TI: Array, weight: PackedWeight) -> list[str]:
    """Why `matmul_packed` cannot work with these arrays here."""
    found = list(refusals())
    (outs, ins), step = weight.shape, packed.TURN if weight.is_half else packed.TURN // 2
    if x_TI.dtype != jnp.bfloat16:
        found.append(f"rows must be bfloat16, got {x_TI.dtype}")
    if outs < lane_blocks.TILE or ins % step or weight.group_size % step:
        found.append(f"{outs} outputs of {ins} inputs in groups of {weight.group_size}: needs {lane_blocks.TILE} "
                     f"outputs, and groups of multiples of {step}")
    if _variant(weight) not in packed.VARIANTS:
        found.append(f"{weight.code} with scales of {weight.scale_OG.dtype} is not built")
    return found


def matmul_packed(x_TI: Array, weight: PackedWeight) -> Array:
    """See `kernels_pallas.quantized_matmul.api`; a row gives the same bits beside any others."""
    shape = jax.ShapeDtypeStruct((x_TI.shape[0], weight.shape[0]), jnp.float32)
    _, extra = weight.extra
    arrays = [weight.code_OC, weight.scale_OG, *([] if extra is None else [extra])]
    return jax.ffi.ffi_call(host.targets("packed")[_variant(weight).name], shape)(x_TI, *arrays)


def _variant(weight: PackedWeight) -> packed.Variant:
    name, _ = weight.extra
    return packed.Variant(code=weight.code, extra=name, scale=f"f{8 * weight.scale_OG.dtype.itemsize}")


def attention_refusals(q_TNH: Array, k_PKSH: Pages, *, soft_cap: float | None) -> list[str]:
    """Why neither attention can work with these arrays here."""
    found = list(refusals())
    if q_TNH.dtype != jnp.bfloat16:
        found.append(f"queries must be bfloat16, got {q_TNH.dtype}")
    if isinstance(k_PKSH, QuantizedPages):
        return [*found, "no quantised pages"]
    if k_PKSH.dtype not in (jnp.bfloat16, jnp.uint16):
        found.append(f"pages must hold bfloat16, got {k_PKSH.dtype}")
    if q_TNH.shape[-1] % blocks.DIM_STEP or q_TNH.shape[-1] > attend.DIM_MAX:
        found.append(f"head dimension {q_TNH.shape[-1]} is no multiple of {blocks.DIM_STEP} up to {attend.DIM_MAX}")
    if k_PKSH.shape[2] % blocks.PIECE:
        found.append(f"page size {k_PKSH.shape[2]} is no multiple of {blocks.PIECE}")
    if soft_cap is not None:
        found.append("no soft caps")
    return found


def paged_decode(
    q_TNH: Array, k_PKSH: Array, v_PKSH: Array, page_RM: Array, work: AttentionWork, *,
    scale: float, window: int | None, soft_cap: float | None, sink_N: Array | None, tokens: int = 1,
) -> Array:
    """See `kernels_pallas.paged_decode.api`."""
    assert soft_cap is None and tokens == 1, "refused before"
    size_W = (work.decode_length_W > 0).astype(jnp.int32)
    with jax.named_scope("paged_decode"):
        out_TNH = _attend(
            q_TNH, k_PKSH, v_PKSH, page_RM,
            (work.decode_token_W, work.decode_row_W, work.decode_length_W - 1, size_W), scale, window, sink_N,
            span=decode_span(size_W.shape[0], q_TNH.shape[1], k_PKSH.shape[1]),
        )
        is_decode_T = jnp.arange(q_TNH.shape[0], dtype=jnp.int32) < work.decode_count
        return jnp.where(is_decode_T[:, None, None], out_TNH, 0)


def decode_span(entries: int, heads: int, kv_heads: int) -> int:
    """Decode entries that a thread takes at a time: a batch of queries, unless that left threads without work."""
    in_batch = queries.BATCH * kv_heads // heads
    return max(1, min(in_batch, entries * kv_heads // (SHARES_MIN * len(os.sched_getaffinity(0)))))


def paged_prefill(
    q_TNH: Array, k_PKSH: Array, v_PKSH: Array, page_RM: Array, work: AttentionWork, *,
    scale: float, window: int | None, soft_cap: float | None, sink_N: Array | None,
) -> Array:
    """See `kernels_pallas.paged_prefill.api`."""
    assert soft_cap is None, "refused before"
    first = jnp.where(work.tile_count > 0, work.tile_token_W[0], q_TNH.shape[0])
    last = jnp.max(work.tile_token_W + work.tile_size_W)
    with jax.named_scope("paged_prefill"):
        out_TNH = _attend(
            q_TNH, k_PKSH, v_PKSH, page_RM,
            (work.tile_token_W, work.tile_row_W, work.tile_position_W, work.tile_size_W), scale, window, sink_N, span=1,
        )
        token_T = jnp.arange(q_TNH.shape[0], dtype=jnp.int32)
        is_tiled_T = (token_T >= first) & (token_T < last)
        return jnp.where(is_tiled_T[:, None, None], out_TNH, 0)


def _attend(
    q_TNH: Array, k_PKSH: Array, v_PKSH: Array, page_RM: Array, items: tuple[Array, Array, Array, Array],
    scale: float, window: int | None, sink_N: Array | None, *, span: int,
) -> Array:
    """bfloat16 [T, N, H]; tokens of no item hold anything.

    Args:
      items: first token, row, first position and size of each; all int32.
      span: how many items a thread takes at a time; those beside each other share what they read of the same pages.
    """
    _, N, H = q_TNH.shape
    settings = jnp.array(
        [NO_WINDOW if window is None else window, N, k_PKSH.shape[2], page_RM.shape[1], H, span], jnp.int32
    )
    sinks_N = jnp.full(N, -inf, jnp.float32) if sink_N is None else sink_N.astype(jnp.float32) * LOG2_E
    call = jax.ffi.ffi_call(host.targets()[attend.NAME], jax.ShapeDtypeStruct(q_TNH.shape, jnp.bfloat16))
    return call(q_TNH, k_PKSH, v_PKSH, page_RM, *items, settings, jnp.full(1, scale * LOG2_E, jnp.float32), sinks_N)
