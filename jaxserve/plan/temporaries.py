"""Scratch memory of the largest programs: from the target's own compiler where it is there, else by a formula.

The compiler needs no device: XLA's CUDA plugin compiles for a described GPU. The formula is what the arrays of a step
take, and a quarter more: with that it was above what the compiler said of every model in docs/plan.md. It is an
estimate, and whoever prints it says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import jax

from jaxserve.core.model_spec import GatedMlp, LatentAttention, LayerSpec, MoeMlp
from jaxserve.plan.devices import DeviceKind
from jaxserve.runner.setup import RunnerSetup
from jaxserve.runner.start import check_backends, measure_temporaries
from jaxserve.sharding.mesh import make_mesh

MARGIN = 1.25
PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
LOGITS_COPIES = 4.01        # of a step's logits in float32: as they come, masked, and what top-p makes of them

# XLA's GpuTargetConfigProto. Cores and shared memory decide how kernels are tiled: (cores, shared bytes of one, L2).
_CHIPS = {
    "H200": (132, 233472, 52428800), "H100": (132, 233472, 52428800), "A100-80G": (108, 167936, 41943040),
    "A100-40G": (108, 167936, 41943040), "L40S": (142, 102400, 100663296), "L4": (58, 102400, 50331648),
    "RTX4090": (128, 102400, 75497472), "B200": (148, 233472, 132644864),
}


def estimate(setup: RunnerSetup, params: Any, draft_params: Any) -> int:
    """Bytes by formula: the hungriest layer at the largest step, or the logits of the largest sampling."""
    del params, draft_params
    spec, tokens, itemsize = setup.spec, setup.buckets.tokens_max, setup.dtype.itemsize
    layer = max(_layer_bytes(layer, spec.width, tokens, itemsize) for layer in set(spec.layers))
    rows, devices = setup.buckets.rows_max, setup.mesh.size
    own_rows = -(-rows // devices)
    exchanged = own_rows * devices * spec.vocab_size * 4 if devices > 1 else 0
    sampling = int(own_rows * setup.shape.vocab_size * 4 * LOGITS_COPIES) + exchanged
    return int(max(layer, sampling) * MARGIN)


def _layer_bytes(layer: LayerSpec, width: int, tokens: int, itemsize: int) -> int:
    """The stream and its norm, queries, keys and values, and what the MLP holds at its widest."""
    a, mlp = layer.attention, layer.mlp
    if isinstance(a, LatentAttention):
        heads = a.head_count * (a.plain_dim + a.rope_dim + a.latent_dim) + a.latent_dim + a.rope_dim
    else:
        heads = (a.head_count + 2 * a.kv_head_count) * a.head_dim
    if isinstance(mlp, MoeMlp):
        rows, F = tokens * mlp.chosen, mlp.experts.width
        # Rows sorted by expert, and beside them gate and up in float32, or the products of `down`.
        held = rows * (width * itemsize + max(2 * F, width) * 4)
    else:
        held = tokens * itemsize * mlp.width * (3 if isinstance(mlp, GatedMlp) else 2)
    return tokens * itemsize * (2 * width + heads) + held


def compiler_for(kind: DeviceKind) -> str | None:
    """Why programs cannot be compiled for this kind here; None where they can."""
    if kind.name not in _CHIPS:
        return f"there is no compiler for {kind.name} without one"
    if not any(_is_installed(name) for name in PLUGINS):
        return "jax's CUDA plugin is not installed"
    return None


def compile_only_mesh(kind: DeviceKind, count: int, *, has_whole_experts: bool) -> jax.sharding.Mesh:
    """Devices of this kind that can only be compiled for."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_target_config(kind), topology=f"1x{count}x1"
    )
    return make_mesh(list(topology.devices), count, has_whole_experts=has_whole_experts)


def compiled(setup: RunnerSetup, params: Any, draft_params: Any) -> int:
    """Bytes by XLA's memory analysis of the same programs that a start compiles to learn it."""
    with _abstract(setup.mesh):
        check_backends(setup, params, draft_params)
        return measure_temporaries(setup, params, draft_params)


@contextlib.contextmanager
def _abstract(mesh: Any) -> Iterator[None]:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _target_config(kind: DeviceKind) -> str:
    cores, shared, cache = _CHIPS[kind.name]
    assert kind.capability is not None and kind.bandwidth is not None and kind.memory_bytes is not None
    major, minor = kind.capability
    extension = "feature_extension: ACCELERATED_FEATURES " if major >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: {2048 if minor == 0 else 1536}
  shared_memory_per_block: 49152  shared_memory_per_core: {shared}  shared_memory_per_block_optin: {shared - 1024}
  core_count: {cores}  fpus_per_core: {64 if (major, minor) == (8, 0) else 128}  clock_rate_ghz: 1.8
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: {int(kind.bandwidth)}  l2_cache_size: {cache}  device_memory_size: {kind.memory_bytes}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} {extension}}}
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {kind.name}"
"""
