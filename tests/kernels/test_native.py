"""CPU kernels in LLVM IR: exact products, the same bits beside any others, attention like the reference, refusals."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers.mlp import ACTIVATIONS
from kernels_pallas.native import api, attend, blocks, host, vectors
from kernels_pallas.paged_decode import paged_decode
from kernels_pallas.paged_prefill import paged_prefill
from kernels_pallas.shapes import head_shape
from tests.kernels.test_attention_ops import OPS, SMOL, P, S, Step, T, make_work, shrunk

here = pytest.mark.usefixtures("served")

SHAPES = (
    (1, 16, 1), (1, 17, 31), (2, 40, 32), (3, 50, 33), (4, 96, 100), (5, 33, 64), (7, 960, 576), (33, 100, 96),
    (70, 50, 1536), (400, 48, 1536), (16, 16, 4096),      # several slabs of rows, several spans of tokens
)
BATCHES = (1, 2, 3, 4, 5, 16, 23)


@pytest.fixture
def served() -> None:
    """Asked when a test runs: asking while tests are collected would start jax's threads in every process."""
    if api.refusals():
        pytest.skip("; ".join(api.refusals()))


def numbers(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


@here
@pytest.mark.parametrize(("tokens", "outs", "width"), SHAPES)
def test_products_are_as_exact_as_float32_sums(tokens, outs, width):
    x, weight = numbers((tokens, width)), numbers((outs, width), 1)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    magnitude = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(weight, np.float64)).T
    got = jax.jit(api.matmul)(x, weight)
    assert got.dtype == jnp.float32 and got.shape == (tokens, outs)
    assert (np.abs(got - exact) <= 1e-6 * magnitude).all()


@here
@pytest.mark.parametrize("width", [33, 576])
def test_a_row_has_the_same_bits_in_a_batch_of_any_size(width):
    x, weight = numbers((max(BATCHES), width)), numbers((100, width), 1)
    multiply = jax.jit(api.matmul)
    rows = np.concatenate([multiply(x[i : i + 1], weight) for i in range(max(BATCHES))])
    for count in BATCHES:
        np.testing.assert_array_equal(multiply(x[:count], weight), rows[:count])


@here
def test_a_row_has_the_same_bits_in_slabs_and_spans():
    x, weight = numbers((400, 1536)), numbers((48, 1536), 1)
    multiply = jax.jit(api.matmul)
    whole = np.asarray(multiply(x, weight))
    for row in (0, 15, 16, 319, 320, 399):
        np.testing.assert_array_equal(multiply(x[row : row + 1], weight)[0], whole[row])


@here
@pytest.mark.parametrize(("tokens", "outs", "width"), [(1, 17, 31), (5, 33, 64), (70, 50, 96), (400, 48, 1536)])
def test_rounded_products_are_products_rounded_once(tokens, outs, width):
    x, weight = numbers((tokens, width)), numbers((outs, width), 1)
    got = jax.jit(api.matmul, static_argnames="rounds")(x, weight, rounds=True)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(got, np.float32), np.asarray(api.matmul(x, weight).astype(jnp.bfloat16), np.float32)
    )


@here
@pytest.mark.parametrize(("tokens", "outs", "width"), [(1, 16, 64), (3, 50, 100), (40, 33, 576), (16, 100, 33)])
def test_integers_are_multiplied_exactly(tokens, outs, width):
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(-128, 128, (count, width), np.int8) for count in (tokens, outs))
    got = jax.jit(api.matmul_int8)(x, weight)
    np.testing.assert_array_equal(got, x.astype(np.int64) @ weight.astype(np.int64).T)


@here
@pytest.mark.parametrize(("tokens", "width"), [(1, 32), (5, 64), (33, 576), (100, 2048)])
@pytest.mark.parametrize(("epsilon", "offset"), [(1e-5, 0.0), (1e-6, 1.0)])
def test_norms_are_those_of_float32_rounded_once(tokens, width, epsilon, offset):
    x, weight = 3 * numbers((tokens, width)), numbers((width,), 1)
    wide, factor = np.asarray(x, np.float64), np.asarray(weight, np.float64) + offset
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon) * factor
    normalise = jax.jit(api.rms_norm, static_argnames=("epsilon", "offset"))
    got = normalise(x, weight, epsilon=epsilon, offset=offset)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=2**-8, atol=1e-30)
    alone = normalise(x[-1:], weight, epsilon=epsilon, offset=offset)
    np.testing.assert_array_equal(np.asarray(got[-1:], np.float32), np.asarray(alone, np.float32))
    zeros = normalise(jnp.zeros_like(x), weight, epsilon=epsilon, offset=offset)
    assert (np.asarray(zeros, np.float32) == 0).all()


