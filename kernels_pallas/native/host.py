"""Compiles native kernels for this host, once a process, and makes them known to XLA.

Invariant: a target's name carries a digest of its IR, so a compiled program that was stored with another version of a
kernel is never run with this one.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from kernels_pallas.native import attend, dot, runtime, vectors

FEATURE = "avx512bf16"
SWITCH = "KERNELS_PALLAS_NATIVE"      # environment: 0 or off leaves everything to XLA
KERNELS = (dot, attend)

_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Native:
    """Kernels that are compiled and registered: names of XLA's targets by kernel."""

    targets: Mapping[str, str]


@functools.cache
def refusals() -> tuple[str, ...]:
    """Why there are no native kernels here; empty where there are."""
    if os.environ.get(SWITCH, "").lower() in ("0", "off"):
        return (f"{SWITCH} is {os.environ[SWITCH]}",)
    if platform.machine() not in ("x86_64", "AMD64"):
        return (f"they are for x86-64, this is {platform.machine()}",)
    if importlib.util.find_spec("llvmlite") is None:
        return ("llvmlite is not installed (pip install llvmlite)",)
    import llvmlite.binding as llvm

    if not llvm.get_host_cpu_features().get(FEATURE):
        return (f"this CPU has no {FEATURE}",)
    if not _header().is_file():
        return (f"jaxlib came without {_header()}",)
    return ()


def native() -> Native:
    """Compiles and registers, the first time, which takes a second; call only where `refusals()` is empty."""
    with _lock:
        return _native()


@functools.cache
def _native() -> Native:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    text = _text()
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    module = llvm.parse_assembly(text)
    module.verify()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    builder = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=1))
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, target)
    engine.finalize_object()
    targets = {}
    for kernel in KERNELS:
        targets[kernel.NAME] = f"{kernel.NAME}_{digest}"
        address = ctypes.c_void_p(engine.get_function_address(kernel.NAME))
        function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address.value)
        jax.ffi.register_ffi_target(targets[kernel.NAME], jax.ffi.pycapsule(function), platform="cpu")
    engine.detach()     # XLA knows the functions for good: their code must outlive every Python object
    return Native(targets)


def _header() -> Path:
    return Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"


def _text() -> str:
    functions, version = runtime.header(_header())
    parts = [runtime.DECLARATIONS, runtime.ARGUMENTS, vectors.DECLARATIONS, vectors.power_of_two()]
    for kernel in KERNELS:
        parts += [kernel.kernel(), runtime.handler(kernel.NAME, functions, version)]
    return "\n".join(parts)
