"""Compiles programs ahead of time, or loads what an earlier start compiled, and counts every compilation.

Knows pure functions and abstract arguments; what they compute is no concern of this file.
Invariant: what `Compiler.build` returns accepts exactly the shapes it was built for, so that a wrong shape is an
error and never a silent compilation; and anything that compiles after `seal` is counted.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable

from jaxserve.runner.executable_store import ExecutableStore, private_folder
from kernels_pallas.native import api as native

logger = logging.getLogger("jaxserve.compile")

COMPILED_EVENT = "/jax/core/compile/backend_compile_duration"
SOURCES = ("runner", "models", "layers", "quantization", "sharding", "core/model_spec.py")  # what programs are made of

UNTRIED = {"xla_gpu_autotune_level": 0}

Executable = jax.stages.Compiled


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A pure function with everything that its compilation depends on.

    Attributes:
      name: unique within a runner, stable between starts; the profile shows it.
      arguments: pytrees of ShapeDtypeStruct with shardings.
      results: pytree of the result's structure whose leaves are its shardings: pinned, because a donated buffer
        that comes back under another sharding would compile the next caller a second time.
      donated: indices of the arguments whose buffers the program takes over.
      identity: everything the function closes over, as text.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    results: Any
    donated: tuple[int, ...] = ()
    identity: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileStats:
    """Programs and seconds so far, summed over threads."""

    compiled_count: int = 0
    loaded_count: int = 0
    after_seal_count: int = 0
    lower_s: float = 0.0
    compile_s: float = 0.0
    load_s: float = 0.0


class Compiler:
    """Builds programs. Mutable: counts; safe from any thread.

    Args:
      store: where executables survive the process; None keeps none.
    """

    def __init__(self, store: ExecutableStore | None, devices: tuple[jax.Device, ...]) -> None:
        self._store = store
        self._devices = devices
        self._lock = threading.Lock()
        self._counts: dict[str, float] = {}
        self._is_sealed = False
        # Processes would share out the autotuning and wait for each other's part; one that finds the program in its
        # store never does its part.
        self._options = {"xla_gpu_shard_autotuning": False} if jax.process_count() > 1 else None
        _listen(self)

    @property
    def stats(self) -> CompileStats:
        with self._lock:
            return CompileStats(**self._counts)  # type: ignore[arg-type]

    def seal(self) -> None:
        """From here on every compilation in this process is one too many, and counted as such."""
        self._is_sealed = True

    def build(self, program: Program) -> Executable:
        """The executable of `program`: from the store, else compiled and stored."""
        start_s = time.perf_counter()
        key = self._key(program) if self._store is not None else ""
        executable = self._load(key, program) if self._store is not None else None
        if executable is not None:
            self._count(loaded_count=1, load_s=time.perf_counter() - start_s)
            return executable
        function = functools.partial(program.function)
        function.__name__ = program.name  # type: ignore[attr-defined]
        lowered = jax.jit(function, donate_argnums=program.donated, out_shardings=program.results).lower(
            *program.arguments
        )
        lowered_s = time.perf_counter()
        executable, is_tried = self._compiled(lowered, program.name)
        compiled_s = time.perf_counter()
        self._count(compiled_count=1, lower_s=lowered_s - start_s, compile_s=compiled_s - lowered_s)
        logger.debug("%s: lowered in %.2f s, compiled in %.2f s", program.name, lowered_s - start_s,
                     compiled_s - lowered_s)
        if self._store is not None and is_tried:
            self._save(key, program, executable)
        return executable

    def _compiled(self, lowered: jax.stages.Lowered, name: str) -> tuple[Executable, bool]:
        """The executable, and whether it is the best that can be had: a GPU tries kernels out while it compiles, in
        memory that a running server's pages may have taken.
        """
        try:
            return lowered.compile(compiler_options=self._options), True
        except jax.errors.JaxRuntimeError as error:
            if self._devices[0].platform == "cpu":
                raise
            logger.warning("%s: compiled anew without trying kernels out: %s", name, str(error).partition("\n")[0])
            return lowered.compile(compiler_options={**(self._options or {}), **UNTRIED}), False

    def _load(self, key: str, program: Program) -> Executable | None:
        assert self._store is not None
        payload = self._store.load(key)
        if payload is None:
            return None
        try:
            return serialize_executable.deserialize_and_load(
                payload,
                jax.tree.structure((program.arguments, {})),
                jax.tree.structure(program.results),
                execution_devices=self._devices,
            )
        except Exception as error:  # whatever the deserialiser finds: a miss costs seconds, a crash the start
            logger.warning("%s: the stored executable does not load (%s): compiled anew", program.name, error)
            self._store.discard(key)
            return None

    def _save(self, key: str, program: Program, executable: Executable) -> None:
        assert self._store is not None
        if jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir:
            return   # it may have come out of jax's own cache: see open_store
        try:
            payload, in_tree, out_tree = serialize_executable.serialize(executable)
        except Exception as error:  # a backend that cannot serialise only loses the quick start
            logger.warning("%s: cannot be stored: %s", program.name, error)
            return
        assert in_tree == jax.tree.structure((program.arguments, {})), program.name
        assert out_tree == jax.tree.structure(program.results), program.name
        self._store.save(key, payload)

    def _key(self, program: Program) -> str:
        leaves, tree = jax.tree.flatten(program.arguments)
        shapes = [f"{leaf.shape}{leaf.dtype}{leaf.sharding}" for leaf in leaves]
        results, result_tree = jax.tree.flatten(program.results)
        parts = [
            environment(self._devices), program.name, program.identity, str(program.donated), str(tree), *shapes,
            str(result_tree), *map(str, results),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _count(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] = self._counts.get(name, 0) + amount

    def _on_compiled(self) -> None:
        if self._is_sealed:
            self._count(after_seal_count=1)


def open_store(folder: Path) -> ExecutableStore:
    """The executables kept under `folder`.

    jax's own persistent cache is switched off: an executable that comes out of it cannot be serialised again (on the
    CPU it loses its functions and fails when run), and this store makes it superfluous.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    return ExecutableStore(private_folder(folder) / "executables")


