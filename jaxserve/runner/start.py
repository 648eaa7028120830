"""From the user's configuration to a `RunnerSetup`: defaults by device, measured temporaries, the pages that fit.

Compiles only where the device's memory is shared out (not on the CPU): the largest programs at a small pool, to learn
how much scratch memory they take; those executables are kept, so the next start only reads them.
Invariant: everything that could fail for want of memory has been weighed here, before weights are read.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.model_spec import ModelSpec
from jaxserve.core.plan import KvGroupShape, RunnerShape
from jaxserve.quantization.packing import is_packed
from jaxserve.runner import rows, trial
from jaxserve.runner.buckets import Buckets, choose_buckets, skips_padding, smallest_size
from jaxserve.runner.build import temporary_bytes
from jaxserve.runner.compile import Compiler, open_store
from jaxserve.runner.draft_model import DraftModel
from jaxserve.runner.executable_store import ExecutableStore, default_folder
from jaxserve.runner.kv_cache import SCALE_DTYPE, abstract_tables, codes_dtype
from jaxserve.runner.memory import Budget, MemoryTable, device_budget, grant_pages, tightest
from jaxserve.runner.programs import ProgramSet
from jaxserve.runner.setup import DraftSetup, RunnerSetup
from jaxserve.sharding.split import device_spec
from kernels_pallas.contract import NoImplementationError
from kernels_pallas.native import api as native

logger = logging.getLogger("jaxserve.start")

SHAPING_SLOTS_MAX = 32          # rows at once with penalties, bias, bad words or allowed ids: 10 bytes x V each
VERIFIED_SAMPLES = 64    # samples of a step with drafts, where the rows alone do not need more
PRODUCTS = ("quantized_matmul", "eight_bit_matmul")     # ops whose refusals are of quantization-backend
PROVISIONAL_PAGES = 64          # a pool that costs nothing; temporaries do not depend on it


Least = Callable[[Sequence[int]], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a runner's sizes depend on besides model and configuration.

    Attributes:
      temporaries: scratch memory of a setup's hungriest program, on each device.
      attention: who attends, where that can be tried.
    """

    budget: Budget
    is_cpu: bool
    temporaries: Callable[[RunnerSetup], int]
    attention: Callable[[RunnerSetup], str | None] = attrgetter("attention")


def plan_memory(
    *, spec: ModelSpec, params: Any, mesh: jax.sharding.Mesh, dtype: jnp.dtype, config: EngineConfig,
    draft: DraftSetup | None = None, draft_params: Any = None, least: Least | None = None,
) -> RunnerSetup:
    """Settles every size of a runner.

    Args:
      spec: the whole model.
      params: the parameter tree, abstract (ShapeDtypeStruct) or real.
      dtype: of activations and KV pages.
      draft, draft_params: a model that drafts, and its parameters like `params`.
      least: the least of these numbers over all processes; they must settle on the same.
    Raises:
      ConfigError: sizes that contradict each other.  CapacityError: what was asked for does not fit.
    """
    devices = mesh.local_devices
    device = devices[0]
    is_cpu = device.platform == "cpu"
    budget = device_budget(
        device, utilization=config.cache.gpu_memory_utilization,
        device_count=len(devices) * config.parallel.data_parallel_size,
    )
    if least is not None:
        budget = tightest(budget, least)

    def temporaries(setup: RunnerSetup) -> int:
        check_backends(setup, params, draft_params)
        # On the CPU temporaries are malloc'd as they come, out of the reserve.
        mine = 0 if is_cpu else measure_temporaries(setup, params, draft_params)
        return mine if least is None else -least((-mine,))[0]

    target = Target(
        budget=budget, is_cpu=is_cpu, temporaries=temporaries,
        attention=functools.partial(choose_attention, config, is_cpu=is_cpu),
    )
    return settle(
        spec=spec, params=params, mesh=mesh, dtype=dtype, config=config, target=target, draft=draft,
        draft_params=draft_params, store=_store(config.compilation.compilation_cache_dir),
    )


