"""Compiles native kernels for this host, once a process, and makes them known to XLA.

Kernels come in two sets, each compiled when it is first asked for: "plain", and "packed" for packed weights.
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
from pathlib import Path
from typing import Literal

import jax

from kernels_pallas.native import attend, dot, gated, kinds, norm, packed, runtime, tiles, vectors

FEATURE = "avx512bf16"
TILE_FEATURES = ("amx-tile", "amx-bf16", "amx-int8")
SWITCH = "KERNELS_PALLAS_NATIVE"      # environment: 0 or off leaves everything to XLA, lanes does without tiles
KernelSet = Literal["plain", "packed"]

_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18      # Linux, x86-64: asm/prctl.h

_lock = threading.Lock()


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


@functools.cache
def has_tiles() -> bool:
    """Whether this CPU has AMX's tile registers, and this process may use them: it asks Linux for that."""
    if os.environ.get(SWITCH, "").lower() == "lanes" or platform.system() != "Linux":
        return False
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if not all(features.get(name) for name in TILE_FEATURES):
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0


def targets(kernels: KernelSet = "plain") -> Mapping[str, str]:
    """XLA's names of a set's kernels, by their own.

    Compiles and registers them the first time, which takes a second; call only where `refusals()` is empty.
    """
    with _lock:
        return _targets(kernels)


@functools.cache
def _targets(kernels: KernelSet) -> Mapping[str, str]:
    names, text = _plain() if kernels == "plain" else _packed()
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    addresses = _compile(text, names)
    found = {}
    for name in names:
        found[name] = f"{name}_{digest}"
        function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(addresses[name])
        jax.ffi.register_ffi_target(found[name], jax.ffi.pycapsule(function), platform="cpu")
    return found


def _compile(text: str, names: list[str]) -> dict[str, int]:
    """Where the machine code of each function begins."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(text)
    module.verify()
    # LLVM would halve registers of 512 bits on Intel's CPUs, which were slow with them once.
    features = f"{llvm.get_host_cpu_features().flatten()},-prefer-256-bit"
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3
    )
    builder = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=1))
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, target)
    engine.finalize_object()
    addresses = {name: engine.get_function_address(name) for name in names}
    engine.detach()     # XLA knows the functions for good: their code must outlive every Python object
    return addresses


def _header() -> Path:
    return Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"


def _plain() -> tuple[list[str], str]:
    form, both = {"has_tiles": has_tiles()}, (kinds.BFLOAT16, kinds.ROUNDED)
    kernels = {numbers.name: dot.kernel(numbers, **form) for numbers in both}
    kernels |= {gated.NAME: gated.kernel(**form), attend.NAME: attend.kernel(**form), norm.NAME: norm.kernel()}
    products = [dot.products(numbers, **form) for numbers in both]
    return list(kernels), _module([vectors.powers(), *products], kernels)


def _packed() -> tuple[list[str], str]:
    kernels = {spelling.name: packed.variant(spelling) for spelling in packed.VARIANTS}
    kernels[kinds.INT8.name] = dot.kernel(kinds.INT8, has_tiles=has_tiles())
    products = [dot.products(numbers, has_tiles=has_tiles()) for numbers in (kinds.BFLOAT16, kinds.INT8)]
    return list(kernels), _module([packed.shared(), *products], kernels)


def _module(shared: list[str], kernels: Mapping[str, str]) -> str:
    functions, version = runtime.header(_header())
    parts = [runtime.DECLARATIONS, runtime.ARGUMENTS, vectors.DECLARATIONS]
    parts += [tiles.shared(), *shared] if has_tiles() else shared
    for name, text in kernels.items():
        parts += [text, runtime.handler(name, functions, version)]
    return "\n".join(parts)
