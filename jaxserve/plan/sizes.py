"""From a configuration and devices that need not be there to the sizes that a start on them would settle.

The arithmetic is the start's own (`runner.start.settle`); here is only what a start reads off its devices.
Invariant: given the same memory and the same temporaries, weights and KV pages are those of a real start, to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError, ModelError
from jaxserve.core.model_spec import ModelSpec
from jaxserve.launch import weight_plan
from jaxserve.models.decoder import abstract_params
from jaxserve.models.draft import check_length
from jaxserve.models.hf import read_config
from jaxserve.models.precision import compute_dtype
from jaxserve.plan.devices import DeviceKind
from jaxserve.quantization.formats.registry import find_scheme
from jaxserve.quantization.int8 import Int8Tensor
from jaxserve.quantization.packing import is_packed
from jaxserve.runner.memory import Budget, cpu_budget, gpu_budget, machine_bytes
from jaxserve.runner.setup import DraftSetup, RunnerSetup
from jaxserve.runner.start import Target, settle
from jaxserve.sharding.mesh import abstract_mesh
from jaxserve.sharding.split import check_has_experts
from jaxserve.weights.folder import format_of

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
Measure = Callable[[RunnerSetup, Any, Any], int]     # setup, parameters, the draft model's -> bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """Of one device. Attributes:
    product_size: numbers of a matrix, 0 for vectors.  itemsize: of the numbers as they are multiplied.
    """

    path: tuple[str, ...]
    product_size: int
    byte_count: int
    itemsize: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sized:
    """Attributes:
    setup: of one replica.  params: the abstract parameters of the served model and of the one that drafts, if any.
    quantization: how the served model's weights are packed, for people; empty where they are plain.
    """

    setup: RunnerSetup
    params: tuple[Any, ...]
    quantization: str = ""

    def parameters(self) -> list[Parameter]:
        """The served model's, as one device has them."""
        flat, _ = jax.tree_util.tree_flatten_with_path(self.params[0], is_leaf=is_packed)
        return [
            _parameter(tuple(str(key.key) for key in path), node, self.setup.dtype.itemsize) for path, node in flat
        ]


def _parameter(path: tuple[str, ...], node: Any, itemsize: int) -> Parameter:
    """Codes of 8 bits beside 8-bit activations are multiplied as they are, others in the model's type."""
    leaves = jax.tree.leaves(node)
    held = [math.prod(_local(leaf)) for leaf in leaves]
    shape = _local(node) if len(leaves) == 1 and not is_packed(node) else tuple(node.shape)
    codes = max(range(len(leaves)), key=lambda index: leaves[index].size)
    part = held[codes] / leaves[codes].size if is_packed(node) else 1
    return Parameter(
        path=path, product_size=int(math.prod(shape) * part) if len(shape) > 1 else 0,
        byte_count=sum(size * leaf.dtype.itemsize for size, leaf in zip(held, leaves, strict=True)),
        itemsize=1 if isinstance(node, Int8Tensor) else itemsize,
    )


def _local(leaf: Any) -> tuple[int, ...]:
    return leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape


@dataclass(kw_only=True, slots=True)
class Sizer:
    """Sizes one model under many configurations. Mutable: keeps parameter trees, which are slow to make.

    Attributes:
      folder, draft_folder: with a config.json; a quantised checkpoint's weights, too, whose headers say what is packed.
    """

    spec: ModelSpec
    folder: Path
    draft: ModelSpec | None = None
    draft_folder: Path | None = None
    _params: dict[tuple[Any, ...], tuple[Any, str]] = field(default_factory=dict)
    _count: int | None = None

    def size(self, config: EngineConfig, kind: DeviceKind, measure: Measure, mesh: Mesh | None = None) -> Sized:
        """What a start with `config` on devices of this kind settles.

        Args:
          measure: temporaries of a setup; not asked for CPUs, where a start does not weigh them either.
          mesh: of compile-only devices; None: an abstract one.
        Raises:
          ConfigError, CapacityError: as the start would.
        """
        count, whole_experts = config.parallel.tensor_parallel_size, config.parallel.enable_expert_parallel
        if whole_experts:
            check_has_experts(self.spec)
        mesh = mesh or abstract_mesh(count, has_whole_experts=whole_experts)
        dtype, _ = compute_dtype(config.model.dtype, self.spec.dtype, "cpu" if kind.is_cpu else "gpu")
        draft, speculative = None, config.scheduler.speculative_config
        if self.draft is not None and speculative is not None:
            draft = DraftSetup(spec=self.draft, tokens_max=speculative.num_speculative_tokens)
        (params, line), draft_params = self._abstract(dtype, mesh, config), None
        if self.draft is not None:
            draft_params, _ = self._abstract(dtype, mesh, config, is_draft=True)
        target = Target(
            budget=_budget(config, kind, count * config.parallel.data_parallel_size), is_cpu=kind.is_cpu,
            temporaries=lambda setup: 0 if kind.is_cpu else measure(setup, params, draft_params),
        )
        setup = settle(
            spec=self.spec, params=params, mesh=mesh, dtype=jnp.dtype(dtype), config=config, target=target,
            draft=draft, draft_params=draft_params,
        )
        if self.draft is not None:
            check_length(self.draft, setup.shape.length_max)
        return Sized(
            setup=setup, params=(params,) if draft_params is None else (params, draft_params), quantization=line
        )

    def parameter_count(self) -> int:
        """Of the served model, whole."""
        if self._count is None:
            self._count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(self.spec, "bfloat16")))
        return self._count

    def _abstract(
        self, dtype: str, mesh: Mesh, config: EngineConfig, *, is_draft: bool = False
    ) -> tuple[Any, str]:
        """The parameters, and how they are packed."""
        key = (is_draft, dtype, mesh, config.model.quantization)
        if key not in self._params:
            spec, folder = (self.draft, self.draft_folder) if is_draft else (self.spec, self.folder)
            assert spec is not None and folder is not None
            found = weight_plan(_as_far_as_there(config, folder), spec, folder, mesh, is_draft=is_draft)
            self._params[key] = abstract_params(spec, dtype, mesh, found.packing), found.line
        return self._params[key]


def _as_far_as_there(config: EngineConfig, folder: Path) -> EngineConfig:
    """Without weights a config.json is read as for dummy ones; that will not do for a quantised checkpoint."""
    try:
        format_of(folder, config.load.load_format)
    except ModelError:
        if (scheme := find_scheme(folder, read_config(folder, config.model.hf_overrides))) is not None:
            raise ConfigError(
                f"a checkpoint in {scheme.method}: what of it stays packed is in its weights' headers; plan it in a "
                "folder that has them"
            ) from None
        return replace(config, load=replace(config.load, load_format="dummy"))
    return config


def _budget(config: EngineConfig, kind: DeviceKind, count: int) -> Budget:
    if kind.memory_bytes is None:
        return cpu_budget(machine_bytes(), device_count=count)
    return gpu_budget(kind.memory_bytes, int(kind.memory_bytes * config.cache.gpu_memory_utilization))
