"""The composition root of the data plane: configuration in, a running engine out. The only file that joins mesh,
weights, runner and loop; the engine process and the offline `LLM` both start here.

Invariant: everything that can be refused is refused before weights are read, and the device allocator's settings
are made before jax is imported: they are the one thing the environment decides.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from jaxserve.core.clock import MonotonicClock
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.model_spec import ModelSpec
from jaxserve.core.plan import DraftPort
from jaxserve.core.progress import NoProgress, ProgressPort
from jaxserve.core.request import EngineInfo, EngineStats, SequenceOutput
from jaxserve.engine.loop import EngineLoop
from jaxserve.engine.speculation import ModelSpeculation
from jaxserve.start_report import StartReport, size

if TYPE_CHECKING:
    import jax

    from jaxserve.cluster.members import Member
    from jaxserve.core.plan import RunnerPort
    from jaxserve.quantization import online
    from jaxserve.quantization.formats.scheme import Scheme
    from jaxserve.quantization.packing import Packing
    from jaxserve.runner.runner import Runner
    from jaxserve.runner.setup import DraftSetup, RunnerSetup
    from jaxserve.runner.trace import Tracer

logger = logging.getLogger("jaxserve.start")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightPlan:
    """Where a model's weights are, and which of them are kept packed; `line` says so to people."""

    spec: ModelSpec
    folder: Path
    packing: Packing
    scheme: Scheme | None
    line: str


@dataclass(kw_only=True, slots=True)
class LocalEngine:
    """An engine in this process. Mutable: owns the device until `close`."""

    loop: EngineLoop
    runner: Runner
    info: EngineInfo
    folder: Path
    report: StartReport
    _progress: ProgressPort = field(default_factory=NoProgress)
    _tracer: Tracer | None = None
    _traced: int = 0     # turns in traces

    @property
    def stats(self) -> EngineStats:
        return self.loop.stats

    def step(self) -> list[SequenceOutput]:
        """One turn of the loop; a trace shows it as a step."""
        if self._tracer is None or not self._tracer.is_running:
            return self.loop.step()
        import jax

        self._traced += 1
        with jax.profiler.StepTraceAnnotation("step", step_num=self._traced):
            return self.loop.step()

    def profile(self, folder: str | None) -> None:
        """Starts a trace of the steps into `folder`, or ends it (None). Raises EngineError where it cannot."""
        from jaxserve.runner.trace import Tracer

        self._tracer = self._tracer or Tracer()
        if folder is not None:
            self._tracer.start(Path(folder))
            return
        for path in self._tracer.stop(self.runner.executables()):
            logger.info("a trace of the steps is in %s", path)

    def compile_rest(self, on_ready: Callable[[], None] | None = None) -> None:
        """Compiles every other bucket in the background; `on_ready` is called from there at the end."""
        begin_s = time.monotonic()

        def ready() -> None:
            seconds, stats = time.monotonic() - begin_s, self.runner.compile_stats
            logger.info(
                "ready: %d programs, %d of them compiled by this start; the rest took %.1f s in the background",
                stats.compiled_count + stats.loaded_count, stats.compiled_count, seconds,
            )
            if on_ready is not None:
                on_ready()

        if self.runner.is_ready:
            ready()
        else:
            self.runner.compile_rest(self._progress, ready)

    def close(self) -> None:
        """Drops all work and frees the device."""
        self.loop.close()


