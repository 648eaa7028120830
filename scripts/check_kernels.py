"""Compiles the GPU kernels for an H200 without one and compares what ptxas and XLA say with docs/kernels.md.

    make kernels-check                                # with the compiler's wheels, in .venv-kernels
    make kernels-check ARGS=--write                   # write the table anew
    make kernels-check ARGS='--case llama'            # only cases with this in their name, nothing compared

Fails on any spilled register, on a page write that copies the pool, and on any figure that differs from the table.
Needs jax's CUDA plugin and ptxas, no GPU and no driver. Says nothing of speed or of right results.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"     # before jax: the plugin is there, its device is not

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from kernels_pallas.eight_bit_matmul import cases as eight_bit_matmul_cases
from kernels_pallas.eight_bit_matmul import eight_bit_matmul
from kernels_pallas.eight_bit_matmul.cases import EightBitCase
from kernels_pallas.grouped_matmul import cases as grouped_matmul_cases
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.grouped_matmul.cases import GroupedCase
from kernels_pallas.kv_write import kv_write
from kernels_pallas.paged_decode import paged_decode
from kernels_pallas.paged_prefill import paged_prefill
from kernels_pallas.paged_prefill.api import QUANTIZED_HEAD_DIM_MAX
from kernels_pallas.quantized import Pages, QuantizedPages
from kernels_pallas.quantized_matmul import cases as quantized_matmul_cases
from kernels_pallas.quantized_matmul import quantized_matmul
from kernels_pallas.quantized_matmul.cases import PackedCase
from kernels_pallas.shapes import HEAD_SHAPES, HeadShape, head_shape, in_codes
from kernels_pallas.work import AttentionWork, work_layout
from scripts import bench_kernels

TABLE = Path(__file__).parents[1] / "docs" / "kernels.md"
PLUGIN = Path(jax.__file__).parents[1] / "jax_plugins" / "xla_cuda13"
BEGIN, END = "<!-- compiled for an H200: begin -->", "<!-- compiled for an H200: end -->"
VERIFIED = ("qwen2.5-3b", "llama-3.1-8b", "gpt-oss-20b-local", "deepseek-v2-lite")   # with several tokens an entry too
ROWS, PAGES_OF_A_ROW, POOL_PAGES = 64, 512, 4096
DECODE_TOKENS, PREFILL_TOKENS = 64, 2048
OPS = {"quantized_matmul": quantized_matmul, "eight_bit_matmul": eight_bit_matmul}
HEADER = "| op | shape | page | registers | spilled B | shared KiB | temporaries KiB |\n|---|---|---|---|---|---|---|"

# XLA's GpuTargetConfigProto: what the compiler asks a device for.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000  l2_cache_size: 52428800  device_memory_size: 151397597184
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


@functools.cache
def _mesh(target: str) -> jax.sharding.Mesh:
    """One GPU that is not there."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    return topologies.make_mesh(topology, (1,), ("x",))


def compiled(
    call: Callable[..., Any], *arrays: Any, donated: tuple[int, ...] = (), target: str = H200
) -> jax.stages.Compiled:
    """The executable of a call on arrays of these shapes."""
    placed = jax.sharding.NamedSharding(_mesh(target), jax.sharding.PartitionSpec())
    there = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed), arrays)
    with jax.sharding.use_abstract_mesh(_mesh(target).abstract_mesh):
        return jax.jit(call, donate_argnums=donated).lower(*there).compile()


def abstract_pool(shape: HeadShape, page: int, codes: str | None) -> Pages:
    """Keys or values of one layer, in bfloat16 or as codes."""
    size = (POOL_PAGES, shape.kv_head_count, page, shape.head_dim)
    if codes is None:
        return jax.ShapeDtypeStruct(size, jnp.bfloat16)
    return QuantizedPages(jax.ShapeDtypeStruct(size, codes), jax.ShapeDtypeStruct(size[:3], jnp.float32))


