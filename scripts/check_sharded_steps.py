"""Compiles the engine's own programs for eight H200s without one, with the Hopper kernels; a table of docs/kernels.md.

    make kernels-check                                # after whole steps on one GPU
    make kernels-check ARGS=--write                   # write the tables anew

Fails where a program copies the cache or does not alias all it has of it, where a layer lacks a kernel or sends more
than two all-reduces, and on any figure that differs from the table. Says nothing of speed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"     # before jax: the plugin is there, its device is not

import jax

from jaxserve.flags import engine_config_from_kwargs
from jaxserve.models.registry import read_spec
from jaxserve.plan.devices import kind
from jaxserve.plan.sizes import Sizer
from jaxserve.plan.temporaries import compile_only_mesh
from jaxserve.runner.compile import Compiler
from jaxserve.runner.programs import ProgramSet
from scripts import check_kernels
from scripts.check_steps import KERNELS
from scripts.published_models import MODELS

BEGIN, END = "<!-- steps compiled for eight H200: begin -->", "<!-- steps compiled for eight H200: end -->"
HEADER = (
    "| model | program | tokens | layers | temporaries MiB | cache in place MiB | attention kernels | all-reduce "
    "| all-to-all | all-gather |\n|---|---|---|---|---|---|---|---|---|---|"
)
DEVICES, ROWS, LENGTH_MAX, POOL = 8, 64, 8192, "2G"
COLLECTIVE = re.compile(r"= \S.*? (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
COPY = re.compile(r"= (\w+\[[\d,]+\])\S* copy(?:-start)?\(")


def rows(name: str) -> Iterator[str]:
    """A decode step and one of many tokens: embedding, a segment of layers, final norm; sampling."""
    device = kind("H200")
    mesh = compile_only_mesh(device, DEVICES, has_whole_experts=False)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        (folder / "config.json").write_text(json.dumps(MODELS[name]))
        spec = read_spec(folder)
        config = engine_config_from_kwargs(
            path, tensor_parallel_size=DEVICES, max_num_seqs=ROWS, max_num_batched_tokens=2048, dtype="bfloat16",
            max_model_len=LENGTH_MAX, attention_backend="mosaic_gpu", kv_cache_memory_bytes=POOL,
        )
        sized = Sizer(spec=spec, folder=folder).size(config, device, lambda *_: 0, mesh=mesh)
    setup = sized.setup
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        programs, compiler = ProgramSet(setup, sized.params[0]), Compiler(None, setup.devices)
        assert len({segment.kind for segment in programs.segments}) == 1, "all layers are alike"
        layers = len(programs.segments[0].layers)
        cache = setup.memory.pool_bytes // len(spec.layers) * layers
        page = _page(setup.shape.groups[0].page_count, spec, setup.shape.page_size)
        decode = min(size for size in setup.buckets.tokens if size >= ROWS // 2)
        for tokens in (decode, setup.buckets.tokens_max):
            for part, program in zip(("begin", "layers", "finish"), programs.forward(tokens), strict=True):
                yield _row(name, part, tokens, layers, cache, page, compiler.build(program))
        yield _row(name, "sample", ROWS, layers, cache, page, compiler.build(programs.sample(ROWS)))


def _page(count: int, spec: object, slots: int) -> str:
    """How HLO spells one device's keys of a layer."""
    group = spec.kv_groups[0]   # type: ignore[attr-defined]
    return f"[{count},{max(1, group.kv_head_count // DEVICES)},{slots},{group.head_dim}]"


def _row(name: str, part: str, tokens: int, layers: int, cache: int, page: str, executable: jax.stages.Compiled) -> str:
    memory, text = executable.memory_analysis(), executable.as_text()
    sent, is_layers = Counter(COLLECTIVE.findall(text)), part == "layers"
    kernels = text.count('custom_call_target="mosaic_gpu_v2"')
    held = memory.alias_size_in_bytes if is_layers else 0
    copies = [shape for shape in COPY.findall(text) if shape.endswith(page)]
    if is_layers and (held < cache or kernels != layers * len(KERNELS) or sent["all-reduce"] != 2 * layers or copies):
        raise RuntimeError(
            f"{name} {part} {tokens}: {held} of {cache} bytes aliased, {kernels} kernels, {sent}, {copies}"
        )
    return (
        f"| {name} | {part} | {tokens} | {layers if is_layers else ''} | {memory.temp_size_in_bytes / 2**20:.0f} | "
        f"{held / 2**20 if is_layers else 0:.0f} | {kernels} | {sent['all-reduce']} | {sent['all-to-all']} | "
        f"{sent['all-gather']} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/kernels.md")
    options = parser.parse_args()
    if (why := check_kernels.missing()) is not None:
        print(why)
        return 2
    print(HEADER)
    found = []
    for name in MODELS:
        for one in rows(name):
            print(one, flush=True)
            found.append(one)
    return check_kernels.compare("\n".join(["", HEADER, *found, ""]), BEGIN, END, is_written=options.write)


if __name__ == "__main__":
    sys.exit(main())