def _listen(compiler: Compiler) -> None:
    """Tells `compiler` of every compilation by jax; jax keeps listeners for good, so this one holds it weakly."""
    held = weakref.ref(compiler)

    def on_duration(event: str, duration_s: float, **_: object) -> None:
        listener = held()
        if event == COMPILED_EVENT and listener is not None:
            listener._on_compiled()

    jax.monitoring.register_event_duration_secs_listener(on_duration)


@functools.cache
def environment(devices: tuple[jax.Device, ...]) -> str:
    """What a compiled program depends on besides itself: code, versions, processor, flags."""
    client = devices[0].client
    flags = sorted((name, value) for name, value in os.environ.items() if name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    return "\n".join(
        [
            _source_digest(), native.identity(), jax.__version__, jaxlib.__version__, platform.machine(), _processor(),
            client.platform, client.platform_version, *(f"{device.device_kind}:{device.id}" for device in devices),
            f"process {jax.process_index()} of {jax.process_count()}",
            str(flags), str(jax.config.jax_default_matmul_precision), str(jax.config.jax_enable_x64),
        ]
    )


def _source_digest() -> str:
    """A digest of the code that programs are traced from, so that no edit can ever meet an old executable."""
    import kernels_pallas

    package = Path(__file__).parents[1]
    roots = [package / name for name in SOURCES] + [Path(kernels_pallas.__file__).parent]
    digest = hashlib.sha256()
    for root in roots:
        for path in [root] if root.suffix else sorted(root.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _processor() -> str:
    """What XLA's CPU code was made for: on a processor that lacks an instruction the program would be killed."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("flags", "Features", "model name"))))