def attention_arguments(
    shape: HeadShape, page: int, tokens: int, codes: str | None
) -> tuple[list[Any], dict[str, Any]]:
    """The arrays and options of an attention op; sinks come last where there are any."""
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    work = AttentionWork.from_arrays({name: integers(size) for name, size in work_layout(tokens, ROWS).items()})
    pool = abstract_pool(shape, page, codes)
    q_TNH = jax.ShapeDtypeStruct((tokens, shape.head_count, shape.head_dim), jnp.bfloat16)
    arrays = [q_TNH, pool, pool if shape.latent_dim is None else None, integers((ROWS, PAGES_OF_A_ROW)), work]
    if shape.has_sinks:
        arrays.append(jax.ShapeDtypeStruct((shape.head_count,), jnp.float32))
    options = {"scale": shape.head_dim**-0.5, "window": shape.window, "soft_cap": shape.soft_cap}
    if shape.latent_dim is not None:
        options["value_dim"] = shape.latent_dim
    return arrays, options


def attention_rows(
    name: str, op: Callable[..., jax.Array], shape: HeadShape, page: int, tokens: int, codes: str | None = None,
    drafted: int = 1,
) -> Iterator[str]:
    """A row a kernel of the op; `drafted` tokens an entry."""
    arrays, options = attention_arguments(shape, page, tokens, codes)
    if drafted > 1:
        options["tokens"] = drafted

    def call(*given: Any) -> jax.Array:
        sink_N = given[5] if shape.has_sinks else None
        return op(*given[:5], sink_N=sink_N, implementation="mosaic_gpu", **options)

    drafts = f", {drafted} tokens" if drafted > 1 else ""
    yield from reported(name, call, arrays, f"{described(shape, codes)}{drafts}", page)


def reported(name: str, call: Callable[..., Any], arrays: Any, what: str, page: int | str) -> Iterator[str]:
    """A row a Mosaic GPU kernel of a call."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        temporaries = compiled(call, *arrays).memory_analysis().temp_size_in_bytes
        for kernel, registers, spilled, shared in reports(folder):
            yield (
                f"| {name}: {kernel.removeprefix(f'{name}_')} | {what} | {page} | "
                f"{registers} | {spilled} | {shared} | {temporaries // 1024} |"
            )


def reports(folder: str) -> Iterator[tuple[str, int, int, int]]:
    """Of each Mosaic kernel dumped there: its name, registers, bytes spilled, KiB of shared memory."""
    for report in sorted(Path(folder).glob("*.ptxas")):
        said = report.read_text()
        registers = re.search(r"Used (\d+) registers", said)
        if registers is None:
            raise RuntimeError(f"ptxas did not report the registers of {report.stem}: {said}")
        spilled = max(map(int, re.findall(r"(\d+) bytes spill stores", said)), default=0)
        resources = report.with_suffix(".resources.txt").read_text()
        shared = re.search(r"smem_scratch_bytes=(\d+)", resources)
        assert shared is not None, resources
        yield re.sub(r"_\d+$", "", report.stem), int(registers[1]), spilled, int(shared[1]) // 1024


def described(shape: HeadShape, codes: str | None) -> str:
    """Whose geometry, and what the pages hold where that is codes."""
    return shape.name if codes is None else f"{shape.name}, {codes}"


def write_row(shape: HeadShape, page: int, tokens: int, codes: str | None = None) -> str:
    """The page write through XLA: in place means that the pool is aliased whole and no temporary is as large as it."""
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    pool = abstract_pool(shape, page, codes)
    size = sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(pool))
    arrays = (
        pool, floats((tokens, shape.kv_head_count, shape.head_dim)), integers((ROWS, PAGES_OF_A_ROW)),
        integers((tokens,)), integers((tokens,)),
    )
    executable = compiled(functools.partial(kv_write, implementation="xla"), *arrays, donated=(0,))
    memory = executable.memory_analysis()
    if memory.alias_size_in_bytes != size:
        raise RuntimeError(f"kv_write of {shape.name}: {memory.alias_size_in_bytes} bytes aliased of {size}")
    copies = copies_of(pool, executable)
    if copies or memory.temp_size_in_bytes >= 1 << 20:
        size = memory.temp_size_in_bytes
        raise RuntimeError(f"kv_write of {shape.name} copies the pool: {copies}, {size} bytes of temporaries")
    temporaries = memory.temp_size_in_bytes // 1024
    return f"| kv_write (XLA, in place) | {described(shape, codes)} | {page} | | | | {temporaries} |"


def copies_of(pool: Any, executable: jax.stages.Compiled) -> list[str]:
    """Instructions that copy something of a pool's shape."""
    shapes = {re.escape("[" + ",".join(map(str, part.shape)) + "]") for part in jax.tree.leaves(pool)}
    return [line for whole in shapes for line in re.findall(rf"= \w+{whole}\S* copy\(", executable.as_text())]


