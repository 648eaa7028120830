"""Page writes through Pallas:Triton, for CUDA from Ampere on and ROCm, in place: the pool is aliased. Not yet run.

Grid (tokens, kv heads): a program writes the H numbers of one token and head. Traffic: the tokens, read and written.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.portable import ANYWHERE, Ref


def kv_write(
    pages_PKSH: Array, x_TKH: Array, page_RM: Array, row_T: Array, position_T: Array, *, is_interpreted: bool = False
) -> Array:
    """See `api.kv_write`. `is_interpreted` runs the kernel's operations one by one, anywhere; for tests."""
    return pl.pallas_call(
        _write, grid=x_TKH.shape[:2], in_specs=[ANYWHERE] * 5, out_specs=ANYWHERE,
        out_shape=jax.ShapeDtypeStruct(pages_PKSH.shape, pages_PKSH.dtype), input_output_aliases={0: 0},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1), interpret=is_interpreted, name="kv_write",
    )(pages_PKSH, x_TKH, page_RM, row_T, position_T)


def _write(_: Ref, x_TKH: Ref, page_RM: Ref, row_T: Ref, position_T: Ref, out_PKSH: Ref) -> None:
    token, head = pl.program_id(0), pl.program_id(1)
    pages, _, page_size, head_dim = out_PKSH.shape
    rows, columns = page_RM.shape
    row, position = row_T[token], position_T[token]
    index = position // page_size

    @pl.when((row >= 0) & (row < rows) & (index < columns))
    def _() -> None:
        page = page_RM[row, index]

        @pl.when((page >= 0) & (page < pages))
        def _() -> None:
            column_H = jnp.arange(head_dim)
            x_H = plt.load(x_TKH.at[token, head, column_H])
            plt.store(out_PKSH.at[page, head, position % page_size, column_H], x_H)
