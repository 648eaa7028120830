"""The specification of page writes: every slot of the pool asks which token goes there."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from kernels_pallas.quantized import Pages, QuantizedPages, quantize
from kernels_pallas.storage import to_storage


def kv_write(pages: Pages, x_TKH: Array, page_RM: Array, row_T: Array, position_T: Array) -> Pages:
    """See `api.kv_write`."""
    if isinstance(pages, QuantizedPages):
        code_TKH, scale_TK = quantize(x_TKH, pages.code_PKSH.dtype, pages.scale_PKS.dtype)
        scale_PKS1 = _write(pages.scale_PKS[..., None], scale_TK[..., None], page_RM, row_T, position_T)
        return QuantizedPages(_write(pages.code_PKSH, code_TKH, page_RM, row_T, position_T), scale_PKS1[..., 0])
    return _write(pages, to_storage(x_TKH, pages.dtype), page_RM, row_T, position_T)


def _write(pages_PKSH: Array, x_TKH: Array, page_RM: Array, row_T: Array, position_T: Array) -> Array:
    P, _, S, _ = pages_PKSH.shape
    R, M = page_RM.shape
    is_real_T = (row_T >= 0) & (row_T < R) & (position_T // S < M)
    page_T = page_RM[jnp.clip(row_T, 0, R - 1), jnp.clip(position_T // S, 0, M - 1)]
    is_here_PST = (page_T == jnp.arange(P)[:, None, None]) & (position_T % S == jnp.arange(S)[:, None]) & is_real_T
    x_PSKH = x_TKH[is_here_PST.argmax(-1)]
    return jnp.where(is_here_PST.any(-1)[:, None, :, None], x_PSKH.transpose(0, 2, 1, 3), pages_PKSH)
