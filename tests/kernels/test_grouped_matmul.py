"""Products by group: against the reference, empty groups, rows past the last group, and what a row depends on."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import hopper
from kernels_pallas.contract import ContractError, NoImplementationError
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.grouped_matmul.xla import TILE_ROWS_MAX, tile_rows


def arrays(counts: list[int], spare: int = 0, dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x_TI = jnp.asarray(rng.normal(size=(sum(counts) + spare, 24)), dtype)
    weight_EOI = jnp.asarray(rng.normal(size=(len(counts), 40, 24)), dtype)
    return x_TI, weight_EOI, jnp.asarray(counts, jnp.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("counts", [[1], [0, 1], [5, 0, 0, 3], [0, 0, 0, 130], [70, 1, 65, 64], [2] * 40])
def test_equals_the_reference(counts: list[int], dtype: str) -> None:
    x_TI, weight_EOI, count_E = arrays(counts, dtype=dtype)
    found = grouped_matmul(x_TI, weight_EOI, count_E, implementation="xla")
    expected = grouped_matmul(x_TI, weight_EOI, count_E, implementation="reference")
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_rows_past_the_last_group_disturb_nobody() -> None:
    x_TI, weight_EOI, count_E = arrays([3, 4], spare=9)
    found = grouped_matmul(x_TI, weight_EOI, count_E, implementation="xla")
    alone = grouped_matmul(x_TI[:7], weight_EOI, count_E, implementation="reference")
    np.testing.assert_allclose(found[:7], alone, rtol=0, atol=1e-4)


def test_a_group_without_rows_is_not_read() -> None:
    x_TI, weight_EOI, count_E = arrays([3, 0, 4])
    poisoned_EOI = weight_EOI.at[1].set(jnp.nan)
    assert np.isfinite(grouped_matmul(x_TI, poisoned_EOI, count_E, implementation="xla")).all()


def test_refuses_what_breaks_the_contract() -> None:
    x_TI, weight_EOI, count_E = arrays([3, 4])
    with pytest.raises(ContractError, match=r"counts must be int32 \[2\]"):
        grouped_matmul(x_TI, weight_EOI, count_E[:1])
    with pytest.raises(ContractError, match="x must be"):
        grouped_matmul(x_TI[:, :3], weight_EOI, count_E)
    with pytest.raises(ContractError, match="alike"):
        grouped_matmul(x_TI.astype(jnp.bfloat16), weight_EOI, count_E)
    with pytest.raises(NoImplementationError, match="unknown implementation 'cuda'"):
        grouped_matmul(x_TI, weight_EOI, count_E, implementation="cuda")


def test_tiles_follow_the_average_group() -> None:
    assert [tile_rows(rows, 64) for rows in (1, 64, 300, 512, 10**6)] == [2, 2, 8, 8, TILE_ROWS_MAX]


@pytest.mark.parametrize("counts", [[1], [5, 0, 0, 3], [70, 1, 65, 64], [2] * 40])
def test_the_triton_kernel_equals_the_reference(counts: list[int]) -> None:
    """Interpreted, on widths that are no multiple of a block; rows past the last group stay out of it."""
    rng = np.random.default_rng(0)
    x_TI = jnp.asarray(rng.normal(size=(sum(counts) + 3, 72)), jnp.bfloat16)
    weight_EOI = jnp.asarray(rng.normal(size=(len(counts), 136, 72)), jnp.bfloat16)
    count_E = jnp.asarray(counts, jnp.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from kernels_pallas.grouped_matmul import triton

        found = triton.grouped_matmul(x_TI, weight_EOI, count_E, is_interpreted=True)
    expected = grouped_matmul(x_TI, weight_EOI, count_E, implementation="reference")
    np.testing.assert_allclose(found[: sum(counts)], expected[: sum(counts)], rtol=0, atol=1e-4)


def test_the_triton_kernel_refuses_float32() -> None:
    x_TI, weight_EOI, count_E = arrays([3, 4])
    with pytest.raises(NoImplementationError, match="10 bits"):
        grouped_matmul(x_TI, weight_EOI, count_E, implementation="triton")


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the simulator needs jax >= 0.11")
@pytest.mark.parametrize("name", ["narrow", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("uneven", "one-group", "none", "bug")
)])
def test_hopper_form_equals_the_reference_in_the_simulator_without_a_race(name: str) -> None:
    command = [sys.executable, "-m", "tests.kernels.grouped_simulator", name]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=150, check=False
    )
    if name == "bug":      # planted: the check must see it
        is_seen = "Barrier completed phase 1, but no threads observed phase 0" in done.stderr
        assert is_seen or json.loads(done.stdout.splitlines()[-1])["races"]
        return
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["finite"] and not found["races"]
    assert found["error"] <= 1e-4 * max(1.0, found["largest"])


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs jax >= 0.11")
def test_the_plan_of_tiles_is_no_loop_of_launches() -> None:
    from kernels_pallas.grouped_matmul import mosaic_gpu

    planned = str(jax.make_jaxpr(lambda count_E: mosaic_gpu._tiles(count_E, 100, 64))(jnp.zeros(8, jnp.int32)))
    assert "while" not in planned and "scan" not in planned


def test_hopper_refusals_name_everything_at_once() -> None:
    found = "; ".join(hopper.grouped_refusals(jnp.zeros((4, 72), jnp.float32), 100))
    for named in ("rows of float32", "shared width 72 is no multiple of 64", "width out 100 is a multiple of none"):
        assert named in found
