"""Measures block sizes of the Hopper attention kernels on the GPU of this machine; writes kernels_pallas/tuned/.

    PYTHONPATH=. python scripts/tune_kernels.py --dry-run           # the trials; needs no GPU
    PYTHONPATH=. python scripts/tune_kernels.py                     # measure, and write tuned/DEVICE/OP.json
    PYTHONPATH=. python scripts/tune_kernels.py --op paged_decode --head-dim 128 --page 16

A trial is one size of blocks on some named cases, with a time limit, in a process that a fault replaces: results must
be those of XLA's form, else the size is out. The best has the least geometric mean of its times, relative to what
would be taken without a file; the file keeps all times, versions and the date. Needs jax with CUDA, no server and no
network.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import hopper
from kernels_pallas.hopper import Blocks
from kernels_pallas.paged_prefill.api import QUANTIZED_HEAD_DIM_MAX
from kernels_pallas.shapes import head_shape
from scripts.bench_kernels import CASES, call_of
from scripts.device_timing import chained_ms
from scripts.part_process import answer
from scripts.tuning import add_options, tune

OPS = ("paged_decode", "paged_prefill")
CODES = "float8_e4m3fn"      # of quantised trials; int8 has blocks of the same bytes
# Timed: a geometry a head dimension, at the sizes that servers meet.
SHAPES = {64: "gpt-oss-20b-global", 128: "llama-3.1-8b", 256: "gemma-3-4b-local"}
SIZES = {"paged_decode": ("1x2048", "16x2048", "64x512", "64x2048"), "paged_prefill": ("1024+0", "512+1536")}
CALLS = 10
ERROR_MAX = 0.02             # beside XLA's form, of its largest number


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One size of blocks for one kind of arrays."""

    op: str
    head_dim: int
    page: int
    is_quantized: bool
    blocks: Blocks

    @property
    def key(self) -> str:
        return hopper.tuned_key(self.head_dim, self.page, self.is_quantized)

    @property
    def need(self) -> hopper.Need:
        return need_of(self.op, self.head_dim, self.page, self.is_quantized)

    @property
    def name(self) -> str:
        return f"{self.op} {self.key}: blocks of {self.blocks.context}, {self.blocks.stages} stages"

    @property
    def cases(self) -> list[Any]:
        wanted = {f"{SHAPES[self.head_dim]}-{size}" for size in SIZES[self.op]}
        return [case for case in CASES[self.op] if case.name in wanted]


def need_of(op: str, head_dim: int, page: int, is_quantized: bool) -> hopper.Need:
    """Of the geometry that is timed."""
    if op == "paged_prefill":
        return hopper.prefill_need(head_dim, page, is_quantized=is_quantized)
    shape = head_shape(SHAPES[head_dim])
    return hopper.decode_need(
        head_dim, page, is_quantized=is_quantized, group=-(-shape.head_count // shape.kv_head_count // 8) * 8
    )


def trials(ops: list[str], head_dims: list[int], pages: list[int]) -> Iterator[Trial]:
    """The whole search."""
    for op in ops:
        for head_dim in head_dims:
            widest = hopper.block_slots(head_dim)
            for page in (size for size in pages if size <= widest):
                for is_quantized in (False, True):
                    if is_quantized and op == "paged_prefill" and head_dim > QUANTIZED_HEAD_DIM_MAX:
                        continue
                    for blocks in hopper.candidates(need_of(op, head_dim, page, is_quantized)):
                        yield Trial(op=op, head_dim=head_dim, page=page, is_quantized=is_quantized, blocks=blocks)


def run(trial: Trial) -> dict[str, Any]:
    """Milliseconds by case; raises where results are not XLA's."""
    kernel = getattr(importlib.import_module(f"kernels_pallas.{trial.op}.mosaic_gpu"), trial.op)
    times = {}
    for case in trial.cases:
        codes = CODES if trial.is_quantized else None
        call, arrays = call_of(trial.op, case, jnp.dtype(jnp.bfloat16), "xla", slots=trial.page, codes=codes)
        options = {"sink_N": None} | {name: value for name, value in call.keywords.items() if name != "implementation"}
        tuned = partial(kernel, blocks=trial.blocks, **options)
        expected, got = (np.asarray(jax.jit(form)(*arrays), np.float32) for form in (call, tuned))
        error = float(np.abs(got - expected).max() / np.abs(expected).max())
        if not error <= ERROR_MAX:      # NaN, too
            raise RuntimeError(f"{trial.name}, {case.name}: {error:.3g} beside XLA's form, at most {ERROR_MAX}")
        times[case.name] = chained_ms(tuned, arrays, CALLS)
    return {"ms": times}


def best(results: list[tuple[Trial, dict[str, Any]]], heuristic: Blocks) -> Blocks | None:
    """The size with the least geometric mean of times relative to the heuristic's; None where that did not run."""
    measured = {trial.blocks: found["ms"] for trial, found in results if "ms" in found}
    base = measured.get(heuristic)
    if base is None:
        return None

    def relative(blocks: Blocks) -> float:
        return math.fsum(math.log(measured[blocks][case] / ms) for case, ms in base.items())

    return min(measured, key=relative)


def record(results: list[tuple[Trial, dict[str, Any]]], said: dict[str, str]) -> dict[str, Any]:
    """What a file of `tuned/` holds: sizes by key, and how they were found."""
    blocks, measured = {}, {}
    for key in dict.fromkeys(trial.key for trial, _ in results):
        of_key = [(trial, found) for trial, found in results if trial.key == key]
        chosen = best(of_key, hopper.fitting(of_key[0][0].need))
        if chosen is not None:
            blocks[key] = dataclasses.asdict(chosen)
        measured[key] = [dataclasses.asdict(trial.blocks) | found for trial, found in of_key]
    return {"blocks": blocks, "evidence": said, "trials": measured}


def main() -> int:
    options = _options()
    if options.answer:
        return answer(lambda given: run(Trial(**given | {"blocks": Blocks(**given["blocks"])})))
    todo = list(trials(options.op, options.head_dim, options.page))
    if options.dry_run:
        for trial in todo:
            print(f"{trial.name}; {', '.join(case.name for case in trial.cases)}")
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
    parser.add_argument("--head-dim", type=int, choices=hopper.HEAD_DIMS, nargs="+", default=list(hopper.HEAD_DIMS))
    parser.add_argument("--page", type=int, choices=hopper.PAGE_SIZES, nargs="+", default=[16])
    add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
