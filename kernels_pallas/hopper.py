"""What may run the Mosaic GPU kernels, and how large their blocks are: NVIDIA Hopper under jax >= 0.11.

Knows versions, devices and sizes; imports no kernel, so it can be asked anywhere.
Invariant: a refusal names what is asked, what is served and, where there is one, the way out.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.quantized import FP8, FP8_BITS, Pages, QuantizedPages

JAX_VERSION_MIN = (0, 11)
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)       # copies of smaller pages are many: their addresses spill the loader's registers
GROUP_MAX = 64
MULTIPROCESSORS = 132                # of an H100 SXM and an H200, where the device itself cannot be asked
SCALE_BYTES = 4                      # of a slot and head at most
SHARED_BYTES_MAX = 208 * 1024        # of the 227 KiB a program may have; the rest is for barriers and reductions
PROGRAM_BYTES_MAX = 226 * 1024       # with all that a kernel holds beside its rings, barriers left out
QUERY_ROWS = 128                     # that a program of paged_prefill holds in shared memory
STAGES_MAX = 6
OUTS = 64                            # outputs of a product that a warpgroup takes: rows of a wgmma
PRODUCT_STAGES_MAX = 12
PRODUCT_ROWS = (8, 16, 32, 64, 128, 256)
LATENT_ROWS = 64                     # (token, head) rows of a unit over a latent cache: those of a wgmma
LATENT_SLOTS = 64                    # of a block of it
LATENT_STAGES = 2                    # blocks in flight: all that fits at 576 numbers a slot; of codes, with a wide one
LATENT_DIM_MAX = 576                 # numbers a slot
LATENT_VALUES_MAX = 512              # of them values: 128 registers a thread of either computing warpgroup
GROUPED_COLUMNS = (256, 192, 128)    # of a block of grouped_matmul: half a warpgroup's, whole tiles of 8 rows
GROUPED_DEPTH = 64                   # of the shared width at once
LATENT_COLUMNS = 64                  # of a tile of shared memory; either warpgroup has whole tiles of the values
CONTEXTS = (64, 128, 192, 256)       # rows of a wgmma, once to four times


def multiprocessors() -> int:
    """Of the device that is compiled for: as many programs are resident, one each."""
    device = jax.devices()[0]
    if target_kind() != device.device_kind:
        return MULTIPROCESSORS
    return getattr(device, "core_count", MULTIPROCESSORS) if device.platform == "gpu" else MULTIPROCESSORS


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Sizes of a product's programs.

    Attributes:
      rows: of a tile; columns of a wgmma.
      warpgroups: that multiply, OUTS outputs each.
      stages: runs of inputs in flight.
      programs: persistent ones.
    """

    rows: int
    warpgroups: int
    stages: int
    programs: int = dataclasses.field(default_factory=multiprocessors)

    @property
    def outs(self) -> int:
        """Of a tile."""
        return OUTS * self.warpgroups


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Sizes of one kernel's blocks.

    Attributes:
      context: context slots of one turn: rows of a wgmma, so a multiple of 64, and of the page size.
      stages: blocks of keys, and as many of values, in flight.
      programs: persistent programs; more than there are multiprocessors only wait.
    """

    context: int
    stages: int
    programs: int = dataclasses.field(default_factory=multiprocessors)


def refusals(q_TNH: Array, k_PKSH: Pages, quantized_head_dim_max: int = HEAD_DIMS[-1], tokens: int = 1) -> list[str]:
    """Why the Mosaic GPU attention kernels cannot serve these arrays here.

    Args:
      quantized_head_dim_max: heads up to which a kernel has the registers to widen codes.
      tokens: query tokens that share one reading of the context.
    """
    _, N, H = q_TNH.shape
    _, K, S, _ = k_PKSH.shape
    found = [*environment_refusals()]
    if H not in HEAD_DIMS:
        found.append(f"head dimension {H} is none of {', '.join(map(str, HEAD_DIMS))}")
    allowed = [size for size in PAGE_SIZES if size <= block_slots(H)]
    if S not in allowed:
        found.append(f"page size {S} is none of {', '.join(map(str, allowed))} (at heads of {H})")
    if N // K * tokens > GROUP_MAX:
        drafts = f" of {tokens} tokens each" if tokens > 1 else ""
        found.append(f"{N // K} query heads a kv head{drafts} are more than {GROUP_MAX}")
    if isinstance(k_PKSH, QuantizedPages) and quantized_head_dim_max < H:
        found.append(f"quantised pages have heads up to {quantized_head_dim_max}, not {H} (registers)")
    return found + _type_refusals(q_TNH, k_PKSH)


def latent_refusals(
    q_TNH: Array, k_PKSH: Pages, value_dim: int, *, window: int | None, soft_cap: float | None, has_sinks: bool
) -> list[str]:
    """Why the Mosaic GPU kernel for latent caches, whose keys are values too, cannot serve these arrays here."""
    _, K, S, H = k_PKSH.shape
    found = [*environment_refusals()]
    if K != 1:
        found.append(f"a latent cache has one kv head, this one {K}")
    if H % LATENT_COLUMNS or H > LATENT_DIM_MAX:
        found.append(f"{H} numbers a slot are no multiple of {LATENT_COLUMNS} up to {LATENT_DIM_MAX} (shared memory)")
    if value_dim % (2 * LATENT_COLUMNS) or value_dim > LATENT_VALUES_MAX:
        found.append(
            f"{value_dim} values a slot are no multiple of {2 * LATENT_COLUMNS} up to {LATENT_VALUES_MAX} (registers)"
        )
    allowed = [size for size in PAGE_SIZES if size <= LATENT_SLOTS]
    if S not in allowed:
        found.append(f"page size {S} is none of {', '.join(map(str, allowed))} (of a latent cache)")
    options = {"a window": window is not None, "a soft cap": soft_cap is not None, "sinks": has_sinks}
    found += [f"{name} over a latent cache is not implemented" for name, is_asked in options.items() if is_asked]
    return found + _type_refusals(q_TNH, k_PKSH)


def _type_refusals(q_TNH: Array, k_PKSH: Pages) -> list[str]:
    is_quantized = isinstance(k_PKSH, QuantizedPages)
    stored = k_PKSH.code_PKSH.dtype if is_quantized else k_PKSH.dtype
    found = []
    if is_quantized and stored == FP8_BITS:
        found.append(f"codes of {FP8_BITS} are for CPUs; here pages hold {FP8} itself")
    if q_TNH.dtype not in (jnp.bfloat16, jnp.float16) or not (is_quantized or stored == q_TNH.dtype):
        found.append(
            f"q of {q_TNH.dtype} over pages of {stored}: both must be bfloat16 or both float16 (tensor cores), "
            "or q one of them over quantised pages"
        )
    return found


def grouped_refusals(x_TI: Array, width_out: int) -> list[str]:
    """Why the Mosaic GPU form of grouped_matmul cannot serve these arrays here."""
    found = [*environment_refusals()]
    width = x_TI.shape[1]
    if x_TI.dtype not in (jnp.bfloat16, jnp.float16):
        found.append(f"rows of {x_TI.dtype} are neither bfloat16 nor float16 (tensor cores)")
    if width % GROUPED_DEPTH:
        found.append(f"the shared width {width} is no multiple of {GROUPED_DEPTH}")
    if all(width_out % size for size in GROUPED_COLUMNS):
        found.append(f"the width out {width_out} is a multiple of none of {', '.join(map(str, GROUPED_COLUMNS))}")
    return found


def environment_refusals() -> list[str]:
    """Why these kernels cannot run on this machine, whatever the arrays."""
    if jax.__version_info__ < JAX_VERSION_MIN:
        return [f"needs jax >= 0.11 (and so Python >= 3.12), this is {jax.__version__}"]
    kind = target_kind()
    if not any(name in kind for name in ("H100", "H200", "H800", "H20", "GH200")):
        return [f"needs an NVIDIA Hopper GPU (compute capability 9.0), the target is {kind!r}"]
    return []


def target_kind() -> str:
    """Name of the device that is compiled for: of an abstract mesh in scope, else of the default device."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.device_kind if device is not None else jax.devices()[0].device_kind


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What decides which blocks fit into a program's shared memory.

    Attributes:
      is_quantized: blocks hold codes and scales, and there is one more of each kind in 16 bits, where products read.
      fixed_bytes: beside the rings, whatever the blocks.
      group: query heads (times tokens) whose queries and weights lie beside the rings, padded; 0 where they do not.
      contexts: that compile: widening codes of larger blocks spills registers.
    """

    head_dim: int
    page_size: int
    is_quantized: bool = False
    fixed_bytes: int = 0
    group: int = 0
    contexts: tuple[int, ...] = CONTEXTS

    def stages(self, context: int) -> int:
        """Blocks of that many slots that fit."""
        block = 2 * context * self.head_dim
        ring, fixed = 2 * block, self.fixed_bytes
        if self.is_quantized:
            ring, fixed = block + 2 * context * SCALE_BYTES, fixed + 2 * block
        beside = self.group * (context + self.head_dim) * 2
        return min(STAGES_MAX, min(SHARED_BYTES_MAX - fixed, PROGRAM_BYTES_MAX - fixed - beside) // ring)


def decode_need(head_dim: int, page_size: int, *, is_quantized: bool, group: int) -> Need:
    """Of paged_decode."""
    contexts = CONTEXTS[:2] if is_quantized else CONTEXTS
    return Need(
        head_dim=head_dim, page_size=page_size, is_quantized=is_quantized, group=group, contexts=contexts
    )


def prefill_need(head_dim: int, page_size: int, *, is_quantized: bool) -> Need:
    """Of paged_prefill, which holds queries in shared memory."""
    fixed = QUERY_ROWS * head_dim * 2
    contexts = CONTEXTS[1:2] if is_quantized else CONTEXTS    # two warpgroups widen halves of whole tiles of 64
    return Need(
        head_dim=head_dim, page_size=page_size, is_quantized=is_quantized, fixed_bytes=fixed, contexts=contexts
    )


def blocks(op: str, need: Need) -> Blocks:
    """Measured sizes for this device where there are some in `tuned` and they fit, else what fits."""
    measured = _tuned(target_kind(), op).get(tuned_key(need.head_dim, need.page_size, need.is_quantized))
    if measured is not None and measured["stages"] <= need.stages(measured["context"]):
        return Blocks(**measured)
    return fitting(need)


def fitting(need: Need) -> Blocks:
    """`blocks` where nobody measured."""
    context = block_slots(need.head_dim)
    return Blocks(context=context, stages=need.stages(context))


def candidates(need: Need) -> tuple[Blocks, ...]:
    """Every size that fits: what a tuner tries."""
    return tuple(
        Blocks(context=context, stages=stages)
        for context in need.contexts if context % need.page_size == 0
        for stages in range(2, need.stages(context) + 1)
    )


def product_tiles(outs: int, tokens: int, rows_max: int, stage_bytes: Callable[[int, int], int]) -> tuple[Tiles, ...]:
    """Every size of a product's programs that a tuner tries, first what is taken without measurements.

    Args:
      rows_max: that a kernel's registers hold.  stage_bytes: (rows, outputs) -> bytes of one run of inputs.
    """
    fitting = next((rows for rows in PRODUCT_ROWS if rows >= tokens), rows_max)
    fitting = min(fitting, rows_max)
    found = []
    for rows in (fitting, *(other for other in PRODUCT_ROWS if 64 <= other < fitting)):
        most = 4 if rows <= 16 else 2
        counts = [count for count in (most, most // 2, 1) if outs % (OUTS * count) == 0]
        for warpgroups in dict.fromkeys(counts):
            stages = min(PRODUCT_STAGES_MAX, PROGRAM_BYTES_MAX // stage_bytes(rows, OUTS * warpgroups))
            wanted = dict.fromkeys(count for count in (stages, stages // 2) if count >= 2)
            found += [Tiles(rows=rows, warpgroups=warpgroups, stages=count) for count in wanted]
    return tuple(found)


def tiles(op: str, key: str, tried: tuple[Tiles, ...]) -> Tiles:
    """Measured sizes of a product's programs where `tuned` has some that fit, else the first of `tried`."""
    measured = _tuned(target_kind(), op).get(key)
    sizes = Tiles(**measured) if measured is not None else None
    return sizes if sizes in tried else tried[0]