def settle(
    *, spec: ModelSpec, params: Any, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, dtype: jnp.dtype,
    config: EngineConfig, target: Target, draft: DraftSetup | None = None, draft_params: Any = None,
    store: ExecutableStore | None = None,
) -> RunnerSetup:
    """`plan_memory` for devices that need not be there: what it must know of them is the target."""
    vocab_size, is_cpu = spec.vocab_size, target.is_cpu
    spec = device_spec(spec, mesh)
    if draft is not None:
        draft = replace(draft, spec=device_spec(draft.spec, mesh))
    itemsize = jnp.dtype(dtype).itemsize
    is_native = skips_padding(
        spec, itemsize=itemsize, is_cpu=is_cpu, products=config.compilation.quantization_backend
    )
    tokens_default = _tokens_max_default(is_cpu=is_cpu, has_tiles=is_native and native.has_tiles())
    row_count, tokens_max = _step_sizes(config, spec, is_cpu=is_cpu, tokens_default=tokens_default)
    size_min = smallest_size(
        spec, itemsize=itemsize, is_cpu=is_cpu, batch_invariant=config.compilation.batch_invariant
    )
    samples_max = _samples_max(config, row_count, tokens_max)
    buckets = functools.partial(
        choose_buckets, rows_max=samples_max or row_count, size_min=size_min, is_cpu=is_cpu,
        is_eager=config.compilation.enforce_eager, skips_padding=is_native, has_tiles=native.has_tiles(),
    )
    setup = _setup(
        spec=spec, vocab_size=vocab_size, mesh=mesh, dtype=jnp.dtype(dtype), config=config, row_count=row_count,
        samples_max=samples_max, buckets=buckets(tokens_max=tokens_max), store=store, budget=target.budget, draft=draft,
        is_cpu=is_cpu,
    )
    setup = replace(setup, attention=target.attention(setup))
    memory = grant_pages(
        spec=spec, draft=None if draft is None else draft.spec, budget=target.budget,
        weight_bytes=device_bytes((params, draft_params)), temporary_bytes=target.temporaries(setup),
        state_bytes=_state_bytes(setup), page_size=config.cache.block_size,
        itemsize=jnp.dtype(setup.kv_codes or setup.dtype).itemsize,
        scale_bytes=0 if setup.kv_codes is None else SCALE_DTYPE.itemsize, row_count=row_count, tokens_max=tokens_max,
        length_wanted=_length_wanted(config, spec), pool_bytes_wanted=config.cache.kv_cache_memory_bytes,
    )
    if not config.scheduler.enable_chunked_prefill and config.scheduler.max_num_batched_tokens is None:
        tokens_max = min(tokens_max, max(tokens_default, row_count, memory.length_max))
    return replace(
        setup, memory=memory,
        shape=_shape(setup.shape, [group.page_count for group in memory.groups], memory.length_max),
        buckets=buckets(tokens_max=tokens_max),
    )


def choose_attention(config: EngineConfig, setup: RunnerSetup, *, is_cpu: bool) -> str | None:
    """Who attends: whoever was named, else on a GPU the fastest that is right there (`runner.trial`)."""
    compilation = config.compilation
    # Kernels cut contexts by what else is in the batch.
    is_settled = is_cpu or compilation.attention_backend != "auto" or compilation.batch_invariant
    return setup.attention if is_settled else trial.fastest(setup)


def _tokens_max_default(*, is_cpu: bool, has_tiles: bool) -> int:
    """A full step should not keep streams waiting for longer than a fifth of a second."""
    if not is_cpu:
        return 8192
    return 512 if has_tiles else 256


def _step_sizes(config: EngineConfig, spec: ModelSpec, *, is_cpu: bool, tokens_default: int) -> tuple[int, int]:
    """Rows R, and the most tokens of a step."""
    scheduler = config.scheduler
    row_count = scheduler.max_num_seqs or (64 if is_cpu else 256)
    tokens_max = scheduler.max_num_batched_tokens
    length = config.model.max_model_len
    if tokens_max is None:
        tokens_max = max(tokens_default, row_count)
        if not scheduler.enable_chunked_prefill:
            tokens_max = max(tokens_max, length or spec.context_length)
    if tokens_max < row_count:
        raise ConfigError(
            f"max-num-batched-tokens {tokens_max} is less than max-num-seqs {row_count}: a step must hold one token of "
            "every sequence; raise the first or lower the second."
        )
    if not scheduler.enable_chunked_prefill and length is not None and tokens_max < length:
        raise ConfigError(
            f"max-num-batched-tokens {tokens_max} is less than max-model-len {length}, and chunked prefill is off: "
            "raise the first, lower the second, or allow chunks with --enable-chunked-prefill."
        )
    return row_count, tokens_max


def _samples_max(config: EngineConfig, row_count: int, tokens_max: int) -> int | None:
    """With drafts to verify, few rows sample at several positions each; many rows leave each other no room."""
    speculative = config.scheduler.speculative_config
    if speculative is None:
        return None
    wanted = row_count * (1 + speculative.num_speculative_tokens)
    return min(wanted, max(row_count, VERIFIED_SAMPLES), tokens_max)


def _length_wanted(config: EngineConfig, spec: ModelSpec) -> int | None:
    """--max-model-len, or what a step holds where prompts cannot be split; None is as long as fits."""
    length, scheduler = config.model.max_model_len, config.scheduler
    if length is not None and length > spec.context_length:
        raise ConfigError(
            f"max-model-len {length} is above the {spec.context_length} positions of the model: lower it."
        )
    if length is None and not scheduler.enable_chunked_prefill and scheduler.max_num_batched_tokens is not None:
        return min(spec.context_length, scheduler.max_num_batched_tokens)
    return length