@pytest.mark.parametrize(("terms", "bound"), [(vectors.POWER, 2e-7), (vectors.POWER_SHORT, 3e-6)])
def test_powers_of_two_are_as_exact_as_they_say(terms, bound):
    x = np.linspace(-126, 0, 200_001, dtype=np.float32)
    part = x - np.round(x)
    value = np.full_like(part, terms[-1])
    for term in terms[-2::-1]:
        value = value * part + np.float32(term)
    exact = np.exp2(x.astype(np.float64))
    assert (np.abs(np.ldexp(value.astype(np.float64), np.round(x).astype(int)) - exact) <= bound * exact).all()
    assert value[-1] == 1


@here
@pytest.mark.skipif("not api.has_tiles()", reason="this CPU has no tile registers")
def test_processors_without_tile_registers_are_served_as_well():
    """The form that this process does not run, by this file's own tests."""
    chosen = "products or rounded or bits or integers or attention_equals or share_pages or threads or zeros"
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env=os.environ | {host.SWITCH: "lanes"}, capture_output=True, text=True, timeout=300, check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]


@here
def test_non_finite_numbers_stay_in_their_row():
    x = numbers((6, 64)).at[2, 5].set(jnp.nan).at[4, 63].set(jnp.inf)
    got = np.asarray(jax.jit(api.matmul)(x, numbers((32, 64), 1)))
    assert np.isfinite(got[[0, 1, 3, 5]]).all() and np.isnan(got[2]).all() and not np.isfinite(got[4]).any()


@here
@pytest.mark.parametrize(("real", "tokens"), [(0, 1), (0, 5), (1, 2), (2, 16), (5, 40), (16, 16)])
@pytest.mark.parametrize("width", [64, 33])
def test_rows_of_zeros_at_the_end_change_nothing_and_are_zeros(real, tokens, width):
    x = numbers((tokens, width)).at[real:].set(0).at[real:, 0].set(-0.0).at[: real // 2].set(0)
    weight = numbers((50, width), 1)
    got = np.asarray(jax.jit(api.matmul)(x, weight))
    assert (got[real:] == 0).all()
    for row in range(real):
        np.testing.assert_array_equal(got[row], np.asarray(jax.jit(api.matmul)(x[row : row + 1], weight))[0])


@here
@pytest.mark.parametrize(("tokens", "width", "outs"), [(1, 64, 16), (2, 96, 50), (5, 576, 40), (33, 33, 100)])
@pytest.mark.parametrize("activation", sorted(api.GATES))
def test_gated_products_are_products_and_then_the_activation(activation, tokens, width, outs):
    x, weight = numbers((tokens, width)), numbers((2 * outs, width), 1)
    multiply = jax.jit(api.matmul_gated, static_argnums=2)
    gate, up = jnp.split(api.matmul(x, weight).astype(jnp.bfloat16).astype(jnp.float32), 2, axis=-1)
    wanted = np.asarray(ACTIVATIONS[activation](gate) * up, np.float64)
    got = multiply(x, weight, activation)
    assert got.dtype == jnp.bfloat16 and got.shape == (tokens, outs)
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=2**-8, atol=1e-5 * np.abs(wanted).max())
    padded = jnp.concatenate([x, jnp.zeros((3, width), jnp.bfloat16)])
    np.testing.assert_array_equal(multiply(padded, weight, activation)[:tokens], got)
    assert (np.asarray(multiply(padded, weight, activation)[tokens:], np.float32) == 0).all()
    np.testing.assert_array_equal(multiply(x[-1:], weight, activation)[0], got[-1])


@here
@pytest.mark.parametrize("activation", sorted(api.GATES))
def test_gates_of_any_size_are_as_the_activation_has_them(activation):
    """A gate of -inf .. inf beside an up-projection of 1; NaN stays NaN."""
    finite = (-3e38, -1e30, -300, -88.5, -20, -1, -0.0, 0, 1e-3, 1, 20, 300)
    gates = jnp.asarray([-jnp.inf, *finite, jnp.inf, jnp.nan], jnp.bfloat16)
    x = jnp.zeros((len(gates), 32), jnp.bfloat16).at[:, 0].set(gates).at[:, 1].set(1)
    weight = jnp.zeros((32, 32), jnp.bfloat16).at[:16, 0].set(1).at[16:, 1].set(1)
    got = np.asarray(api.matmul_gated(x, weight, activation)[:, 0], np.float32)
    wanted = np.asarray(ACTIVATIONS[activation](gates.astype(jnp.float32)), np.float32)
    np.testing.assert_allclose(got[1:-2], wanted[1:-2], rtol=2**-7, atol=1e-6)
    assert np.isposinf(got[-2]) or np.isnan(got[-2])      # 0 x infinity in the products of the other inputs
    assert np.isnan(got[-1])


