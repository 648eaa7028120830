"""How a model is cut over devices: the smaller model that each computes, and where its rows lie in the whole one.

    whole    q0 q1 q2 q3 | k0 k1 | v0 v1          two devices: [q0 q1 k0 v0] and [q2 q3 k1 v1]
                                                  four: [q0 k0 v0] [q1 k0 v0] [q2 k1 v1] [q3 k1 v1]

Plain arithmetic over specs; knows no file and touches no array. What the devices do not divide is filled up with
zeros, which add nothing: a head of zeros gives zero to columns of zeros.
Invariant: every row of the whole is on some device, and only kv heads are on several.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

from jax.sharding import Mesh

from jaxserve.core.errors import ConfigError
from jaxserve.core.model_spec import (
    Attention,
    GatedMlp,
    LatentAttention,
    LayerSpec,
    ModelSpec,
    MoeMlp,
    PlainMlp,
    RmsNorm,
)
from jaxserve.sharding.rules import parts

Heads = tuple[int | None, ...]      # None is a head of zeros


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows: where they begin in the whole, and how many; None is zeros."""

    start: int | None
    count: int


Runs = tuple[Run, ...]


def device_spec(spec: ModelSpec, mesh: Mesh) -> ModelSpec:
    """The model that one device computes; on one device the model itself. Raises ConfigError where it cannot be cut."""
    if mesh.size == 1:
        return spec
    layers = tuple(_device_layer(layer, mesh) for layer in spec.layers)
    return replace(spec, layers=layers, vocab_size=_share(spec.vocab_size, parts(mesh, "vocab")))


def check_has_experts(spec: ModelSpec) -> None:
    """Raises ConfigError where whole experts are to be shared out and there are none."""
    if not any(isinstance(layer.mlp, MoeMlp) for layer in spec.layers):
        raise ConfigError(f"enable-expert-parallel: {spec.family} has no experts; leave it away")


def runs(axis: str | None, size: int, layer: LayerSpec | None, mesh: Mesh) -> Runs:
    """The rows of all devices, one device after the other, of an axis that has `size` rows in the whole.

    Args:
      layer: whose parameter it is; None outside of the layers.
    """
    count = parts(mesh, axis)
    if count == 1:
        return (Run(0, size),)
    if axis in ("gate_up", "expert_gate_up"):
        half = size // 2
        both = zip(_slices(0, half, count), _slices(half, half, count), strict=True)
        return _merged(run for gate, up in both for run in gate + up)
    if axis in ("qkv", "heads", "kv_heads"):
        assert layer is not None, axis
        return _merged(_head_runs(axis, size, layer.attention, count))
    return _merged(chain.from_iterable(_slices(0, size, count)))


def split_heads(head_count: int, kv_head_count: int, count: int) -> tuple[tuple[Heads, Heads], ...]:
    """Query heads and kv heads of each device: whole groups, or parts of one group beside a copy of its kv head."""
    group = head_count // kv_head_count
    found = []
    for device in range(count):
        if count > kv_head_count:
            copies = count // kv_head_count
            kv_head, place = divmod(device, copies)
            share = _share(group, copies)
            mine: Heads = (kv_head if kv_head < kv_head_count else None,)
            within = range(place * share, (place + 1) * share)
        else:
            share = _share(kv_head_count, count)
            mine = tuple(head if head < kv_head_count else None for head in range(device * share, (device + 1) * share))
            within = range(group)
        queries = tuple(
            head * group + index if head is not None and index < group else None for head in mine for index in within
        )
        found.append((queries, mine))
    return tuple(found)


def _device_layer(layer: LayerSpec, mesh: Mesh) -> LayerSpec:
    attention = layer.attention
    count = parts(mesh, "heads")
    if isinstance(attention, LatentAttention):
        attention = replace(attention, head_count=_share(attention.head_count, count))
    else:
        devices = split_heads(attention.head_count, attention.kv_head_count, count)
        queries, kv_heads = devices[0]
        norm = attention.head_norm
        if norm is not None and norm.over == "all heads":
            if not isinstance(norm.norm, RmsNorm):
                raise ConfigError(
                    f"tensor-parallel-size {count}: a LayerNorm over all heads together is not split over devices; "
                    "use 1"
                )
            copies = sum(head is not None for _, mine in devices for head in mine)
            norm = replace(norm, query_count=attention.head_count, kv_count=copies)
        attention = replace(attention, head_count=len(queries), kv_head_count=len(kv_heads), head_norm=norm)
    return replace(layer, attention=attention, mlp=_device_mlp(layer.mlp, mesh))


def _device_mlp(mlp: GatedMlp | PlainMlp | MoeMlp, mesh: Mesh) -> GatedMlp | PlainMlp | MoeMlp:
    if not isinstance(mlp, MoeMlp):
        return replace(mlp, width=_share(mlp.width, parts(mesh, "mlp")))
    count = parts(mesh, "experts")
    if mlp.experts.count % count:
        raise ConfigError(
            f"enable-expert-parallel: {mlp.experts.count} experts cannot be shared out evenly to {count} devices; use "
            "a tensor-parallel-size that divides them, or leave the flag away to split every expert"
        )
    shared = None if mlp.shared is None else replace(mlp.shared, width=_share(mlp.shared.width, parts(mesh, "mlp")))
    experts = replace(
        mlp.experts, width=_share(mlp.experts.width, parts(mesh, "expert_mlp")),
        count_here=mlp.experts.count // count if count > 1 else None,
    )
    return replace(mlp, experts=experts, shared=shared)


def _head_runs(axis: str, size: int, attention: Attention | LatentAttention, count: int) -> list[Run]:
    if isinstance(attention, LatentAttention):
        dim = size // attention.head_count
        return list(chain.from_iterable(_slices(0, attention.head_count, count, dim)))
    N, K = attention.head_count, attention.kv_head_count
    found = []
    dim = size // {"qkv": N + 2 * K, "heads": N, "kv_heads": K}[axis]
    for queries, kv_heads in split_heads(N, K, count):
        found += [_head(head, dim) for head in (kv_heads if axis == "kv_heads" else queries)]
        if axis == "qkv":
            found += [_head(head, dim, N) for head in kv_heads] + [_head(head, dim, N + K) for head in kv_heads]
    return found


def _head(head: int | None, dim: int, before: int = 0) -> Run:
    return Run(None if head is None else (before + head) * dim, dim)


def _slices(start: int, size: int, count: int, unit: int = 1) -> list[tuple[Run, Run]]:
    """Equal parts of `size` units from `start` on, two runs each: what is there, and zeros."""
    share = _share(size, count)
    found = []
    for device in range(count):
        there = min(max(size - device * share, 0), share)
        found.append((Run(start + device * share * unit, there * unit), Run(None, (share - there) * unit)))
    return found


def _merged(found: Iterable[Run]) -> Runs:
    """The same rows in as few runs as possible."""
    merged: list[Run] = []
    for run in found:
        last = merged[-1] if merged else None
        if not run.count:
            continue
        if last is not None and (
            (last.start is None and run.start is None)
            or (last.start is not None and run.start == last.start + last.count)
        ):
            merged[-1] = Run(last.start, last.count + run.count)
        else:
            merged.append(run)
    return tuple(merged)


def _share(size: int, count: int) -> int:
    return math.ceil(size / count)
