"""Page writes: against the reference, what is dropped, and that the pool is written in place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import storage
from kernels_pallas.contract import ContractError, NoImplementationError
from kernels_pallas.kv_write import kv_write

P, K, S, H, R, M, T = 40, 3, 16, 8, 4, 6, 24


def step(dtype):
    rng = np.random.default_rng(0)
    page_RM = jnp.asarray(rng.permutation(P)[: R * M].reshape(R, M), jnp.int32)
    row_T = np.full(T, R, np.int32)
    position_T = np.zeros(T, np.int32)
    row_T[:14], position_T[:14] = 2, np.arange(10, 24)
    row_T[14:16], position_T[14:16] = (0, 3), (95, 32)
    pages = jnp.asarray(rng.normal(size=(P, K, S, H)), dtype)
    x_TKH = jnp.asarray(rng.normal(size=(T, K, H)), dtype)
    return pages, x_TKH, page_RM, jnp.asarray(row_T), jnp.asarray(position_T)


def bits(array):
    return np.asarray(array.astype(jnp.float32) if array.dtype != jnp.uint16 else array)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "uint16"])
def test_writes_real_tokens_and_nothing_else(stored):
    pages, x, page_RM, row, position = step(jnp.float32 if stored == "float32" else jnp.bfloat16)
    values = pages.dtype
    if stored == "uint16":
        pages = jax.lax.bitcast_convert_type(pages, jnp.uint16)
    written = kv_write(pages, x, page_RM, row, position, implementation="xla")
    expected = kv_write(pages, x, page_RM, row, position, implementation="reference")
    np.testing.assert_array_equal(bits(written), bits(expected))
    changed = (bits(written) != bits(pages)).any((1, 3)).sum()
    assert changed == 16    # the real tokens' slots; eight padding tokens went nowhere
    token = storage.from_storage(written, values)[page_RM[3, 2], :, 0]
    np.testing.assert_array_equal(bits(token), bits(x[15]))


def test_a_page_outside_the_pool_is_dropped():
    pages, x, page_RM, row, position = step(jnp.float32)
    for outside in (-1, P, P + 7):
        table = jnp.full_like(page_RM, outside)
        np.testing.assert_array_equal(kv_write(pages, x, table, row, position, implementation="xla"), pages)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_donated_pool_is_written_in_place(dtype):
    """No temporary near the pool's size and the output aliases the input, whatever `storage_dtype` says to store."""
    pool = jax.ShapeDtypeStruct((1024, K, S, 64), storage.storage_dtype(dtype))
    small = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((R, M), (T,), (T,))]
    x_TKH = jax.ShapeDtypeStruct((T, K, 64), dtype)
    write = jax.jit(functools.partial(kv_write, implementation="xla"), donate_argnums=0)
    compiled = write.lower(pool, x_TKH, *small).compile()
    pool_bytes = int(np.prod(pool.shape)) * pool.dtype.itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes // 50
    for line in compiled.as_text().splitlines():
        whole = f"[{','.join(map(str, pool.shape))}]"
        assert not (whole in line.split("=")[-1].split("(")[0] and (" copy(" in line or " convert(" in line)), line


def test_storage_follows_the_jax_version():
    """The trap that uint16 avoids is jax 0.10's."""
    expected = jnp.bfloat16 if jax.__version_info__ >= (0, 11) else jnp.uint16
    assert storage.storage_dtype(jnp.bfloat16) == expected
    assert storage.storage_dtype(jnp.float32) == jnp.float32
    x = jnp.asarray([1.5, -3.25], jnp.bfloat16)
    np.testing.assert_array_equal(storage.from_storage(storage.to_storage(x, jnp.uint16), jnp.bfloat16), x)


def test_violations_and_refusals_say_what_and_why():
    pages, x, page_RM, row, position = step(jnp.float32)
    with pytest.raises(ContractError, match=r"tokens have 2 heads of 8, the pages 3 of 8; rows must be int32"):
        kv_write(pages, x[:, :2], page_RM, row.astype(jnp.float32), position)
    with pytest.raises(NoImplementationError, match="pages of int8 beside values of float32"):
        kv_write(pages.astype(jnp.int8), x, page_RM, row, position)