def grouped_row(case: GroupedCase) -> str:
    """The experts' product through Triton; it must not copy the stack of weights. XLA reports no registers of it."""
    rows = case.tokens * case.chosen
    arrays = (
        jax.ShapeDtypeStruct((rows, case.width), jnp.bfloat16),
        jax.ShapeDtypeStruct((case.experts, case.width_out, case.width), jnp.bfloat16),
        jax.ShapeDtypeStruct((case.experts,), jnp.int32),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        executable = compiled(functools.partial(grouped_matmul, implementation="triton"), *arrays)
    if "__gpu$xla.gpu.triton" not in executable.as_text():
        raise RuntimeError(f"grouped_matmul of {case.name} did not become a Triton kernel")
    if "while(" in executable.as_text():
        raise RuntimeError(f"grouped_matmul of {case.name}: XLA launches a loop")
    temporaries = executable.memory_analysis().temp_size_in_bytes
    if temporaries >= 1 << 20:
        raise RuntimeError(f"grouped_matmul of {case.name}: {temporaries} bytes of temporaries; are weights copied?")
    return f"| grouped_matmul (Triton) | {case.name} | | | | | {temporaries // 1024} |"


def hopper_grouped_row(case: GroupedCase) -> str:
    """The experts' product through Mosaic GPU."""
    rows = case.tokens * case.chosen
    arrays = (
        jax.ShapeDtypeStruct((rows, case.width), jnp.bfloat16),
        jax.ShapeDtypeStruct((case.experts, case.width_out, case.width), jnp.bfloat16),
        jax.ShapeDtypeStruct((case.experts,), jnp.int32),
    )
    call = functools.partial(grouped_matmul, implementation="mosaic_gpu")
    (row,) = reported("grouped_matmul", call, arrays, case.name, "")
    return row


def packed_row(case: PackedCase) -> str:
    """The product of packed weights through Triton; it must not unpack the matrix in memory."""
    arrays = jax.eval_shape(lambda: bench_kernels.call_of("quantized_matmul", case, jnp.dtype(jnp.bfloat16))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        executable = compiled(functools.partial(quantized_matmul, implementation="triton"), *arrays)
    if "__gpu$xla.gpu.triton" not in executable.as_text():
        raise RuntimeError(f"quantized_matmul of {case.name} did not become a Triton kernel")
    temporaries = executable.memory_analysis().temp_size_in_bytes
    if temporaries >= 1 << 20:
        raise RuntimeError(f"quantized_matmul of {case.name}: {temporaries} bytes of temporaries; is it unpacked?")
    return f"| quantized_matmul (Triton) | {case.name} | | | | | {temporaries // 1024} |"


def product_row(op: str, case: PackedCase | EightBitCase) -> str:
    """A product of codes on Hopper; neither weights nor codes may be copied."""
    call = functools.partial(OPS[op], implementation="mosaic_gpu")
    arrays = jax.eval_shape(lambda: bench_kernels.call_of(op, case, jnp.dtype(jnp.bfloat16))[1])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        executable = compiled(call, *arrays)
        [(_, registers, spilled, shared)] = reports(folder)
    codes = [part for part in jax.tree.leaves(arrays[1]) if part.size >= case.width_out * case.width // 2]
    if copies := copies_of(codes, executable):
        raise RuntimeError(f"{op} of {case.name} copies its weights: {copies}")
    temporaries = executable.memory_analysis().temp_size_in_bytes
    return f"| {op} | {case.name} | | {registers} | {spilled} | {shared} | {temporaries // 1024} |"


def missing() -> str | None:
    """What stands in the way on this machine."""
    if jax.__version_info__ < (0, 11):
        return f"Mosaic GPU kernels need jax >= 0.11 (and so Python >= 3.12), this is {jax.__version__}"
    if not PLUGIN.exists():
        return "jax's CUDA 13 plugin is not installed here; `make kernels-check` makes an environment with it"
    return None


def rows(wanted: str) -> Iterator[str]:
    """The table's rows, of the shapes whose name has `wanted` in it."""
    shapes = [(shape, 16) for shape in HEAD_SHAPES]
    shapes += [(head_shape(name), 64) for name in ("llama-3.1-8b", "gemma-2-9b-local", "deepseek-v2-lite")]
    shapes = [(shape, page) for shape, page in shapes if wanted in shape.name]
    for shape, page in shapes:
        yield from attention_rows("paged_decode", paged_decode, shape, page, DECODE_TOKENS)
    for shape, page in shapes:
        yield from attention_rows("paged_prefill", paged_prefill, shape, page, PREFILL_TOKENS)
    for shape, page in shapes:
        yield write_row(shape, page, PREFILL_TOKENS)
    for shape, codes in (one for one in in_codes() if wanted in one[0].name):
        yield from attention_rows("paged_decode", paged_decode, shape, 16, DECODE_TOKENS, codes)
        if shape.head_dim <= QUANTIZED_HEAD_DIM_MAX or shape.latent_dim is not None:
            yield from attention_rows("paged_prefill", paged_prefill, shape, 16, PREFILL_TOKENS, codes)
        yield write_row(shape, 16, PREFILL_TOKENS, codes)
    for shape in (head_shape(name) for name in VERIFIED if wanted in name):
        yield from attention_rows("paged_decode", paged_decode, shape, 16, 4 * DECODE_TOKENS, drafted=4)
    for case in grouped_matmul_cases.CASES:
        if case.tokens in (16, 512) and wanted in case.model:
            yield hopper_grouped_row(case)
            yield grouped_row(case)
    for packed in quantized_matmul_cases.CASES:
        if wanted in packed.model:
            yield packed_row(packed)
            yield product_row("quantized_matmul", packed)
    for eight_bit in eight_bit_matmul_cases.CASES:
        if wanted in eight_bit.model:
            yield product_row("eight_bit_matmul", eight_bit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="only shapes with this in their name; compares nothing")
    parser.add_argument("--write", action="store_true", help="write the table into docs/kernels.md")
    options = parser.parse_args()
    if (why := missing()) is not None:
        print(why)
        return 2
    found = []
    print(HEADER)
    for row in rows(options.case):
        print(row, flush=True)
        found.append(row)
    spills = [row for row in found if row.split("|")[5].strip() not in ("", "0")]
    if spills:
        print("registers are spilled:", *spills, sep="\n")
        return 1
    if options.case:
        return 0
    return compare("\n".join(["", HEADER, *found, ""]), BEGIN, END, is_written=options.write)


def compare(fresh: str, begin: str, end: str, *, is_written: bool) -> int:
    """Holds a table against the one in docs/kernels.md between two marks, or writes it there; an exit status."""
    before, _, rest = TABLE.read_text(encoding="utf-8").partition(begin)
    table, _, after = rest.partition(end)
    if is_written:
        TABLE.write_text(before + begin + fresh + end + after, encoding="utf-8")
    elif table != fresh:
        print("the table in docs/kernels.md says otherwise; look why, then run with --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
