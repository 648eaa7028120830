"""Where a model is cut, as arithmetic: every row of the whole is on some device, only kv heads are on several."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jaxserve.core.errors import ConfigError
from jaxserve.core.model_spec import Experts, GatedMlp, LatentAttention, ModelSpec, MoeMlp, Router
from jaxserve.models.decoder import abstract_params
from jaxserve.models.registry import spec_from_config
from jaxserve.sharding.split import Run, device_spec, runs, split_heads
from jaxserve.weights.shards import layouts, read_shard
from tests.device.hub_configs import HUB
from tests.device.tiny import tiny_spec


def mesh_of(size: int, *, whole_experts: bool = False) -> AbstractMesh:
    """Devices that are only counted."""
    return AbstractMesh((1, 1, size) if whole_experts else (1, size, 1), ("data", "model", "expert"))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (9, 3), (16, 2), (8, 8), (64, 8), (5, 1), (14, 2), (12, 6)])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_every_query_head_is_on_one_device_beside_its_kv_head(heads, kv_heads, count):
    devices = split_heads(heads, kv_heads, count)
    assert len({(len(queries), len(mine)) for queries, mine in devices}) == 1, "all devices compute the same shapes"
    there = [head for queries, _ in devices for head in queries if head is not None]
    assert sorted(there) == list(range(heads))
    for queries, mine in devices:
        group = len(queries) // len(mine)
        assert group * len(mine) == len(queries)
        for place, head in enumerate(queries):
            assert head is None or mine[place // group] == head // (heads // kv_heads)
    held = -(-kv_heads // count)
    assert all(len(mine) == held for _, mine in devices), "1/min(N, kv heads) of the cache, rounded up"


def test_fused_rows_are_laid_out_device_by_device():
    spec = tiny_spec()      # 4 query and 2 kv heads of 16
    layer = spec.layers[0]
    assert runs("qkv", 128, layer, mesh_of(2)) == (
        Run(0, 32), Run(64, 16), Run(96, 16), Run(32, 32), Run(80, 16), Run(112, 16)
    )
    copies = runs("qkv", 128, layer, mesh_of(4))
    assert [run.start for run in copies] == [0, 64, 96, 16, 64, 96, 32, 80, 112, 48, 80, 112]
    assert runs("gate_up", 10, layer, mesh_of(2)) == (
        Run(0, 3), Run(5, 3), Run(3, 2), Run(None, 1), Run(8, 2), Run(None, 1)
    )
    assert runs("vocab", 97, None, mesh_of(4)) == (Run(0, 97), Run(None, 3))
    assert runs("width", 32, layer, mesh_of(4)) == (Run(0, 32),)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_layouts_fit_the_tree_and_name_every_row(size):
    spec, mesh = tiny_spec(), mesh_of(size)
    whole, parts = (abstract_params(spec, jnp.float32, of) for of in (None, mesh))
    for layout, plain, joined in zip(layouts(spec, mesh), jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        for of_axis, plain_size, joined_size in zip(layout, plain.shape, joined.shape, strict=True):
            assert sum(run.count for run in of_axis) == joined_size
            rows = {row for run in of_axis if run.start is not None for row in range(run.start, run.start + run.count)}
            assert rows == set(range(plain_size))


def test_a_shard_is_gathered_and_filled_up_with_zeros():
    whole = np.arange(20.0).reshape(10, 2)
    layout = (runs("gate_up", 10, None, mesh_of(2)), (Run(0, 2),))

    def read(start: int, stop: int) -> list[float]:
        index = (slice(start, stop), slice(1, 2))
        return read_shard(layout, index, lambda of: whole[of], np.empty)[:, 0].tolist()

    assert read(0, 6) == [1, 3, 5, 11, 13, 15]
    assert read(6, 12) == [7, 9, 0, 17, 19, 0]
    assert read(8, 9) == [0]
    assert read(9, 11) == [17, 19]


def moe_spec(count: int) -> ModelSpec:
    spec = tiny_spec()
    mlp = MoeMlp(experts=Experts(count=count, width=6), router=Router(), chosen=2, shared=GatedMlp(width=10))
    return replace(spec, layers=tuple(replace(layer, mlp=mlp) for layer in spec.layers))


def test_experts_are_split_or_shared_out():
    split, shared_out = (device_spec(moe_spec(6), mesh_of(3, whole_experts=whole)).layers[0].mlp for whole in (0, 1))
    assert (split.experts.width, split.experts.count_here, split.shared.width) == (2, None, 4)
    assert (shared_out.experts.width, shared_out.experts.count_here, shared_out.shared.width) == (6, 2, 4)
    with pytest.raises(ConfigError, match="enable-expert-parallel: 6 experts cannot be shared out evenly to 4 devices"):
        device_spec(moe_spec(6), mesh_of(4, whole_experts=True))


def test_weights_of_a_device_are_half_where_two_divide_everything():
    """But for norms and routers, which both have."""
    spec = replace(moe_spec(8), vocab_size=96)
    norms = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(spec, jnp.float32)) if leaf.ndim == 1) * 4
    routers = 2 * 8 * 32 * 4
    one, two = (device_bytes(spec, count) - norms - routers for count in (1, 2))
    assert 2 * two == one


# What every device has whole. A bias is added once, after the sum over devices; norms see whole rows.
WHOLE = re.compile(
    r"(^|\.)\w*norm\.(weight|bias)$|^mlp\.router\w*$|^mlp\.shared_gate\.weight$|^(attention\.out|mlp\.down)\.bias$"
    r"|^mlp\.experts_down_bias$|^attention\.(latent|query_down)\.weight$|^positions\.weight$"
)


@pytest.mark.parametrize(("name", "whole_experts"), [
    ("Llama-3.1-8B", False), ("Qwen2.5-7B", False), ("gemma-3-1b", False), ("gpt2", False), ("Qwen3-30B-A3B", False),
    ("Qwen3-30B-A3B", True), ("DeepSeek-V2-Lite", True),
])
def test_weights_fall_with_devices_and_pages_with_kv_heads(name, whole_experts):
    """1/N of all that is not in WHOLE, but for heads that N does not divide; keys and values 1/min(N, kv heads)."""
    spec = spec_from_config(HUB[name])
    spec = replace(spec, layers=spec.layers[-1:])
    is_latent = isinstance(spec.layers[0].attention, LatentAttention)
    alone = {path: leaf.size for path, leaf in named(abstract_params(spec, jnp.bfloat16))}
    for size in (2, 8):
        mesh = mesh_of(size, whole_experts=whole_experts)
        for path, leaf in named(abstract_params(spec, jnp.bfloat16, mesh)):
            here, whole = int(np.prod(leaf.sharding.shard_shape(leaf.shape))), alone[path]
            short = re.sub(r"^layers_\d+\.", "", path)
            if WHOLE.search(short):
                assert here == whole, (path, size)
            elif short in ("attention.qkv.weight", "attention.qkv.bias", "attention.out.weight") and not is_latent:
                a = spec.layers[0].attention
                (queries, mine), *_ = split_heads(a.head_count, a.kv_head_count, size)
                parts = (len(queries) + 2 * len(mine), a.head_count + 2 * a.kv_head_count)
                parts = (len(queries), a.head_count) if "out" in short else parts
                assert here * parts[1] == whole * parts[0], (path, size)
            elif short in ("embedding.weight", "head.weight"):
                assert here == -(-spec.vocab_size // size) * spec.width, (path, size)
            else:
                assert here * size == whole, (path, size)
        for ours, theirs in zip(device_spec(spec, mesh).kv_groups, spec.kv_groups, strict=True):
            held = theirs.kv_head_count if not theirs.has_values else -(-theirs.kv_head_count // size)
            assert ours.kv_head_count == held and ours.head_dim == theirs.head_dim


def named(params: Any) -> list[tuple[str, jax.ShapeDtypeStruct]]:
    flat = jax.tree_util.tree_leaves_with_path(params)
    return [(".".join(str(key.key) for key in path), leaf) for path, leaf in flat]


def device_bytes(spec: ModelSpec, size: int) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * 4
        for leaf in jax.tree.leaves(abstract_params(spec, jnp.float32, mesh_of(size)))
    )