@here
def test_a_last_row_of_one_small_number_is_multiplied():
    smallest = jnp.asarray(jax.lax.bitcast_convert_type(jnp.uint16(1), jnp.bfloat16))
    x = jnp.zeros((6, 64), jnp.bfloat16).at[5, 63].set(1).at[4, 0].set(smallest)
    got = np.asarray(jax.jit(api.matmul)(x, jnp.ones((16, 64), jnp.bfloat16)))
    assert (got[5] == 1).all() and (got[:4] == 0).all()


@here
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("broken", [False, True])
def test_decodes_that_share_pages_get_the_bits_they_get_alone(window, broken):
    """Five of six rows begin with the same 9 pages, two and two of them with three more; the last entry is padding."""
    rng, N, K, H, pages = np.random.default_rng(0), 6, 2, 64, 16
    table_RM = 1 + np.arange(6 * pages, dtype=np.int32).reshape(6, pages)
    table_RM[:5, :9] = table_RM[0, :9]
    table_RM[2, 9:12], table_RM[4, 9:12] = table_RM[1, 9:12], table_RM[3, 9:12]
    length = np.array([240, 201, 200, 150, 145, 130, 0], np.int32)
    k_PKSH, v_PKSH = numbers((1 + 6 * pages, K, 16, H)), numbers((1 + 6 * pages, K, 16, H), 1)
    if broken:      # position 147 of the row of 150, read together with the one of 145; and what nobody sees
        v_PKSH = v_PKSH.at[table_RM[3, 9], :, 3].set(jnp.nan).at[table_RM[3, 9], :, 6:].set(jnp.inf)
    q_TNH = jnp.asarray(rng.standard_normal((7, N, H)), jnp.bfloat16)
    items = (
        np.arange(7, dtype=np.int32), np.array([*range(6), 0], np.int32), length - 1, np.minimum(length, 1),
    )

    def attend(span: int) -> np.ndarray:
        out = api._attend(
            q_TNH, k_PKSH, v_PKSH, jnp.asarray(table_RM), tuple(map(jnp.asarray, items)), H**-0.5, window, None,
            span=span,
        )
        return np.asarray(out, np.float32)[:6]

    alone = attend(1)
    assert np.isfinite(alone[[0, 1, 2, 4, 5]]).all() and np.isfinite(alone[3]).all() != broken
    for span in (2, 3, 5, 7):
        np.testing.assert_array_equal(attend(span), alone)


@here
def test_threads_are_not_left_without_work_by_sharing():
    cores = len(os.sched_getaffinity(0))
    assert api.decode_span(1, 9, 3) == 1
    assert api.decode_span(1000 * cores, 9, 3) == 5
    assert api.decode_span(1000 * cores, 64, 2) == 1
    assert api.decode_span(3 * api.SHARES_MIN * cores, 2, 1) == 3


@here
def test_many_products_at_once_from_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    multiply = jax.jit(lambda x, w: api.matmul(api.matmul(x, w).astype(jnp.bfloat16), w))
    weight = numbers((256, 256), 1)
    inputs = [numbers((8, 256), seed) for seed in range(8)]
    expected = [np.asarray(multiply(x, weight)) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            found = pool.map(lambda x: np.asarray(multiply(x, weight)), inputs)
            for got, wanted in zip(found, expected, strict=True):
                np.testing.assert_array_equal(got, wanted)


@here
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["smollm2-135m", "gpt-oss-20b-local", "qwen2.5-3b"])
def test_attention_equals_the_reference_to_its_precision(name, op):
    shape = head_shape(name)
    step = Step(shrunk(shape), jnp.bfloat16)
    np.testing.assert_allclose(step.run(op, "native"), step.run(op, "reference"), rtol=2e-2, atol=2e-2)


@here
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dim", range(blocks.DIM_STEP, attend.DIM_MAX + 1, blocks.DIM_STEP))
def test_every_head_dimension_is_served(dim, op):
    import dataclasses

    step = Step(dataclasses.replace(SMOL, head_dim=dim, head_count=6, kv_head_count=2), jnp.bfloat16)
    expected = step.run(op, "reference")
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(step.run(op, "native"), expected, rtol=2e-2, atol=2e-2)


