"""Everything about a runner that is settled before it exists: model, placement, sizes, buckets, memory.

Plain values; computes nothing. Invariant: two starts of equal setups run equal programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxserve.core.model_spec import ModelSpec
from jaxserve.core.plan import RunnerShape
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.executable_store import ExecutableStore
from jaxserve.runner.memory import MemoryTable
from jaxserve.sharding import rules

LogprobsMode = Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftSetup:
    """A model that drafts at most `tokens_max` tokens for the served one; once settled, as one device computes it."""

    spec: ModelSpec
    tokens_max: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerSetup:
    """Attributes:
    spec: the model that one device computes: of several, each has a part of the heads, the mlp and the vocabulary.
    whole_prompts: prompts are never split (`--no-enable-chunked-prefill`): the largest step is needed at once.
    samples_max: most samples of a step where drafts are verified; None: one a row.
    draft: the model that drafts, if one does.
    kv_codes: dtype of the codes of an 8-bit KV cache; None: keys and values as they are.
    attention: who attends (`kernels_pallas`); None: the first that serves of those that need not be named.
    products: who multiplies packed weights (`kernels_pallas`); None: as of attention.
    decodes_apart: steps of decodes only have programs without prefill, once these are compiled.
    store: where compiled programs outlive the process, if anywhere.
    """

    spec: ModelSpec
    mesh: jax.sharding.Mesh
    dtype: jnp.dtype
    shape: RunnerShape
    buckets: Buckets
    memory: MemoryTable
    logprobs_mode: LogprobsMode = "raw_logprobs"
    whole_prompts: bool = False
    samples_max: int | None = None
    draft: DraftSetup | None = None
    kv_codes: str | None = None
    attention: str | None = None
    products: str | None = None
    decodes_apart: bool = False
    store: ExecutableStore | None = None

    @property
    def decode_tokens(self) -> tuple[int, ...]:
        """Token buckets that have programs for steps of decodes only, too."""
        return self.buckets.of_decodes(self.shape.row_count) if self.decodes_apart else ()

    @property
    def replicated(self) -> jax.sharding.Sharding:
        """One copy on every device of the mesh."""
        return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())

    @property
    def by_samples(self) -> jax.sharding.Sharding:
        """Rows that sample, shared out."""
        return rules.sharding(self.mesh, ("samples",))

    @property
    def by_samples_of_slabs(self) -> jax.sharding.Sharding:
        """The rows of each of several slabs, shared out."""
        return rules.sharding(self.mesh, (None, "samples"))

    @property
    def experts(self) -> str:
        """Who multiplies a mixture's experts. XLA's loop waits for the host at every tile on a GPU, but is exact."""
        return "triton" if self.platform == "gpu" and self.dtype.itemsize == 2 else "xla"

    @property
    def spans_processes(self) -> bool:
        """Whether other processes have some of the devices: what the host reads must then be whole on each."""
        return isinstance(self.mesh, jax.sharding.Mesh) and len(self.mesh.local_devices) < self.mesh.size

    @property
    def platform(self) -> str:
        """What programs are compiled for, which need not be what compiles them: "cpu", "gpu"."""
        return self.devices[0].platform

    @property
    def devices(self) -> tuple[jax.Device, ...]:
        return tuple(self.mesh.devices.flat)
