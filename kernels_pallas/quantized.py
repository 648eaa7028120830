"""Keys and values in eight bits: codes and a scale a token and head, which stand beside each other in the pool.

Knows how numbers become codes and what a pair of pools looks like; knows no row, no query and no implementation.
A scale belongs to one slot and head, so a token is quantised when it is written and never again, and attention needs
no dequantised copy: scales of keys multiply scores, scales of values multiply weights.
Invariant: code * scale differs from the number by at most half a step of the code; a token that is not finite has a
scale that is not finite, so a sick sequence is noticed behind integer codes too.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

FP8 = "float8_e4m3fn"
FP8_BITS = "uint8"     # bits of FP8: the CPU backend copies the whole operand of a scatter of 8-bit floats, twice
CODES = {"int8": 127.0, FP8: 448.0, FP8_BITS: 448.0}     # dtype -> the largest number it stands for
SCALES = (jnp.float32, jnp.bfloat16)


class QuantizedPages(NamedTuple):
    """A pool in eight bits; takes the place of a `[P, K, S, H]` array in every op."""

    code_PKSH: Array
    scale_PKS: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes, which is what an unquantised pool would have."""
        return self.code_PKSH.shape

    @property
    def ndim(self) -> int:
        return self.code_PKSH.ndim


Pages = Array | QuantizedPages


def violations(pages: QuantizedPages) -> list[str]:
    """What is wrong with the dtypes and shapes of a quantised pool."""
    code, scale = pages
    found = []
    if code.dtype.name not in CODES:
        found.append(f"codes must be one of {', '.join(CODES)}, got {code.dtype}")
    if scale.dtype not in SCALES:
        found.append(f"scales must be float32 or bfloat16, got {scale.dtype}")
    if scale.shape != code.shape[:3]:
        found.append(f"scales must be one a slot and head, {code.shape[:3]}, got {scale.shape}")
    return found


def quantize(x_TKH: Array, code_dtype: DTypeLike, scale_dtype: DTypeLike) -> tuple[Array, Array]:
    """Codes [T, K, H] and scales [T, K] of tokens; the largest number of a token and head has the largest code."""
    code_dtype = jnp.dtype(code_dtype).name
    largest = CODES[code_dtype]
    x_TKH = x_TKH.astype(jnp.float32)
    # The stored scale is the divisor: what a narrow dtype rounds away is rounded before the codes are made.
    scale_TK = (jnp.abs(x_TKH).max(-1) / largest).astype(scale_dtype)
    divisor_TK1 = scale_TK.astype(jnp.float32)[..., None]
    code_TKH = jnp.clip(x_TKH / jnp.where(divisor_TK1 > 0, divisor_TK1, 1.0), -largest, largest)
    if code_dtype == FP8_BITS:
        return jax.lax.bitcast_convert_type(code_TKH.astype(FP8), FP8_BITS), scale_TK
    if code_dtype == "int8":
        code_TKH = jnp.round(code_TKH)
    return code_TKH.astype(code_dtype), scale_TK


def code_numbers(codes: Array, dtype: DTypeLike) -> Array:
    """What codes are without their scales; exact in every float of 16 bits or more."""
    return (jax.lax.bitcast_convert_type(codes, FP8) if codes.dtype == FP8_BITS else codes).astype(dtype)


def dequantize(pages: QuantizedPages) -> Array:
    """The numbers, in float32."""
    return code_numbers(pages.code_PKSH, jnp.float32) * pages.scale_PKS.astype(jnp.float32)[..., None]
