"""The paged KV pool on the device: its shapes, and page tables. Knows no policy: which page is whose is the plan's.

Invariant: pool and tables are allocated once, zeroed, and from then on only donated from program to program, so one
copy of each exists.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.core.config import KvCacheDtype
from jaxserve.core.errors import ConfigError
from jaxserve.core.model_spec import ModelSpec
from jaxserve.core.plan import RunnerShape
from jaxserve.layers.context import LayerKv
from jaxserve.sharding import rules
from kernels_pallas.quantized import FP8, FP8_BITS, QuantizedPages

TABLE_DTYPE = jnp.int32
SCALE_DTYPE = jnp.dtype(jnp.float32)


def page_index_max(shape: RunnerShape) -> int:
    """M: page-table columns, enough for the longest sequence."""
    return -(-shape.length_max // shape.page_size)


def codes_dtype(asked: KvCacheDtype, dtype: jnp.dtype, *, is_cpu: bool) -> str | None:
    """The dtype of codes that `--kv-cache-dtype` means. Raises ConfigError where it cannot be had."""
    if asked == "auto" or (asked == "bfloat16" and dtype == jnp.bfloat16):
        return None
    if asked == "bfloat16":
        raise ConfigError(f"kv-cache-dtype bfloat16: the model is computed in {dtype}; use auto, or --dtype bfloat16")
    if asked == "int8":
        return "int8"
    return FP8_BITS if is_cpu else FP8


def abstract_pool(
    spec: ModelSpec, shape: RunnerShape, dtype: jnp.dtype, mesh: jax.sharding.Mesh, codes: str | None = None
) -> tuple[LayerKv, ...]:
    """Keys and values of every layer, in layer order: [P, K, S, H] of its group's page count.

    Args:
      codes: dtype of codes, which scales [P, K, S] then stand beside; None: numbers of `dtype`.

    `spec` is one device's: its kv heads times the devices are K. All devices have the same latent cache.
    """
    layers: dict[int, LayerKv] = {}
    for group, sizes in zip(spec.kv_groups, shape.groups, strict=True):
        axes = (None, "kv_heads" if group.has_values else None, None, None)
        of_device = (sizes.page_count, group.kv_head_count, shape.page_size, group.head_dim)
        size = rules.joined_shape(mesh, axes, of_device)
        page: Any = jax.ShapeDtypeStruct(size, jnp.dtype(codes or dtype), sharding=rules.sharding(mesh, axes))
        if codes is not None:
            scale = jax.ShapeDtypeStruct(size[:-1], SCALE_DTYPE, sharding=rules.sharding(mesh, axes[:-1]))
            page = QuantizedPages(page, scale)
        kv = LayerKv(k_PKSH=page, v_PKSH=page if group.has_values else None)
        layers.update(dict.fromkeys(group.layers, kv))
    return tuple(layers[index] for index in range(len(spec.layers)))


def abstract_tables(shape: RunnerShape, sharding: jax.sharding.Sharding) -> tuple[jax.ShapeDtypeStruct, ...]:
    """One page table a KV group: [R, M]."""
    size = (shape.row_count, page_index_max(shape))
    return tuple(jax.ShapeDtypeStruct(size, TABLE_DTYPE, sharding=sharding) for _ in shape.groups)


def clear(kv: tuple[LayerKv, ...], layers: tuple[int, ...], page_U: Array) -> tuple[LayerKv, ...]:
    """Zeroes pages of the given layers; page ids past the pool are dropped."""
    wiped = list(kv)
    for layer in layers:
        wiped[layer] = jax.tree.map(lambda pool: pool.at[page_U].set(0, mode="drop"), kv[layer])
    return tuple(wiped)


def cache_bytes(pool: tuple[LayerKv, ...]) -> int:
    """Bytes of a pool, real or abstract."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pool))
