"""Measures tiles of the Hopper kernels that multiply codes on the GPU of this machine; writes kernels_pallas/tuned/.

    PYTHONPATH=. python scripts/tune_products.py --dry-run            # the trials; needs no GPU
    PYTHONPATH=. python scripts/tune_products.py                      # measure, and write tuned/DEVICE/OP.json
    PYTHONPATH=. python scripts/tune_products.py --op quantized_matmul --match awq

A trial is one size of tiles on one named case, with a time limit, in a process that a fault replaces: results must be
those of XLA's form, else the size is out. The quickest is kept where the size that is taken without a file ran, too;
the file keeps all times, versions and the date. Needs jax with CUDA, no server and no network.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import hopper
from kernels_pallas.hopper import Tiles
from kernels_pallas.quantized_matmul import sizes
from scripts.bench_kernels import CASES, call_of
from scripts.device_timing import chained_ms
from scripts.gpu_parts import narrowed
from scripts.part_process import answer
from scripts.tuning import add_options, tune

OPS = ("quantized_matmul", "eight_bit_matmul")
CALLS = 20
ERROR_MAX = 0.02             # beside XLA's form, of its largest number


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One size of tiles for one case."""

    op: str
    case: str
    tiles: Tiles

    @property
    def name(self) -> str:
        tiles = self.tiles
        return f"{self.op} {self.case}: {tiles.rows} rows x {tiles.outs} outputs, {tiles.stages} stages"


def case_of(op: str, name: str) -> Any:
    """A named case."""
    return next(case for case in CASES[op] if case.name == name)


def tried(op: str, case: Any) -> tuple[str, tuple[Tiles, ...]]:
    """The key of a case in the file, and every size that fits, first what is taken without one."""
    arrays = jax.eval_shape(lambda: call_of(op, case, jnp.dtype(jnp.bfloat16))[1])
    if op == "quantized_matmul":
        return sizes.key(arrays[1], case.tokens), sizes.tiles(arrays[1], case.tokens)
    from kernels_pallas.eight_bit_matmul import mosaic_gpu  # late: it needs jax >= 0.11

    key = mosaic_gpu.key(case.dtype, case.groups, case.width_out, case.width, case.tokens)
    return key, mosaic_gpu.tiles(jnp.dtype(case.dtype), case.width_out, case.tokens)


def trials(ops: list[str], match: str) -> Iterator[Trial]:
    """The whole search."""
    for op in ops:
        for case in CASES[op]:
            for tiles in tried(op, case)[1] if match in case.name else ():
                yield Trial(op=op, case=case.name, tiles=tiles)


def run(trial: Trial) -> dict[str, Any]:
    """Milliseconds; raises where results are not XLA's."""
    call, arrays = call_of(trial.op, case_of(trial.op, trial.case), jnp.dtype(jnp.bfloat16), "xla")
    if trial.op == "quantized_matmul":
        from kernels_pallas.quantized_matmul import mosaic_gpu as of_codes

        tuned: Any = partial(of_codes.quantized_matmul, tiles=trial.tiles)
    else:
        from kernels_pallas.eight_bit_matmul import mosaic_gpu as of_eight_bits

        arrays = (*arrays, None, None)[:4]
        tuned = partial(of_eight_bits.eight_bit_matmul, sizes=trial.tiles)
    expected, got = (np.asarray(jax.jit(form)(*arrays), np.float32) for form in (call, tuned))
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    if not error <= ERROR_MAX:      # NaN, too
        raise RuntimeError(f"{trial.name}: {error:.3g} beside XLA's form, at most {ERROR_MAX}")
    return {"ms": chained_ms(partial(narrowed, tuned), arrays, CALLS)}


def record(results: list[tuple[Trial, dict[str, Any]]], said: dict[str, str]) -> dict[str, Any]:
    """What a file of `tuned/` holds: sizes by key, and how they were found."""
    blocks, measured = {}, {}
    for op, name in dict.fromkeys((trial.op, trial.case) for trial, _ in results):
        of_case = [(trial, found) for trial, found in results if trial.case == name]
        key, every = tried(op, case_of(op, name))
        times = {trial.tiles: found["ms"] for trial, found in of_case if "ms" in found}
        if every[0] in times:
            blocks[key] = dataclasses.asdict(min(times, key=lambda tiles: times[tiles]))
        measured[name] = [dataclasses.asdict(trial.tiles) | found for trial, found in of_case]
    return {"blocks": blocks, "evidence": said, "trials": measured}


def main() -> int:
    options = _options()
    if options.answer:
        return answer(lambda given: run(Trial(**given | {"tiles": Tiles(**given["tiles"])})))
    todo = list(trials(options.op, options.match))
    if options.dry_run:
        print(*(trial.name for trial in todo), sep="\n")
        print(f"{len(todo)} trials, at most {options.timeout:.0f} s each")
        return 0
    if (why := hopper.environment_refusals()):
        print(f"nothing to tune here: {'; '.join(why)}", file=sys.stderr)
        return 2
    tune(__file__, options, todo, record)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, nargs="+", default=list(OPS))
    parser.add_argument("--match", default="", help="only cases with this in their name")
    add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
