"""Compiles whole steps of models for one H200 without one, with the Hopper kernels; compares with docs/kernels.md.

    make kernels-check                                # after the kernels alone
    make kernels-check ARGS=--write                   # write both tables anew

Parameters and cache are shapes only; a step of decodes has no prefill, as servers run it. Fails where a step copies the
cache or does not alias it whole, where it lacks a kernel or has another one, and on any figure that differs from the
table. Says nothing of speed.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"     # before jax: the plugin is there, its device is not

import jax
import jax.numpy as jnp

from jaxserve.layers import paged
from jaxserve.layers.context import LayerKv, StepContext
from jaxserve.models.decoder import Decoder, abstract_params
from jaxserve.models.registry import spec_from_config
from kernels_pallas.work import AttentionWork, work_layout
from scripts import check_kernels
from scripts.published_models import LATENT, MODELS

BEGIN, END = "<!-- steps compiled for an H200: begin -->", "<!-- steps compiled for an H200: end -->"
HEADER = (
    "| model | step | tokens | parameters GiB | cache GiB | temporaries MiB | attention kernels "
    "| copies of the cache |\n"
    "|---|---|---|---|---|---|---|---|"
)
ROWS, LENGTH_MAX, PAGE_SLOTS, PAGES = 64, 8192, 16, 8192
STEPS = {"decode": 64, "prefill": 2048}
KERNELS = {     # calls a layer, by step
    "decode": {"paged_decode_attend": 1, "paged_decode_combine": 1},
    "prefill": {"paged_decode_attend": 1, "paged_decode_combine": 1, "paged_prefill_attend": 1},
}
LATENT_KERNELS = {     # decode and prefill are one kernel
    "decode": {"latent_attend": 1, "latent_combine": 1}, "prefill": {"latent_attend": 2, "latent_combine": 1},
}


def row(model_name: str, step: str) -> str:
    """A step: embedding, all layers, logits of a token a row."""
    spec, tokens = spec_from_config((MODELS | LATENT)[model_name]), STEPS[step]
    attend = functools.partial(paged.attend, implementation="mosaic_gpu", has_prefill=step != "decode")
    model = Decoder(spec=spec, dtype=jnp.bfloat16, attend=attend, experts="triton")     # as servers do on GPUs
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    group = spec.kv_groups[0]
    page = jax.ShapeDtypeStruct((PAGES, group.kv_head_count, PAGE_SLOTS, group.head_dim), jnp.bfloat16)
    kv = (LayerKv(k_PKSH=page, v_PKSH=page if group.has_values else None),) * len(spec.layers)
    context = StepContext(
        position_T=integers((tokens,)), row_T=integers((tokens,)),
        page_RM=(integers((ROWS, LENGTH_MAX // PAGE_SLOTS)),),
        work=AttentionWork.from_arrays({name: integers(size) for name, size in work_layout(tokens, ROWS).items()}),
    )
    params = abstract_params(spec, jnp.bfloat16)

    def run(kv: Any, params: Any, token_T: jax.Array, sampled_B: jax.Array, context: StepContext) -> Any:
        hidden_TD, kv = model.apply({"params": params}, token_T, kv, context, method="hidden")
        return model.apply({"params": params}, hidden_TD[sampled_B], method="logits"), kv

    executable = check_kernels.compiled(run, kv, params, integers((tokens,)), integers((ROWS,)), context, donated=(0,))
    memory, text = executable.memory_analysis(), executable.as_text()
    cache = _bytes(kv)
    if memory.alias_size_in_bytes != cache:
        raise RuntimeError(f"{model_name} {step}: {memory.alias_size_in_bytes} bytes aliased of a cache of {cache}")
    kernels = (KERNELS if group.has_values else LATENT_KERNELS)[step]
    calls = {name: _calls(text, name) for name in kernels}
    everything = text.count('custom_call_target="mosaic_gpu_v2"')
    wanted = {name: count * len(spec.layers) for name, count in kernels.items()}
    if calls != wanted or everything != sum(calls.values()):
        raise RuntimeError(f"{model_name} {step}: {len(spec.layers)} layers call {calls}")
    copies = check_kernels.copies_of(page, executable)
    return (
        f"| {model_name} | {step} | {tokens} | {_bytes(params) / 2**30:.2f} | {cache / 2**30:.2f} | "
        f"{memory.temp_size_in_bytes / 2**20:.0f} | {len(spec.layers)} x {sum(kernels.values())} | {len(copies)} |"
    )


def _calls(text: str, kernel: str) -> int:
    return len(re.findall(rf"custom-call\(.*mosaic_gpu_v2.*{kernel}", text))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def rows() -> Iterator[str]:
    for name in MODELS | LATENT:
        for step in STEPS:
            yield row(name, step)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/kernels.md")
    options = parser.parse_args()
    if (why := check_kernels.missing()) is not None:
        print(why)
        return 2
    print(HEADER)
    found = []
    for one in rows():
        print(one, flush=True)
        found.append(one)
    if any(not one.endswith("| 0 |") for one in found):
        print("the cache is copied")
        return 1
    return check_kernels.compare("\n".join(["", HEADER, *found, ""]), BEGIN, END, is_written=options.write)


if __name__ == "__main__":
    sys.exit(main())