def product_key(code: str, outs: int, ins: int, tokens: int) -> str:
    """What measured sizes of a product depend on, besides device and op; tokens as the tile that holds them."""
    rows = next((rows for rows in PRODUCT_ROWS if rows >= tokens), 2 * PRODUCT_ROWS[-1])
    return f"{code}-{outs}x{ins}-{rows}"


def tuned_key(head_dim: int, page_size: int, is_quantized: bool) -> str:
    """What measured sizes depend on, besides device and op."""
    return f"{head_dim}x{page_size}" + ("-quantized" if is_quantized else "")


def tuned_file(device_kind: str, op: str) -> str:
    """Where measured sizes lie in the package."""
    return f"tuned/{device_kind.lower().replace(' ', '-')}/{op}.json"


def block_slots(head_dim: int) -> int:
    """Context slots of a block, which is whole pages: 32 KiB from heads of 128 on; two or three hide the latency."""
    return 128 if head_dim <= 128 else 64


@functools.cache
def _tuned(device_kind: str, op: str) -> dict[str, dict[str, int]]:
    """`tuned_key` -> sizes, from `tuned_file`; none where nobody measured. scripts/tune_kernels.py writes it."""
    file = importlib.resources.files("kernels_pallas") / tuned_file(device_kind, op)
    return json.loads(file.read_text(encoding="utf-8"))["blocks"] if file.is_file() else {}
