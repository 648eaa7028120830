"""Counts what a decode step launches on an H200 without one, part by part; two tables of docs/kernels.md.

    make kernels-check                                # after the engine's programs
    make kernels-check ARGS=--write                   # write the tables anew

The engine's own programs with the Hopper kernels, 64 rows: of layers the ones for steps of decodes only, and all
launches of those with prefill beside them. Launches and bytes are read off the optimised HLO (`hlo_kernels`), so they
say what is there to win and not how long anything takes. Fails on any figure that differs.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

os.environ["JAX_PLATFORMS"] = "cpu"     # before jax: the plugin is there, its device is not

import jax

from scripts import check_kernels
from scripts.check_sharded_steps import ROWS, engine
from scripts.hlo_kernels import Launch, launches
from scripts.published_models import MODELS

LAYER, SAMPLING = "launches of a layer", "launches of sampling"
FEW = (2, 8)     # rows of other buckets that sampling is checked for, not printed
# Parts of a layer, the first that fits: (kind, scope) of a launch.
PARTS = {
    "products of weights": r"product .*",
    "attention's kernels": r"kernel .*",
    "norms": r".*_norm/",
    "page write: bias, rope of keys": r".*attention\.write",
    "queries: bias, rope, rows of decodes": r".*attention\.(qkv|decode)",
    "activation of the MLP": r".*/mlp/",
    "residual additions": r".*Block/add$",
    "constants": r".*",
}
ALL, ALL_MIXED = "all", "all, where a step has prefill, too"
# Stages of sampling, the first that fits what stands in a program's or branch's scopes.
LOGITS = "logits, state, whether finite"
STAGES = {
    LOGITS: r"Decoder\.logits",
    "all rows greedy: first maximum": r"^conditional 0 \S+ region[^ ]* (?!.*(sample\.|conditional))",
    "logprobs, where a row wants some": r"sample\.logprobs",
    "top-k": r"top_k",
    "top-p": r"top_p",
    "min-p": r"min_p",
    "masks and penalties, where a row wants some": r"conditional 0 \S*sample\.shape/cond ",
    "the same, where none does": r"conditional 1 \S*sample\.shape/cond ",
    "branches that do nothing": r"conditional 1 \S*sample\.restrict/\S* \S+ *$",
    "temperature and draw": r"sample\.choose",
    "others": r"",
}


def layer_table() -> Iterator[str]:
    """A row a part: launches of a layer, bytes read and written, and those as a share of the layer's weights."""
    counted = {name: _of_layers(name) for name in MODELS}
    yield from _head("part of a layer", "KiB", {name: weights for name, (_, weights) in counted.items()})
    for part in (*PARTS, ALL, ALL_MIXED):
        cells = [_cells(found.get(part, []), weights) for found, weights in counted.values()]
        yield f"| {part} | " + " | ".join(cells) + " |"


def _head(first: str, unit: str, weights: Mapping[str, int]) -> Iterator[str]:
    """Of a table with three columns a model."""
    columns = (f"{name}: launches | {unit} | % of {size >> 20} MiB of weights" for name, size in weights.items())
    yield f"| {first} | " + " | ".join(columns) + " |"
    yield "|---|" + "---|" * 3 * len(weights)


def _cells(found: Sequence[tuple[float, float]], weights: int) -> str:
    count, size = (sum(each) for each in zip(*found, strict=True)) if found else (0, 0)
    return f"{count:.2f} | {size / 1024:.0f} | {100 * size / weights:.1f}"


def _of_layers(name: str) -> tuple[dict[str, list[tuple[float, float]]], int]:
    """(launches, bytes) of one layer by part, and the bytes of its weights."""
    with engine(name, 1, "mosaic_gpu") as (setup, programs, compiler):
        tokens = min(size for size in setup.buckets.tokens if size >= ROWS)
        program, layers = programs.decode_layers(tokens)[0], len(programs.segments[0].layers)
        text, mixed = (compiler.build(each).as_text() for each in (program, programs.forward(tokens)[1]))
        group = setup.spec.kv_groups[0]
        pool = f"[{setup.shape.groups[0].page_count},{group.kv_head_count},{setup.shape.page_size},{group.head_dim}]"
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.arguments[0])) // layers
    found: dict[str, list[tuple[float, float]]] = {"products of weights": [(0, -weights)]}     # beside the weights
    for each in launches(text, pool):
        part = next(part for part, what in PARTS.items() if re.match(what, f"{each.kind} {each.scope}"))
        found.setdefault(part, []).append((1 / layers, (each.read + each.written) / layers))
    found[ALL] = [each for of_part in found.values() for each in of_part]
    of_mixed = [(1 / layers, (each.read + each.written) / layers) for each in launches(mixed, pool)]
    found[ALL_MIXED] = [*of_mixed, (0, -weights)]
    return found, weights


def sampling_table() -> Iterator[str]:
    """A row a stage: launches, bytes, and those as a share of the matrix that makes logits."""
    counted = {name: _of_sampling(name, ROWS) for name in MODELS}
    for name, (found, _) in counted.items():
        _refuse_copies(name, found)
    yield from _head("stage of sampling", "MiB", {name: weights for name, (_, weights) in counted.items()})
    for stage in STAGES:
        cells = []
        for found, weights in counted.values():
            count, size = found.get(stage, (0, 0))
            cells.append(f"{count} | {size / 2**20:.0f} | {100 * size / weights:.1f}")
        yield f"| {stage} | " + " | ".join(cells) + " |"


def _refuse_copies(name: str, of_all: dict[str, tuple[int, int]]) -> None:
    """Raises where a search takes more bytes a row for few rows than for all: XLA fuses otherwise by size."""
    for count in FEW:
        found, _ = _of_sampling(name, count)
        for stage in ("top-k", "top-p"):
            ours, usual = found[stage][1] / count, of_all[stage][1] / ROWS
            if ours > 1.5 * usual:
                raise RuntimeError(f"{name}: {stage} takes {ours:.0f} bytes a row of {count}, {usual:.0f} of {ROWS}")


def _of_sampling(name: str, rows: int) -> tuple[dict[str, tuple[int, int]], int]:
    """(launches, bytes) by stage, and the bytes of the weights that make logits."""
    with engine(name, 1, "mosaic_gpu") as (_, programs, compiler):
        program = programs.sample(rows)
        text = compiler.build(program).as_text()
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.arguments[0]))
    if " while(" in text:
        raise RuntimeError(f"{name}: sampling has a loop, and is no longer one command buffer")
    by_path: dict[tuple[str, ...], list[Launch]] = {}
    for each in launches(text):
        by_path.setdefault(each.path, []).append(each)
    found: dict[str, tuple[int, int]] = {}
    for path, of_path in by_path.items():
        where = " ".join((*path, *(each.scope for each in of_path)))
        stage = next(stage for stage, what in STAGES.items() if re.search(what, where))
        count, size = found.get(stage, (0, 0))
        size += sum(each.read + each.written for each in of_path) - (weights if stage == LOGITS else 0)
        found[stage] = count + len(of_path), size
    return found, weights


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/kernels.md")
    options = parser.parse_args()
    if (why := check_kernels.missing()) is not None:
        print(why)
        return 2
    status = 0
    for title, table in ((LAYER, layer_table), (SAMPLING, sampling_table)):
        fresh = "\n".join(["", *table(), ""])
        print(fresh, flush=True)
        begin, end = f"<!-- {title}: begin -->", f"<!-- {title}: end -->"
        status |= check_kernels.compare(fresh, begin, end, is_written=options.write)
    return status


if __name__ == "__main__":
    sys.exit(main())
