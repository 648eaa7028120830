"""Compiles the Triton kernels for GPUs that are not there and compares what ptxas says with docs/kernels.md.

    make kernels-check                                # after the Hopper kernels
    make kernels-check ARGS=--write                   # write the tables anew

They are a baseline for GPUs that the Hopper kernels do not serve: spills are in the table, not refused. Fails where a
page write copies the pool and on any figure that differs from the table. Says nothing of speed or of right results.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"     # both before jax: the plugin is there, its device is not
os.environ["PTX_FOLDER"] = tempfile.mkdtemp(prefix="ptx-")
os.environ["XLA_FLAGS"] = f"--xla_dump_to={os.environ['PTX_FOLDER']} --xla_dump_emitter_re=ptx"

import jax
import jax.numpy as jnp

from kernels_pallas.kv_write import kv_write
from kernels_pallas.paged_decode import paged_decode
from kernels_pallas.paged_prefill import paged_prefill
from kernels_pallas.shapes import HeadShape, head_shape
from scripts import check_kernels
from scripts.check_kernels import DECODE_TOKENS, H200, PAGES_OF_A_ROW, PREFILL_TOKENS, ROWS

BEGIN, END = "<!-- portable kernels: begin -->", "<!-- portable kernels: end -->"
HEADER = "| kernel | shape | registers / spilled bytes: A100 | L4 | H200 | B200 |\n|---|---|---|---|---|---|"
PAGE_SLOTS = 16
SHAPES = (
    ("smollm2-135m", None), ("llama-3.1-8b", None), ("llama-3.1-8b", "int8"), ("gemma-2-9b-local", None),
    ("gpt-oss-20b-local", None), ("deepseek-v2-lite", None), ("deepseek-v2-lite", "int8"),
    ("deepseek-v3", None), ("deepseek-v3", "int8"),
)


def _target(name: str, major: int, minor: int, cores: int, shared: int, l2: int, memory: int, bandwidth: int) -> str:
    """An H200's configuration with what differs. Later than Ampere and Ada there are features a architecture."""
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    changes = {
        "device_description_str": f'"{name}"', "core_count": cores, "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared - 1024, "l2_cache_size": l2, "device_memory_size": memory,
        "memory_bandwidth": bandwidth, "major": major, "minor": minor, "feature_extension": features,
    }
    head, tail = H200.split("platform_name")     # the version of cuDNN has a major and a minor too
    for key, value in changes.items():
        head = re.sub(rf'\b{key}: ("[^"]*"|\S+)', f"{key}: {value}", head)
        if key == "device_description_str":
            tail = re.sub(rf'{key}: "[^"]*"', f"{key}: {value}", tail)
    return head + "platform_name" + tail


TARGETS = {     # architecture for ptxas, configuration for XLA
    "A100": ("sm_80", _target("NVIDIA A100", 8, 0, 108, 167936, 41943040, 85100068864, 2039040000000)),
    "L4": ("sm_89", _target("NVIDIA L4", 8, 9, 58, 102400, 50331648, 23600000000, 300000000000)),
    "H200": ("sm_90a", H200),
    "B200": ("sm_100a", _target("NVIDIA B200", 10, 0, 148, 233472, 132644864, 191514411008, 7672320000000)),
}


def kernels(call: Callable[..., Any], *arrays: Any, donated: tuple[int, ...] = ()) -> dict[str, list[str]]:
    """'registers / spilled bytes' of each Triton kernel of a call, a target each."""
    found: dict[str, list[str]] = {}
    for architecture, target in TARGETS.values():
        for old in Path(os.environ["PTX_FOLDER"]).iterdir():
            old.unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            executable = check_kernels.compiled(call, *arrays, donated=donated, target=target)
        if donated and executable.memory_analysis().alias_size_in_bytes != arrays[0].size * 2:
            raise RuntimeError("the page write does not alias the pool")
        if donated and (copies := check_kernels.copies_of(arrays[0], executable)):
            raise RuntimeError(f"the page write copies the pool: {copies}")
        for name, figures in _reports(architecture):
            found.setdefault(name, []).append(figures)
    return found


def _reports(architecture: str) -> Iterator[tuple[str, str]]:
    """Of every Triton kernel compiled last."""
    for file in sorted(Path(os.environ["PTX_FOLDER"]).glob("*.ptx")):
        entry = re.search(r"\.entry (paged\w+|kv_write\w*)\(", file.read_text())
        if entry is None:
            continue
        command = [_ptxas(), "-v", f"-arch={architecture}", str(file), "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers = re.search(r"Used (\d+) registers", said)
        assert registers is not None, said
        spilled = sum(int(size) for size in re.findall(r"(\d+) bytes spill stores", said))
        yield re.sub(r"_\d+$", "", entry[1]), f"{registers[1]} / {spilled}"


@functools.cache
def _ptxas() -> str:
    """The wheel's beside the plugin, else that of the path."""
    wheel = check_kernels.PLUGIN.parents[1] / "nvidia" / "cu13" / "bin" / "ptxas"
    return str(wheel) if wheel.exists() else "ptxas"


def attention(op: Callable[..., jax.Array], shape: HeadShape, codes: str | None, tokens: int) -> Any:
    """What `kernels` says of an attention op."""
    arrays, options = check_kernels.attention_arguments(shape, PAGE_SLOTS, tokens, codes)

    def call(*given: Any) -> jax.Array:
        sink_N = given[5] if shape.has_sinks else None
        return op(*given[:5], sink_N=sink_N, implementation="triton", **options)

    return kernels(call, *arrays)


def write(shape: HeadShape) -> Any:
    """What `kernels` says of a page write."""
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    pool = check_kernels.abstract_pool(shape, PAGE_SLOTS, None)
    x_TKH = jax.ShapeDtypeStruct((PREFILL_TOKENS, shape.kv_head_count, shape.head_dim), jnp.bfloat16)
    places = integers((ROWS, PAGES_OF_A_ROW)), integers((PREFILL_TOKENS,)), integers((PREFILL_TOKENS,))
    return kernels(functools.partial(kv_write, implementation="triton"), pool, x_TKH, *places, donated=(0,))


def rows() -> Iterator[str]:
    for name, codes in SHAPES:
        shape = head_shape(name)
        found = attention(paged_decode, shape, codes, DECODE_TOKENS)
        found |= attention(paged_prefill, shape, codes, PREFILL_TOKENS)
        if codes is None and shape.latent_dim is None:     # latents are written by XLA
            found |= write(shape)
        for kernel, figures in sorted(found.items()):
            yield f"| {kernel} | {check_kernels.described(shape, codes)} | {' | '.join(figures)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/kernels.md")
    options = parser.parse_args()
    if (why := check_kernels.missing()) is not None:
        print(why)
        return 2
    print(HEADER)
    found = []
    for row in rows():
        print(row, flush=True)
        found.append(row)
    return check_kernels.compare("\n".join(["", HEADER, *found, ""]), BEGIN, END, is_written=options.write)


if __name__ == "__main__":
    sys.exit(main())
