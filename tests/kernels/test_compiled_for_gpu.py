"""The GPU kernels compiled for an H200 that is not there; and that they are refused where they cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import contract, hopper
from kernels_pallas.contract import NoImplementationError
from kernels_pallas.paged_decode import paged_decode
from kernels_pallas.paged_prefill.api import QUANTIZED_HEAD_DIM_MAX
from kernels_pallas.quantized import FP8, FP8_BITS, QuantizedPages
from scripts.bench_kernels import call_of
from scripts.check_kernels import missing

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["check_kernels.py", "check_steps.py", "check_portable.py", "check_launches.py"])
def test_kernels_and_steps_compile_as_the_tables_say(script: str) -> None:
    if (why := missing()) is not None:
        pytest.skip(why)
    done = subprocess.run(
        [sys.executable, f"scripts/{script}"], cwd=ROOT, env=os.environ | {"PYTHONPATH": "."},
        capture_output=True, text=True, timeout=280, check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_refusals_name_everything_at_once() -> None:
    q_TNH = jnp.zeros((4, 130, 96), jnp.float32)
    k_PKSH = jnp.zeros((2, 2, 12, 96), jnp.bfloat16)
    found = "; ".join(hopper.refusals(q_TNH, k_PKSH))
    where = "Hopper" if jax.__version_info__ >= (0, 11) else "jax >= 0.11"
    for named in (where, "head dimension 96", "page size 12", "65 query heads", "q of float32 over pages of bfloat16"):
        assert named in found


def test_triton_refusals_name_everything_at_once() -> None:
    codes = QuantizedPages(jnp.zeros((2, 2, 16, 96), FP8), jnp.zeros((2, 2, 16), jnp.float32))
    found = "; ".join(contract.triton_refusals(jnp.zeros((4, 4, 96), jnp.float32), codes, codes=("int8",)))
    for named in ("needs a GPU", "head dimension 96", "got float32", "only int8, not float8_e4m3fn"):
        assert named in found
    pages = jnp.zeros((2, 2, 16, 64), jnp.float16)
    found = "; ".join(contract.triton_refusals(jnp.zeros((4, 4, 64), jnp.bfloat16), pages))
    assert "pages of float16 beside values of bfloat16" in found


@pytest.mark.parametrize(
    ("pages", "is_refused"), [(1 << 19, False), (3 << 18, True), (1 << 20, True), (5 << 18, False)]
)
def test_triton_refuses_codes_whose_offsets_overflow(pages: int, *, is_refused: bool) -> None:
    code = jax.ShapeDtypeStruct((pages, 2, 16, 128), jnp.int8)
    pool = QuantizedPages(code, jax.ShapeDtypeStruct(code.shape[:3], jnp.float32))
    found = contract.triton_refusals(jnp.zeros((4, 4, 128), jnp.bfloat16), pool, codes=("int8",))
    assert any("offsets jax would overflow" in why for why in found) == is_refused


def test_pages_larger_than_a_block_are_refused() -> None:
    q_TNH = jnp.zeros((4, 8, 256), jnp.bfloat16)
    pages_PKSH = {size: jnp.zeros((2, 2, size, 256), jnp.bfloat16) for size in (64, 128)}
    assert not any("page size" in reason for reason in hopper.refusals(q_TNH, pages_PKSH[64]))
    assert any("none of 16, 32, 64 (at heads of 256)" in reason for reason in hopper.refusals(q_TNH, pages_PKSH[128]))


def test_a_named_kernel_never_falls_back() -> None:
    from kernels_pallas.paged_decode.cases import CASES

    call, arrays = call_of("paged_decode", CASES[0], jnp.dtype(jnp.bfloat16))
    options = {**call.keywords, "implementation": "mosaic_gpu"}
    with pytest.raises(NoImplementationError, match=r"paged_decode: no implementation serves.*mosaic_gpu: needs"):
        paged_decode(*arrays, **options)


def test_codes_are_refused_where_a_kernel_cannot_take_them() -> None:
    scale_PKS = jnp.zeros((2, 2, 16), jnp.float32)
    bits = QuantizedPages(jnp.zeros((2, 2, 16, 128), FP8_BITS), scale_PKS)
    assert any("codes of uint8 are for CPUs" in why for why in hopper.refusals(jnp.zeros((4, 4, 128)), bits))
    q_TNH, wide = jnp.zeros((4, 4, 256), jnp.bfloat16), QuantizedPages(jnp.zeros((2, 2, 16, 256), FP8), scale_PKS)
    assert not any("quantised" in why for why in hopper.refusals(q_TNH, wide))
    assert any("heads up to 128, not 256" in why for why in hopper.refusals(q_TNH, wide, QUANTIZED_HEAD_DIM_MAX))


def test_a_latent_cache_is_refused_where_the_kernel_cannot_take_it() -> None:
    def refused(slots: int, width: int, values: int, kv_heads: int = 1, **asked: object) -> str:
        q_TNH, k_PKSH = jnp.zeros((4, 16, width), jnp.bfloat16), jnp.zeros((2, kv_heads, slots, width), jnp.bfloat16)
        options = {"window": None, "soft_cap": None, "has_sinks": False} | asked
        where = hopper.environment_refusals()
        return "; ".join(why for why in hopper.latent_refusals(q_TNH, k_PKSH, values, **options) if why not in where)

    assert not refused(16, 576, 512) and not refused(64, 576, 512)
    found = refused(128, 600, 500, kv_heads=2, window=7, soft_cap=1.0, has_sinks=True)
    for named in ("one kv head, this one 2", "600 numbers", "500 values", "page size 128 is none of 16, 32, 64",
                  "a window over", "a soft cap over", "sinks over"):
        assert named in found
    bits = QuantizedPages(jnp.zeros((2, 1, 16, 576), FP8_BITS), jnp.zeros((2, 1, 16), jnp.float32))
    options = {"window": None, "soft_cap": None, "has_sinks": False}
    assert any("codes of uint8" in why for why in hopper.latent_refusals(jnp.zeros((4, 16, 576)), bits, 512, **options))
    block, beside = hopper.LATENT_SLOTS * 576, 64 * (576 + 64) * 2 + 64 * 4
    for shared in (hopper.LATENT_STAGES * block * 2, hopper.LATENT_STAGES * (block + 64 * 4) + block * 2):
        assert shared + beside <= hopper.PROGRAM_BYTES_MAX


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize("head_dim", hopper.HEAD_DIMS)
@pytest.mark.parametrize("group", [0, 8, 64])
def test_blocks_fit_into_shared_memory(group: int, head_dim: int, is_quantized: bool) -> None:
    """Of prefill (no group beside the rings) and of decode."""
    need = hopper.prefill_need(head_dim, 16, is_quantized=is_quantized)
    if group:
        need = hopper.decode_need(head_dim, 16, is_quantized=is_quantized, group=group)
    blocks = hopper.blocks("paged_decode" if group else "paged_prefill", need)
    assert blocks.stages >= 2 and blocks.context % 64 == 0
    pair = 2 * blocks.context * head_dim
    ring = blocks.stages * (pair + 8 * blocks.context) + 2 * pair if is_quantized else blocks.stages * 2 * pair
    queries = (group or 128) * head_dim * 2
    assert ring + queries + group * blocks.context * 2 <= 226 * 1024 < 227 * 1024
    assert ring + (0 if group else queries) <= hopper.SHARED_BYTES_MAX


def test_programs_are_as_many_as_the_device_has_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 PCIe has 114 and an H20 78; without a device those of an H100 SXM and an H200 are assumed."""
    assert hopper.multiprocessors() == 132 == hopper.Blocks(context=64, stages=2).programs
    device = SimpleNamespace(platform="gpu", core_count=78, device_kind="NVIDIA H20")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert hopper.Tiles(rows=8, warpgroups=1, stages=2).programs == 78
