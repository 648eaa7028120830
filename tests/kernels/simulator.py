"""One case of a Mosaic GPU kernel in jax's simulator, with races looked for; a process of its own for each.

    python -m tests.kernels.simulator paged_decode grouped-three
    python -m tests.kernels.simulator paged_prefill random-3

The simulator starts a thread a warpgroup and a kernel that forgets an arrival waits for ever, so the caller sets the
time limit. Slots that no token may see hold NaN. It lets copies begin anywhere; `watch_copies` does not. Prints one
line of JSON: the largest error against the reference, whether every element is finite, whether any race was found.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import hopper
from kernels_pallas.quantized import Pages, QuantizedPages, quantize
from kernels_pallas.work import AttentionWork, plan_work

DECODES = ((2, 0, 1), (0, 15, 1), (4, 16, 1), (1, 299, 1))      # row, tokens before, tokens
DRAFTS = ((2, 0, 3), (0, 15, 3), (4, 254, 3), (1, 299, 3), (3, 70, 9))
MIXED = ((3, 40, 1), (1, 299, 1), (5, 0, 9), (0, 70, 40))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A step; decodes are its first entries of one token."""

    entries: tuple[tuple[int, int, int], ...] = MIXED
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    context: int = 64        # slots a block
    window: int | None = None
    soft_cap: float | None = None
    tokens: int = 1          # of a decode entry
    has_sinks: bool = False
    dtype: str = "bfloat16"
    codes: str | None = None     # what quantised pages hold
    scales: str = "float32"
    shares_pages: bool = False
    latent_dim: int | None = None    # keys are values too: that many of their numbers
    bug: str | None = None   # planted: the check must see it


CASES = {
    "grouped-three": Case(),
    "window-sinks-soft-cap": Case(heads=8, kv_heads=1, window=50, soft_cap=2.0, has_sinks=True),
    "decodes-only": Case(entries=DECODES, heads=4, kv_heads=2),
    "no-group": Case(heads=2, kv_heads=2, head_dim=128),
    "pair": Case(heads=2, kv_heads=1),
    "group-of-seven": Case(heads=7, kv_heads=1, has_sinks=True),
    "group-of-sixteen": Case(heads=16, kv_heads=1, page_size=32),
    "heads-of-128": Case(heads=4, kv_heads=1, head_dim=128, context=128, page_size=64),
    "heads-of-256": Case(heads=2, kv_heads=1, head_dim=256, window=64, soft_cap=30.0),
    "page-of-128": Case(heads=4, kv_heads=1, page_size=128, context=128, window=130),
    "window-of-one": Case(heads=4, kv_heads=1, window=1),
    "float16": Case(dtype="float16"),
    "shared-pages": Case(heads=4, kv_heads=1, shares_pages=True),
    "nothing-to-do": Case(entries=()),
    "int8": Case(codes="int8"),
    "int8-heads-of-128": Case(
        heads=4, kv_heads=1, head_dim=128, context=128, codes="int8", scales="bfloat16", window=50
    ),
    "fp8": Case(heads=8, kv_heads=1, codes="float8_e4m3fn", window=50, soft_cap=2.0, has_sinks=True),
    "fp8-heads-of-256": Case(heads=2, kv_heads=1, head_dim=256, codes="float8_e4m3fn"),
    "fp8-no-group": Case(heads=2, kv_heads=2, head_dim=128, codes="float8_e4m3fn", dtype="float16", page_size=64),
    "drafts": Case(entries=DRAFTS, heads=6, kv_heads=2, tokens=3),
    "drafts-window-codes": Case(
        entries=DRAFTS, heads=4, kv_heads=1, tokens=3, window=50, has_sinks=True, codes="float8_e4m3fn"
    ),
    "latent-short": Case(entries=((1, 40, 1), (0, 5, 4)), heads=16, kv_heads=1, head_dim=192, latent_dim=128),
    "latent": Case(heads=16, kv_heads=1, head_dim=192, latent_dim=128),
    "latent-odd-heads": Case(heads=5, kv_heads=1, head_dim=128, latent_dim=128, page_size=64, dtype="float16"),
    "latent-128-heads": Case(heads=128, kv_heads=1, head_dim=192, latent_dim=128, page_size=32),
    "latent-drafts": Case(entries=DRAFTS, heads=24, kv_heads=1, head_dim=192, latent_dim=128, tokens=3),
    "latent-shared-pages": Case(heads=8, kv_heads=1, head_dim=192, latent_dim=128, shares_pages=True),
    "latent-nothing-to-do": Case(entries=(), heads=8, kv_heads=1, head_dim=192, latent_dim=128),
    "latent-int8": Case(
        entries=((1, 40, 1), (0, 5, 4)), heads=16, kv_heads=1, head_dim=192, latent_dim=128, codes="int8"
    ),
    "latent-fp8": Case(
        heads=16, kv_heads=1, head_dim=192, latent_dim=128, codes="float8_e4m3fn", scales="bfloat16", page_size=32
    ),
    "latent-fp8-float16": Case(
        heads=5, kv_heads=1, head_dim=128, latent_dim=128, codes="float8_e4m3fn", dtype="float16", page_size=64
    ),
    "latent-int8-128-heads": Case(heads=128, kv_heads=1, head_dim=192, latent_dim=128, codes="int8"),
    "latent-int8-drafts": Case(
        entries=DRAFTS, heads=24, kv_heads=1, head_dim=192, latent_dim=128, tokens=3, codes="int8"
    ),
    "deepseek": Case(entries=((1, 299, 1), (0, 70, 5)), heads=16, kv_heads=1, head_dim=576, latent_dim=512),
    "deepseek-fp8": Case(
        entries=((1, 299, 1), (0, 70, 5)), heads=16, kv_heads=1, head_dim=576, latent_dim=512, codes="float8_e4m3fn"
    ),
    "bug-latent-not-cleared": Case(heads=8, kv_heads=1, head_dim=192, latent_dim=128, bug="clear_outside"),
    "bug-latent-not-awaited": Case(heads=8, kv_heads=1, head_dim=192, latent_dim=128, bug="barrier_wait"),
    "bug-latent-codes-not-cleared": Case(
        heads=8, kv_heads=1, head_dim=192, latent_dim=128, codes="float8_e4m3fn", bug="clear_outside"
    ),
    "bug-latent-scales-not-cleared": Case(
        heads=8, kv_heads=1, head_dim=192, latent_dim=128, codes="int8", bug="held_scales"
    ),
    "bug-latent-codes-not-awaited": Case(
        heads=8, kv_heads=1, head_dim=192, latent_dim=128, codes="int8", bug="barrier_wait"
    ),
    "bug-codes-not-cleared": Case(heads=4, kv_heads=1, codes="float8_e4m3fn", bug="clear_outside"),
    "bug-scales-not-cleared": Case(heads=4, kv_heads=1, codes="int8", bug="held_scales"),
    "bug-values-not-cleared": Case(heads=4, kv_heads=1, bug="clear_outside"),
    "bug-blocks-not-awaited": Case(heads=4, kv_heads=1, bug="barrier_wait"),
}
# Latent caches are one kernel, and both forms of it run: numbers, and codes.
QUICK = {
    "paged_decode": ("window-sinks-soft-cap", "latent-int8"),
    "paged_prefill": ("window-sinks-soft-cap", "latent-short"),
}
EDGES = (0, 1, 15, 16, 17, 63, 64, 65, 127, 255, 256, 257)      # tokens before a step's