def _setup(
    *, spec: ModelSpec, vocab_size: int, mesh: jax.sharding.Mesh, dtype: jnp.dtype, config: EngineConfig,
    row_count: int, samples_max: int | None, buckets: Buckets, store: ExecutableStore | None, budget: Budget,
    draft: DraftSetup | None, is_cpu: bool,
) -> RunnerSetup:
    """A setup of final sizes except for the pool, which is provisional."""
    alternatives = config.model.max_logprobs
    shape = RunnerShape(
        row_count=row_count,
        page_size=config.cache.block_size,
        groups=tuple(KvGroupShape(page_count=0, window=group.window) for group in spec.kv_groups),
        length_max=0,
        slot_count=min(row_count, SHAPING_SLOTS_MAX),
        vocab_size=vocab_size,
        rope_switch=spec.rope_switch,
        alternatives_max=vocab_size if alternatives == -1 else min(alternatives, vocab_size),
    )
    length = config.model.max_model_len or spec.context_length
    backend, products = config.compilation.attention_backend, config.compilation.quantization_backend
    return RunnerSetup(
        spec=spec, mesh=mesh, dtype=dtype, buckets=buckets,
        shape=_shape(shape, [PROVISIONAL_PAGES] * len(shape.groups), length),
        memory=MemoryTable(budget=budget, page_size=shape.page_size),
        logprobs_mode=config.model.logprobs_mode,
        whole_prompts=not config.scheduler.enable_chunked_prefill, samples_max=samples_max, draft=draft,
        store=store, kv_codes=_kv_codes(config, dtype, draft, is_cpu=is_cpu),
        attention=None if backend == "auto" else backend, products=None if products == "auto" else products,
        # On a CPU an empty section is a loop of no turns; on a GPU it is launches, and XLA's loops wait for the host.
        decodes_apart=not (is_cpu or config.compilation.enforce_eager),
    )


def _kv_codes(config: EngineConfig, dtype: jnp.dtype, draft: DraftSetup | None, *, is_cpu: bool) -> str | None:
    asked = config.cache.kv_cache_dtype
    codes = codes_dtype(asked, dtype, is_cpu=is_cpu)
    if codes is not None and draft is not None:
        raise ConfigError(f"kv-cache-dtype {asked}: not built yet beside a draft model; leave one of them away")
    return codes


def _shape(shape: RunnerShape, page_counts: list[int], length_max: int) -> RunnerShape:
    groups = tuple(replace(group, page_count=count) for group, count in zip(shape.groups, page_counts, strict=True))
    return replace(shape, groups=groups, length_max=length_max)


def check_backends(setup: RunnerSetup, params: Any, draft_params: Any) -> None:
    """Raises ConfigError where an implementation asked for cannot serve a layer here: traces a step, compiles none."""
    if setup.attention is None and setup.products is None:
        return
    leaves = jax.tree.leaves((params, draft_params), is_leaf=is_packed)
    if setup.products is not None and not any(map(_is_multiplied, leaves)):
        raise ConfigError(
            f"quantization-backend {setup.products}: the model has no packed matrix (experts are XLA's); leave it away"
        )
    tokens = setup.buckets.tokens[0]
    programs = list(ProgramSet(setup, params).forward(tokens))
    if setup.draft is not None:
        drafting = DraftModel(setup, setup.draft.spec, draft_params, setup.draft.tokens_max)
        programs.append(drafting.follow_program(tokens))
    try:
        for program in programs:
            jax.eval_shape(program.function, *program.arguments)
    except NoImplementationError as error:
        is_product = str(error).startswith(PRODUCTS)
        flag, asked = ("quantization", setup.products) if is_product else ("attention", setup.attention)
        raise ConfigError(f"{flag}-backend {asked}: {error} auto takes one that serves.") from error


def _is_multiplied(leaf: Any) -> bool:
    """Whether a parameter is a packed matrix of a linear layer."""
    return is_packed(leaf) and len(leaf.shape) == 2


def measure_temporaries(setup: RunnerSetup, params: Any, draft_params: Any) -> int:
    """Scratch memory of the hungriest program, by compiling the largest of each kind at the provisional pool."""
    programs, compiler = ProgramSet(setup, params), Compiler(setup.store, setup.devices)
    tokens, count = setup.buckets.tokens_max, setup.buckets.rows_max
    largest = (*programs.forward(tokens), programs.sample(count), programs.score(tokens), programs.admit())
    if setup.draft is not None:
        drafting = DraftModel(setup, setup.draft.spec, draft_params, setup.draft.tokens_max)
        largest += (drafting.follow_program(tokens), drafting.write_program(drafting.write_buckets[-1]))
    return max(temporary_bytes(compiler.build(program)) for program in largest)


def _state_bytes(setup: RunnerSetup) -> int:
    """Row state and page tables."""
    state = jax.eval_shape(lambda: rows.empty(setup.shape))
    return _tree_bytes((state, abstract_tables(setup.shape, setup.replicated)))


def device_bytes(params: Any) -> int:
    """Bytes of the parameters on one device."""
    sizes = []
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape
        sizes.append(int(np.prod(shape)) * leaf.dtype.itemsize)
    return sum(sizes)


def _tree_bytes(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _store(folder: str | None) -> ExecutableStore | None:
    """The store the user named, which must work, or the default one, which may not (a read-only home)."""
    if folder is not None:
        return open_store(Path(folder).expanduser())
    try:
        return open_store(default_folder())
    except ConfigError as error:
        logger.warning("compiled programs are not kept, so every start compiles: %s", error)
        return None