@here
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("window", [None, 1, 50])
def test_unseen_slots_and_padding_change_no_bit(op, window):
    step = Step(SMOL, jnp.bfloat16)
    step.options["window"] = window
    clean = step.run(op, "native")
    seen = np.zeros((P, S), bool)
    for row, start, count in step.entries:
        at = np.arange(max(0, start + 1 - window) if window else 0, start + count)
        seen[np.asarray(step.page_RM)[row, at // S], at % S] = True
    poison = jnp.asarray(~seen)[:, None, :, None]
    k, v = (jnp.where(poison, jnp.nan, x) for x in (step.k_PKSH, step.v_PKSH))
    q = jnp.where(jnp.arange(T)[:, None, None] < step.token_count, step.q_TNH, jnp.nan)
    poisoned = step.run(op, "native", q=q, k=k, v=v)
    np.testing.assert_array_equal(poisoned, clean)
    assert (poisoned[step.token_count :] == 0).all()


@here
@pytest.mark.parametrize(("start", "window", "seeing"), [
    (70, None, slice(15, 40)), (70, 10, slice(15, 25)), (140, 60, slice(0, 5)),     # of a block of slots long past
])
def test_what_only_some_tokens_of_a_chunk_see_is_nothing_to_the_others(start, window, seeing):
    step = Step(SMOL, jnp.bfloat16, entries=((1, start, 40),), decode_count=0)
    step.options["window"] = window
    clean = step.run(paged_prefill, "native")
    page, slot = int(step.page_RM[1, 85 // S]), 85 % S
    k, v = (x.at[page, :, slot].set(jnp.nan) for x in (step.k_PKSH, step.v_PKSH))
    got = step.run(paged_prefill, "native", k=k, v=v)
    assert np.isnan(got[seeing]).all()
    others = np.setdiff1d(np.arange(T), np.arange(T)[seeing])
    np.testing.assert_array_equal(got[others], clean[others])


@here
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (10, 2), (8, 1)])
def test_groups_of_any_number_of_heads(heads, kv_heads):
    import dataclasses

    step = Step(dataclasses.replace(SMOL, head_count=heads, kv_head_count=kv_heads), jnp.bfloat16)
    for op in OPS:
        np.testing.assert_allclose(step.run(op, "native"), step.run(op, "reference"), rtol=2e-2, atol=2e-2)


@here
def test_a_decode_has_the_bits_that_a_prompt_chunk_has():
    decode = Step(SMOL, jnp.bfloat16, entries=((1, 70, 1), (2, 5, 1)), decode_count=2)
    chunk = Step(SMOL, jnp.bfloat16, entries=((1, 70, 1), (2, 5, 1)), decode_count=0)
    np.testing.assert_array_equal(chunk.run(paged_prefill, "native"), decode.run(paged_decode, "native"))


@here
def test_an_empty_step_gives_zeros():
    step = Step(SMOL, jnp.bfloat16)
    empty = np.zeros(0, np.int32)
    step.work = make_work(empty, empty, empty, 0)
    for op in OPS:
        assert (step.run(op, "native") == 0).all()


@here
def test_what_it_does_not_serve_is_refused_with_reasons():
    step = Step(SMOL, jnp.float32)
    with pytest.raises(NotImplementedError, match=r"native: queries must be bfloat16, got float32; pages must hold"):
        step.run(paged_decode, "native")
    short = Step(SMOL, jnp.bfloat16)
    short.options["soft_cap"] = 2.0
    with pytest.raises(NotImplementedError, match="native: no soft caps"):
        short.run(paged_prefill, "native")
    with pytest.raises(NotImplementedError, match="native: one token an entry, got 2"):
        paged_decode(
            short.q_TNH, short.k_PKSH, short.v_PKSH, short.page_RM, short.work, scale=1.0, tokens=2,
            implementation="native",
        )


@pytest.mark.parametrize(("environment", "reason"), [
    ({host.SWITCH: "off"}, f"{host.SWITCH} is off"),
    ({"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, "they serve one device, there are 2"),
])
def test_xla_serves_where_they_do_not(environment, reason):
    if importlib.util.find_spec("llvmlite") is None or (api.refusals() and "XLA_FLAGS" in environment):
        pytest.skip("refused for another reason here")
    program = (
        "import jax.numpy as jnp; from kernels_pallas.native import api; from jaxserve.layers.linear import matmul\n"
        "x = jnp.ones((4, 32), jnp.bfloat16); w = jnp.ones((16, 32), jnp.bfloat16)\n"
        "print(api.refusals(), api.identity() == '', float(matmul(x, w)[0, 0]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, timeout=100,
        check=False,
    )
    assert reason in found.stdout and "True 32.0" in found.stdout, found.stdout + found.stderr