def build_engine(
    config: EngineConfig, *, progress: ProgressPort | None = None, member: Member | None = None
) -> LocalEngine:
    """An engine that serves with its smallest buckets; `compile_rest` brings the others.

    Args:
      member: this process among several that share the model; they start with all buckets, in the same order.
    Raises:
      ConfigError, ModelError or CapacityError where it cannot be.
    """
    if config.parallel.nnodes > 1 and member is None:
        raise ConfigError("nnodes: several machines share a model behind `jaxserve serve` only; use 1 here")
    progress = progress or NoProgress()
    _set_allocator(config)
    if member is not None:
        _join(config, member)
    seconds: dict[str, float] = {}
    with _phase(progress, seconds, "downloading", "download"):
        from jaxserve.weights.source import locate

        folder = locate(
            config.model.model, revision=config.model.revision, token=config.model.hf_token,
            download_dir=config.load.download_dir, load_format=config.load.load_format,
        )
        drafting = _draft_folder(config)
    with _phase(progress, seconds, "loading", "load"):
        from jaxserve.models.registry import read_spec

        spec = read_spec(folder, config.model.hf_overrides)
        if member is not None:
            from jaxserve.cluster.members import check_same

            check_same(member, "model", repr(spec))
        mesh, dtype = _place(config, spec)
        weights, draft_weights = weight_plan(config, spec, folder, mesh), None
        draft = None if drafting is None else _draft(config, spec, folder, drafting)
        if member is not None and draft is not None:
            check_same(member, "draft model", repr(draft.spec))
        if draft is not None and drafting is not None:
            draft_weights = weight_plan(config, draft.spec, drafting, mesh, is_draft=True)
        setup = _plan(config, spec, mesh, dtype, weights, draft, draft_weights, member)
        params, draft_params = _params(config, weights, mesh, dtype, progress), None
        if draft_weights is not None:
            draft_params = _params(config, draft_weights, mesh, dtype, progress)
    with _phase(progress, seconds, "compiling", "compile"):
        from jaxserve.runner.runner import Runner

        runner = Runner.create(setup=setup, params=params, draft_params=draft_params)
        del params, draft_params
        runner.compile_serving_set(progress, None if member is None else lambda: member.least("compiled"))
    scheduler = replace(config.scheduler, max_num_seqs=setup.shape.row_count)
    port = runner if member is None else _led(runner, member)
    speculation = _speculation(config, port) if drafting is not None else None
    loop = EngineLoop(port, config=scheduler, cache=config.cache, clock=MonotonicClock(), speculation=speculation)
    report = _report(config, setup, runner, dtype, seconds, weights, draft_weights)
    return LocalEngine(
        loop=loop, runner=runner, info=_info(config, spec, setup, dtype), folder=folder, report=report,
        _progress=progress,
    )


def _led(runner: Runner, member: Member) -> RunnerPort:
    """The runner, whose calls the first of several processes tells the others."""
    from jaxserve.cluster.members import Leader
    from jaxserve.cluster.replay import LeaderRunner

    return LeaderRunner(runner, member.tell) if isinstance(member, Leader) else runner


def _join(config: EngineConfig, member: Member) -> None:
    """Makes this process one of jax's several, before jax looks for devices."""
    from jaxserve.sharding.mesh import want_cpu_devices
    from jaxserve.sharding.processes import join_processes

    parallel = config.parallel
    want_cpu_devices(parallel.tensor_parallel_size // member.count)
    join_processes(parallel.master_addr, parallel.master_port, rank=member.rank, count=member.count)


def _set_allocator(config: EngineConfig) -> None:
    """Tells XLA how much of a GPU it may take; a value the user set in the environment stands."""
    if "XLA_CLIENT_MEM_FRACTION" not in os.environ:     # jax refuses to have both
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(config.cache.gpu_memory_utilization))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")   # XLA's start-up chatter


@contextmanager
def _phase(progress: ProgressPort, seconds: dict[str, float], name: str, label: str) -> Iterator[None]:
    progress.phase(name)
    begin_s = time.monotonic()
    yield
    seconds[label] = time.monotonic() - begin_s