def case_of(name: str) -> Case:
    """One of CASES, or a random step: rows, lengths, chunks, a window or none, shared pages, every other one latent."""
    if not name.startswith("random-"):
        return CASES[name]
    seed = int(name.removeprefix("random-"))
    rng = np.random.default_rng(seed)
    rows = rng.permutation(6)[: rng.integers(1, 5)].tolist()
    decodes = rng.integers(0, len(rows) + 1)
    entries = tuple(
        (row, int(rng.choice(EDGES)), 1 if index < decodes else int(rng.integers(1, 15)))
        for index, row in enumerate(rows)
    )
    shares_pages = bool(rng.integers(2))
    if seed % 2:
        return Case(
            entries=entries, heads=int(rng.choice((3, 16, 40))), kv_heads=1, head_dim=192, latent_dim=128,
            shares_pages=shares_pages, codes=(None, "int8", "float8_e4m3fn")[rng.integers(3)],
        )
    return Case(
        entries=entries, heads=int(rng.choice((2, 6, 10))), window=(None, 1, 40)[rng.integers(3)],
        has_sinks=bool(rng.integers(2)), shares_pages=shares_pages,
    )


def run(op: str, case: Case) -> dict[str, float | bool]:
    """What the simulated kernel gives beside the reference."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    kernel = importlib.import_module(f"kernels_pallas.{op}.mosaic_gpu")
    reference = importlib.import_module(f"kernels_pallas.{op}.reference")
    watch_copies()
    plant(case.bug)
    arrays, options = inputs(case)
    if op == "paged_decode":
        options["tokens"] = case.tokens
    expected = getattr(reference, op)(*arrays, **options)
    blocks = hopper.Blocks(context=case.context, stages=2, programs=2)
    simulated = plgpu.InterpretGPUParams(detect_races=True)
    got = getattr(kernel, op)(*arrays, **options, blocks=blocks, interpret=simulated)
    error = np.abs(np.asarray(got, np.float32) - np.asarray(expected, np.float32))
    return {
        "error": float(np.nan_to_num(error).max()), "finite": bool(np.isfinite(error).all()), "races": races_found(),
        "largest": float(jnp.abs(expected).max()),
    }


def inputs(case: Case) -> tuple[tuple[jax.Array | AttentionWork, ...], dict[str, object]]:
    """The arrays and options of an attention op."""
    rng = np.random.default_rng(0)
    S, K, H, R, T = case.page_size, case.kv_heads, case.head_dim, 6, 64
    M = -(-max((start + count for _, start, count in case.entries), default=1) // S) + 1
    P = R * M + 3
    row_A, start_A, count_A = np.array(case.entries, np.int32).reshape(-1, 3).T.copy()
    page_RM = rng.permutation(P)[: R * M].reshape(R, M).astype(np.int32)
    if case.shares_pages:
        page_RM[0] = page_RM[1]
    decode_count = next((i for i, count in enumerate(count_A) if count != case.tokens), len(count_A))
    planned = plan_work(
        row_A=row_A, start_A=start_A, count_A=count_A, decode_count=decode_count, token_count_bucket=T, row_count=R,
        decode_tokens=case.tokens,
    )
    work = AttentionWork.from_arrays({name: jnp.asarray(value) for name, value in planned.items()})
    held_PS = np.zeros((P, S), bool)
    for row, start, count in case.entries:
        begin = max(0, start + 1 - case.window) if case.window else 0
        at = np.arange(begin, start + count)
        held_PS[page_RM[row, at // S], at % S] = True
    k_PKSH, v_PKSH = (_pool(case, rng.normal(size=(P, K, S, H)), held_PS) for _ in range(2))
    if case.latent_dim is not None:
        v_PKSH = None
    q_TNH = jnp.asarray(rng.normal(size=(T, case.heads, H)), case.dtype)
    sink_N = jnp.asarray(rng.normal(size=case.heads), jnp.float32) if case.has_sinks else None
    options = {"scale": H**-0.5, "window": case.window, "soft_cap": case.soft_cap, "sink_N": sink_N}
    if case.latent_dim is not None:
        options["value_dim"] = case.latent_dim
    return (q_TNH, k_PKSH, v_PKSH, jnp.asarray(page_RM), work), options


def _pool(case: Case, x_PKSH: np.ndarray, held_PS: np.ndarray) -> Pages:
    is_held = held_PS[:, None, :, None]
    if case.codes is None:
        return jnp.asarray(np.where(is_held, x_PKSH, np.nan), case.dtype)
    code, scale = quantize(jnp.asarray(x_PKSH).reshape(-1, *x_PKSH.shape[2:]), case.codes, case.scales)
    code_PKSH, scale_PKS = code.reshape(x_PKSH.shape), scale.reshape(x_PKSH.shape[:3])
    if case.codes.startswith("float"):
        code_PKSH = jnp.where(is_held, code_PKSH, jnp.nan).astype(case.codes)
    return QuantizedPages(code_PKSH, jnp.where(is_held[..., 0], scale_PKS, jnp.nan).astype(case.scales))


def watch_copies() -> None:
    """Refuses copies with a tensor map that need not begin at multiples of 128 bytes of shared memory.

    Parts of one size lie side by side, so each begins at a multiple of its size.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    copy = plgpu.copy_gmem_to_smem

    def watched(source: Any, to: Any, barrier: Any, **options: Any) -> None:
        size = math.prod(to.shape) * jnp.dtype(to.dtype).itemsize
        alignment = 16 if options.get("oob_mode") == plgpu.OOBFillMode.PROMISE_IN_BOUNDS else 128
        assert size % alignment == 0, f"a copy of {size} bytes, {alignment} is its alignment"
        copy(source, to, barrier, **options)

    plgpu.copy_gmem_to_smem = watched


def plant(bug: str | None) -> None:
    """Breaks the kernels: a check that cannot fail checks nothing."""
    from kernels_pallas import mosaic

    if bug == "clear_outside":
        mosaic.clear_outside = lambda *_, **__: None
    elif bug == "held_scales":
        mosaic.held_scales = lambda ring, place, layout, *_: mosaic.scales(ring, place, layout)
    elif bug == "barrier_wait":   # the loader overwrites blocks that are being read
        known = mosaic.plgpu
        loader = types.SimpleNamespace(**{name: getattr(known, name) for name in dir(known)})
        loader.barrier_wait = lambda *_: None
        mosaic.plgpu = loader


def races_found() -> bool:
    """Of all kernels that this process ran."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # jax has no public name for the finding

    return bool(interpret_pallas_call.get_races().races_found)


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)     # the simulator multiplies poison with numpy
    print(json.dumps(run(sys.argv[1], case_of(sys.argv[2]))))
