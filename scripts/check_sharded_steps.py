"""Compiles the engine's own programs for H200s without one; two tables of docs/kernels.md.

For eight with the Hopper kernels, and for one with what `auto` takes there, XLA's loops (and Triton's product of
experts).

    make kernels-check                                # after whole steps on one GPU
    make kernels-check ARGS=--write                   # write the tables anew

Fails where a program copies the cache or does not alias all it has of it, where a layer lacks a kernel, has another one
or sends more than two all-reduces (a mixture's experts and what all tokens share are summed by one), where temporaries
pass a bound, and on any figure that differs from the table. Says nothing of speed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"     # before jax: the plugin is there, its device is not

import jax

from jaxserve.core.model_spec import LayerSpec, MoeMlp
from jaxserve.flags import engine_config_from_kwargs
from jaxserve.models.registry import read_spec, spec_from_config
from jaxserve.plan.devices import kind
from jaxserve.plan.sizes import Sizer
from jaxserve.plan.temporaries import compile_only_mesh
from jaxserve.runner.compile import Compiler
from jaxserve.runner.programs import ProgramSet
from jaxserve.runner.setup import RunnerSetup
from scripts import check_kernels
from scripts.check_steps import KERNELS
from scripts.published_models import CUT, LATENT, MODELS

TABLES = {     # title -> devices, --attention-backend, models
    "steps compiled for eight H200": (8, "mosaic_gpu", MODELS | LATENT | CUT),
    "steps compiled for one H200 by auto": (1, "auto", MODELS | LATENT),
}
HEADER = (
    "| model | program | tokens | layers | temporaries MiB | cache in place MiB | attention kernels | expert kernels "
    "| all-reduce | all-to-all | all-gather |\n|---|---|---|---|---|---|---|---|---|---|---|"
)
ROWS, LENGTH_MAX, POOL = 64, 8192, "2G"
TEMPORARIES_MAX = 1 << 30     # of a program: far less than the pool that they are taken from
COLLECTIVE = re.compile(r"= \S.*? (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
KERNEL = re.compile(r'custom_call_target="([^"]+)"')
COPY = re.compile(r"= (\w+\[[\d,]+\])\S* copy(?:-start)?\(")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """Of a program of layers.

    Attributes:
      kernels: Mosaic GPU calls of a layer.  expert_kernels: Triton calls of a layer with experts.
      sums: all-reduces of a layer.
      cache: bytes that are aliased at least.  page: how HLO spells one device's keys of a layer.
    """

    kernels: int
    expert_kernels: int
    sums: int
    cache: int
    page: str


@contextlib.contextmanager
def engine(name: str, devices: int, backend: str) -> Iterator[tuple[RunnerSetup, ProgramSet, Compiler]]:
    """A model's programs as the engine on so many H200s would have them, and who compiles them without one."""
    device = kind("H200")
    mesh = compile_only_mesh(device, devices, has_whole_experts=False)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        (folder / "config.json").write_text(json.dumps((MODELS | LATENT | CUT)[name]))
        config = engine_config_from_kwargs(
            path, tensor_parallel_size=devices, max_num_seqs=ROWS, max_num_batched_tokens=2048, dtype="bfloat16",
            max_model_len=LENGTH_MAX, attention_backend=backend, kv_cache_memory_bytes=POOL,
        )
        sized = Sizer(spec=read_spec(folder), folder=folder).size(config, device, lambda *_: 0, mesh=mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield sized.setup, ProgramSet(sized.setup, sized.params[0]), Compiler(None, sized.setup.devices)


def rows(name: str, devices: int, backend: str) -> Iterator[str]:
    """A step of decodes only and one of many tokens: embedding, each kind of segment, final norm; sampling."""
    spec = spec_from_config((MODELS | LATENT | CUT)[name])
    with engine(name, devices, backend) as (setup, programs, compiler):
        firsts = {
            segment.kind: spec.layers[segment.start : segment.stop] for segment in reversed(programs.segments)
        }
        group = spec.kv_groups[0]
        heads = max(1, group.kv_head_count // devices)
        expected = Expected(
            kernels=len(KERNELS["prefill"]) if backend == "mosaic_gpu" else 0,
            expert_kernels=2 if setup.experts == "triton" else 0, sums=2 if devices > 1 else 0,
            cache=setup.memory.pool_bytes // len(spec.layers),
            page=f"[{setup.shape.groups[0].page_count},{heads},{setup.shape.page_size},{group.head_dim}]",
        )
        decode = min(size for size in setup.decode_tokens if size >= ROWS // 2)
        of_decode = dataclasses.replace(expected, kernels=len(KERNELS["decode"]) if expected.kernels else 0)
        for tokens, of_layers in ((decode, of_decode), (setup.buckets.tokens_max, expected)):
            begin, *between, finish = programs.forward(tokens)
            if tokens == decode:
                between = list(programs.decode_layers(tokens))
            yield _row(name, "begin", tokens, (), expected, compiler.build(begin))
            for layers, program in zip((firsts[kind] for kind in range(len(firsts))), between, strict=True):
                yield _row(name, "layers", tokens, layers, of_layers, compiler.build(program))
            yield _row(name, "finish", tokens, (), expected, compiler.build(finish))
        yield _row(name, "sample", ROWS, (), expected, compiler.build(programs.sample(ROWS)))


def _row(
    name: str, part: str, tokens: int, layers: Sequence[LayerSpec], expected: Expected, executable: jax.stages.Compiled
) -> str:
    memory, text, count = executable.memory_analysis(), executable.as_text(), len(layers)
    mixtures = sum(isinstance(layer.mlp, MoeMlp) for layer in layers)
    sent, called = Counter(COLLECTIVE.findall(text)), Counter(KERNEL.findall(text))
    kernels, expert_kernels = called["mosaic_gpu_v2"], called["__gpu$xla.gpu.triton"]
    held = memory.alias_size_in_bytes if layers else 0
    copies = [shape for shape in COPY.findall(text) if shape.endswith(expected.page)]
    wanted = (count * expected.kernels, mixtures * expected.expert_kernels, count * expected.sums)
    found = (kernels, expert_kernels, sent["all-reduce"])
    if layers and (held < count * expected.cache or found != wanted or copies):
        raise RuntimeError(
            f"{name} {part} {tokens}: {held} of {count * expected.cache} bytes aliased, calls {found}, not {wanted}, "
            f"{copies}"
        )
    if memory.temp_size_in_bytes > TEMPORARIES_MAX:
        raise RuntimeError(f"{name} {part} {tokens}: {memory.temp_size_in_bytes} bytes of temporaries")
    return (
        f"| {name} | {part} | {tokens} | {count or ''} | {memory.temp_size_in_bytes / 2**20:.0f} | "
        f"{held / 2**20:.0f} | {kernels} | {expert_kernels} | {sent['all-reduce']} | {sent['all-to-all']} | "
        f"{sent['all-gather']} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/kernels.md")
    options = parser.parse_args()
    if (why := check_kernels.missing()) is not None:
        print(why)
        return 2
    status = 0
    for title, (devices, backend, models) in TABLES.items():
        print(title, HEADER, sep="\n")
        found = []
        for name in models:
            for one in rows(name, devices, backend):
                print(one, flush=True)
                found.append(one)
        begin, end = f"<!-- {title}: begin -->", f"<!-- {title}: end -->"
        fresh = "\n".join(["", HEADER, *found, ""])
        status |= check_kernels.compare(fresh, begin, end, is_written=options.write)
    return status


if __name__ == "__main__":
    sys.exit(main())