def _place(config: EngineConfig, spec: ModelSpec) -> tuple[jax.sharding.Mesh, str]:
    """The mesh, and the type to compute in."""
    import jax

    from jaxserve.models.precision import compute_dtype
    from jaxserve.sharding.mesh import make_mesh, want_cpu_devices
    from jaxserve.sharding.processes import devices_of_all
    from jaxserve.sharding.split import check_has_experts
    from kernels_pallas.native import api as native

    size, has_whole_experts = config.parallel.tensor_parallel_size, config.parallel.enable_expert_parallel
    if has_whole_experts:
        check_has_experts(spec)
    if config.parallel.nnodes > 1:
        devices = devices_of_all(size // config.parallel.nnodes)
    else:
        if size > 1:
            want_cpu_devices(size)
        devices = jax.devices()
    mesh = make_mesh(devices, size, has_whole_experts=has_whole_experts)
    native.prepare()
    dtype, remark = compute_dtype(config.model.dtype, spec.dtype, jax.default_backend())
    if remark:
        logger.warning("%s", remark)
    return mesh, dtype


def _draft_folder(config: EngineConfig) -> Path | None:
    """Where the draft model is, if one drafts."""
    from jaxserve.weights.source import locate

    speculative = config.scheduler.speculative_config
    if speculative is None or speculative.model is None:
        return None
    return locate(
        speculative.model, revision=None, token=config.model.hf_token, download_dir=config.load.download_dir,
        load_format=config.load.load_format,
    )


def _draft(config: EngineConfig, spec: ModelSpec, folder: Path, draft_folder: Path) -> DraftSetup:
    from jaxserve.models.draft import check_draft
    from jaxserve.models.registry import read_spec
    from jaxserve.runner.setup import DraftSetup

    assert config.scheduler.speculative_config is not None
    draft = read_spec(draft_folder)
    check_draft(spec, draft, folder=folder, draft_folder=draft_folder)
    return DraftSetup(spec=draft, tokens_max=config.scheduler.speculative_config.num_speculative_tokens)


def _speculation(config: EngineConfig, port: DraftPort) -> ModelSpeculation:
    assert config.scheduler.speculative_config is not None
    return ModelSpeculation(config.scheduler.speculative_config, port)


def weight_plan(
    config: EngineConfig, spec: ModelSpec, folder: Path, mesh: jax.sharding.Mesh, *, is_draft: bool = False
) -> WeightPlan:
    """Which parameters will be packed. Raises ConfigError where --quantization and the checkpoint disagree."""
    from jaxserve.models.hf import read_config
    from jaxserve.quantization import online
    from jaxserve.quantization.formats.registry import find_scheme
    from jaxserve.weights.folder import format_of
    from jaxserve.weights.loader import open_checkpoint
    from jaxserve.weights.packed import decoded_count, plan, plan_online
    from kernels_pallas.native import api as native

    asked = config.model.quantization
    is_gguf = config.load.load_format != "dummy" and format_of(folder, config.load.load_format) == "gguf"
    content = read_config(folder, {} if is_draft else config.model.hf_overrides)
    scheme = find_scheme(folder, content, is_gguf=is_gguf)
    is_online = asked in get_args(online.Method)
    if scheme is None:
        if asked is not None and not is_online and not is_draft:
            raise ConfigError(
                f"quantization {asked}: the checkpoint is not quantised so (its config.json has no "
                "quantization_config that says it); leave the flag away"
            )
        packing = plan_online(spec, cast("online.Method", asked), mesh) if is_online else {}
        line = f"{asked}: {len(packing)} matrices" if packing else ""
    else:
        if asked not in (None, scheme.method) and not is_draft:
            raise ConfigError(
                f"quantization {asked}: the checkpoint is quantised by {scheme.method}; leave the flag away"
            )
        if config.load.load_format == "dummy":
            raise ConfigError(f"load-format dummy: a checkpoint in {scheme.method} has no dummy weights; use its own")
        assemblies = open_checkpoint(spec, folder, config.load.load_format, scheme)
        packing = plan(spec, mesh, assemblies)
        decoded = decoded_count(assemblies, packing)
        line = f"{scheme.method}: {len(packing)} matrices" + (f", {decoded} decoded while loading" if decoded else "")
    if packing:
        native.prepare(is_packed=True)
    return WeightPlan(spec=spec, folder=folder, packing=packing, scheme=scheme, line=line)


def _plan(
    config: EngineConfig, spec: ModelSpec, mesh: jax.sharding.Mesh, dtype: str, weights: WeightPlan,
    draft: DraftSetup | None, draft_weights: WeightPlan | None, member: Member | None,
) -> RunnerSetup:
    from jaxserve.models.decoder import abstract_params
    from jaxserve.models.draft import check_length
    from jaxserve.runner.start import plan_memory

    params, draft_params = abstract_params(spec, dtype, mesh, weights.packing), None
    if draft is not None and draft_weights is not None:
        draft_params = abstract_params(draft.spec, dtype, mesh, draft_weights.packing)
    setup = plan_memory(
        spec=spec, params=params, mesh=mesh, dtype=dtype, config=config, draft=draft, draft_params=draft_params,
        least=None if member is None else lambda sizes: member.least("memory", sizes),
    )
    if draft is not None:
        check_length(draft.spec, setup.shape.length_max)
    return setup


def _params(
    config: EngineConfig, weights: WeightPlan, mesh: jax.sharding.Mesh, dtype: str, progress: ProgressPort
) -> dict[str, Any]:
    if config.load.load_format == "dummy":
        from jaxserve.weights.random import random_params

        return random_params(weights.spec, mesh, dtype, config.model.seed, weights.packing)
    from jaxserve.weights.loader import load_params

    return load_params(
        weights.spec, weights.folder, mesh, dtype, progress, config.load.load_format, weights.packing, weights.scheme
    )


def _info(config: EngineConfig, spec: ModelSpec, setup: RunnerSetup, dtype: str) -> EngineInfo:
    shape, cache = setup.shape, config.cache
    page_count = sum(group.page_count for group in shape.groups)
    labels = {
        "block_size": shape.page_size, "num_gpu_blocks": page_count, "cache_dtype": setup.kv_codes or dtype,
        "gpu_memory_utilization": cache.gpu_memory_utilization, "enable_prefix_caching": cache.enable_prefix_caching,
        "kv_cache_memory_bytes": cache.kv_cache_memory_bytes,
    }
    return EngineInfo(
        model=config.model.model, vocab_size=spec.vocab_size, max_model_len=shape.length_max,
        page_size=shape.page_size, page_count=page_count, dtype=dtype, row_count=shape.row_count,
        cache_config={name: str(value) for name, value in labels.items()},
    )


def _report(
    config: EngineConfig, setup: RunnerSetup, runner: Runner, dtype: str, seconds: dict[str, float],
    weights: WeightPlan, draft_weights: WeightPlan | None,
) -> StartReport:
    import math

    import jax

    from jaxserve.models.decoder import abstract_params

    memory, devices, spec = setup.memory, setup.devices, weights.spec
    stats, buckets = runner.compile_stats, setup.buckets
    on_machines = f" on {config.parallel.nnodes} machines" if config.parallel.nnodes > 1 else ""
    return StartReport(
        model=config.model.model, family=spec.family,
        parameter_count=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(spec, dtype))),
        dtype=dtype, devices=f"{len(devices)} x {devices[0].device_kind}" + on_machines,
        mesh=", ".join(f"{name} {size}" for name, size in setup.mesh.shape.items()),
        weight_bytes=memory.weight_bytes, temporary_bytes=runner.temporary_bytes, pools=memory.pages(),
        concurrency=memory.concurrency, max_model_len=memory.length_max,
        row_count=setup.shape.row_count, tokens_max=buckets.tokens_max,
        buckets=f"tokens {' '.join(map(str, buckets.tokens))} | rows {' '.join(map(str, buckets.rows))}",
        compiled=f"{stats.compiled_count} compiled, {stats.loaded_count} from the cache; the rest in the background",
        draft="" if draft_weights is None else _draft_line(config, setup, dtype, draft_weights),
        attention=setup.attention or "", quantization=weights.line, seconds=seconds,
    )


def _draft_line(config: EngineConfig, setup: RunnerSetup, dtype: str, weights: WeightPlan) -> str:
    """The draft model and what it takes of a device, for people."""
    from jaxserve.models.decoder import abstract_params
    from jaxserve.runner.start import device_bytes

    assert setup.draft is not None and config.scheduler.speculative_config is not None
    spec, shape = setup.draft.spec, setup.shape
    weight_bytes = device_bytes(abstract_params(weights.spec, dtype, setup.mesh, weights.packing))
    pages = shape.groups[0].page_count * spec.kv_groups[0].page_bytes(shape.page_size, setup.dtype.itemsize)
    return (
        f"{config.scheduler.speculative_config.model} ({spec.family}, {len(spec.layers)} layers): "
        f"{size(weight_bytes)} of the weights, {size(pages)} of the KV pages"
    )
