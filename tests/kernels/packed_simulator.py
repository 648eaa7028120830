"""One case of the packed products' Hopper kernels in jax's simulator, with races looked for; a process of its own.

    python -m tests.kernels.packed_simulator int4-zero

The simulator takes no A operand from registers; `allow_registers` lets it (test code: jax has no public way). Prints
one line of JSON: the largest error beside exact products and how large they are, and whether any race was found.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.hopper import Tiles
from tests.kernels.simulator import races_found
from tests.kernels.test_quantized_matmul import packed, rows


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A product. `programs` cut its tiles at places that are no ends of tiles, and each uses its ring of two again.

    Attributes:
      kind: of packed weights, or what both sides are.
    """

    kind: str
    tokens: int = 20
    outs: int = 128
    ins: int = 384
    group: int = 128
    rows: int = 8
    warpgroups: int = 2
    programs: int = 2
    bug: str | None = None   # planted: the check must see it


CASES = {
    "int4-zero": Case(kind="int4-zero"),
    "int4-zero-one-group": Case(kind="int4-zero", group=384, outs=192, warpgroups=1, programs=4),
    "int4-zero-many-rows": Case(kind="int4-zero", tokens=130, rows=128, ins=256),
    "int4-zero-short-groups": Case(kind="int4-zero", group=32),
    "int4-offset": Case(kind="int4-offset", group=64),
    "int8-zero": Case(kind="int8-zero", ins=192, group=64),
    "int8-zero-short-groups": Case(kind="int8-zero", ins=192, group=16, rows=16, tokens=30),
    "int8-offset": Case(kind="int8-offset", ins=192, group=32),
    "lut4-own": Case(kind="lut4-own"),
    "lut4-shared": Case(kind="lut4-shared", group=64),
    "fp8": Case(kind="fp8", ins=192, group=64),
    "fp4": Case(kind="fp4", group=32),
    "more-programs-than-work": Case(kind="int4-zero", tokens=5, ins=128, outs=64, warpgroups=1, programs=3),
    "int8-both": Case(kind="int8", outs=192, warpgroups=1),
    "fp8-both": Case(kind="float8_e4m3fn"),
    "fp8-both-groups": Case(kind="float8_e4m3fn", ins=512, group=256, rows=16, tokens=20),
    "bug-both-not-awaited": Case(kind="float8_e4m3fn", bug="barrier_wait"),
    "bug-rows-not-awaited": Case(kind="int4-zero", bug="barrier_wait"),
    "bug-codes-not-committed": Case(kind="int4-zero", bug="commit_smem"),
}
QUICK = ("int4-zero",)
EXACT = ("int4-zero", "int4-zero-one-group", "int8-zero", "fp8", "int8-both", "fp8-both", "fp8-both-groups")


def run(case: Case) -> dict[str, float | bool]:
    """What the simulated kernel gives beside exact products with the weights' float32 values."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    simulated = plgpu.InterpretGPUParams(detect_races=True)
    tiles = Tiles(rows=case.rows, warpgroups=case.warpgroups, stages=2, programs=case.programs)
    if case.kind in ("int8", "float8_e4m3fn"):
        from kernels_pallas.eight_bit_matmul import mosaic_gpu as of_eight_bits

        plant(case.bug, of_eight_bits)
        arrays, exact = eight_bits(case)
        found = of_eight_bits.eight_bit_matmul(*arrays, sizes=tiles, interpret=simulated)
    else:
        from kernels_pallas.quantized_matmul import mosaic_gpu

        allow_registers()
        plant(case.bug, mosaic_gpu)
        weight, value_OI = packed(case.kind, case.outs, case.ins, case.group)
        x_TI = rows(case.tokens, case.ins)
        exact = np.asarray(x_TI, np.float64) @ value_OI.astype(np.float64).T
        found = mosaic_gpu.quantized_matmul(x_TI, weight, tiles=tiles, interpret=simulated)
    error = np.abs(np.asarray(found, np.float64) - exact)
    return {"error": float(error.max()), "largest": float(np.abs(exact).max()), "races": races_found()}


def eight_bits(case: Case) -> tuple[tuple[jax.Array | None, ...], Any]:
    """Rows, weights and scales by group, and their exact product. One group has no scales."""
    rng = np.random.default_rng(0)
    if case.kind == "int8":
        codes = [rng.integers(-128, 128, (size, case.ins)) for size in (case.tokens, case.outs)]
        return (*(jnp.asarray(code, jnp.int8) for code in codes), None, None), (codes[0] @ codes[1].T).astype(float)
    values = [jnp.asarray(rng.normal(size=(size, case.ins)) * 8, case.kind) for size in (case.tokens, case.outs)]
    groups = case.ins // case.group if case.group > 128 else 1
    scales = [rng.random((len(value), groups)).astype(np.float32) for value in values]
    if groups == 1:
        scales = [np.ones_like(scale) for scale in scales]
    wide = [
        np.asarray(value, np.float64) * np.repeat(scale, case.ins // groups, 1)
        for value, scale in zip(values, scales, strict=True)
    ]
    given = (None, None) if groups == 1 else tuple(map(jnp.asarray, scales))
    return (*values, *given), wide[0] @ wide[1].T


def plant(bug: str | None, kernel: types.ModuleType) -> None:
    """Breaks the kernel: a check that cannot fail checks nothing."""
    if bug is None:
        return
    known = kernel.plgpu
    broken = types.SimpleNamespace(**{name: getattr(known, name) for name in dir(known)})
    setattr(broken, bug, lambda *_: None)
    kernel.plgpu = broken


def allow_registers() -> None:
    """wgmma's A operand from registers, in the simulator: an array is served where it looks a buffer up."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    known = getattr(gpu_callbacks.wgmma, "__wrapped__", gpu_callbacks.wgmma)
    given = object()

    def wgmma(*, a_allocation_key_as_array: Any, **options: Any) -> Any:
        array = np.asarray(a_allocation_key_as_array)
        memory = gpu_callbacks._get_shared_memory()

        class Served:
            def __getattr__(self, name: str) -> Any:
                return getattr(memory, name)

            def access(self, key: Any, transforms: Any) -> Any:
                return None if key is given else memory.access(key, transforms)

            def get_buffer_content(self, key: Any, *arguments: Any, **others: Any) -> Any:
                return (array, None, None) if key is given else memory.get_buffer_content(key, *arguments, **others)

        class Keys:
            @staticmethod
            def from_array(key: Any) -> Any:
                is_array = np.asarray(key).ndim == 2
                return given if is_array else gpu_callbacks.HostAllocationKey.from_array(key)

        # A copy of the function with names of its own: other simulated threads are in the original.
        if array.ndim == 2:
            names = known.__globals__ | {"_get_shared_memory": Served, "HostAllocationKey": Keys}
            own = types.FunctionType(known.__code__, names, known.__name__, known.__defaults__, known.__closure__)
            own.__kwdefaults__ = known.__kwdefaults__
            return gpu_callbacks.fail_on_exception(own)(a_allocation_key_as_array=array, **options)
        return gpu_callbacks.fail_on_exception(known)(a_allocation_key_as_array=array, **options)

    gpu_callbacks.wgmma = wgmma


if __name__ == "__main__":
    print(json.dumps(run(CASES[sys.argv[1]])))
