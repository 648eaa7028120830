"""Both attention ops: the XLA path against the reference, poison, independence of the batch, refusals."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.contract import ContractError, NoImplementationError
from kernels_pallas.paged_decode import paged_decode
from kernels_pallas.paged_prefill import paged_prefill
from kernels_pallas.shapes import HEAD_SHAPES, HeadShape, head_shape
from kernels_pallas.work import AttentionWork, plan_work

R, M, S, P, T = 12, 24, 16, 320, 160
SMOL = head_shape("smollm2-135m")   # whole: nine heads of 64 over three
OPS = (paged_decode, paged_prefill)

# Lengths around page and chunk edges; rows out of order; decodes first.
ENTRIES = (
    (3, 0, 1), (1, 300, 1), (7, 15, 1), (9, 16, 1), (10, 255, 1), (4, 256, 1), (6, 17, 1), (8, 383, 1), (5, 31, 1),
    (2, 100, 40), (11, 0, 33), (0, 240, 20),
)


class Step:
    """A pool with every held slot filled, and the packed queries of a step."""

    def __init__(self, shape: HeadShape, dtype: jnp.dtype, entries=ENTRIES, decode_count: int = 9,
                 decode_tokens: int = 1):
        rng = np.random.default_rng(0)
        self.shape, self.entries = shape, entries
        K, H = shape.kv_head_count, shape.head_dim
        row, start, count = (np.array(column, np.int32) for column in zip(*entries, strict=True))
        page = rng.permutation(P)[: R * M].reshape(R, M)
        self.page_RM = jnp.asarray(page, jnp.int32)
        pages = rng.normal(size=(2, P, K, S, H))
        held = np.zeros((P, S), bool)
        for r, first, n in entries:
            at = np.arange(first + n)
            held[page[r, at // S], at % S] = True
        self.held_PS = held
        self.k_PKSH, self.v_PKSH = (jnp.asarray(x, dtype) for x in pages)
        if shape.latent_dim is not None:
            self.v_PKSH = None
        self.q_TNH = jnp.asarray(rng.normal(size=(T, shape.head_count, H)), dtype)
        self.work = make_work(row, start, count, decode_count, decode_tokens=decode_tokens)
        self.token_count = int(count.sum())
        self.options = {
            "scale": H**-0.5,
            "window": shape.window and min(shape.window, 50),
            "soft_cap": shape.soft_cap and 2.0,
            "value_dim": shape.latent_dim,
            "sink_N": jnp.asarray(rng.normal(size=shape.head_count), jnp.float32) if shape.has_sinks else None,
        }

    def run(self, op, implementation: str, tokens: int = 1, **changes) -> np.ndarray:
        given = {"q": self.q_TNH, "k": self.k_PKSH, "v": self.v_PKSH, **changes}
        static = {name: self.options[name] for name in ("scale", "window", "soft_cap", "value_dim")}
        if op is paged_decode:
            static["tokens"] = tokens
        out = run_op(
            given["q"], given["k"], given["v"], self.page_RM, self.work, self.options["sink_N"],
            op=op, implementation=implementation, **static,
        )
        return np.asarray(out.astype(jnp.float32))


STATIC = ("op", "implementation", "scale", "window", "soft_cap", "tokens", "value_dim")


@functools.partial(jax.jit, static_argnames=STATIC)
def run_op(q, k, v, page_RM, work, sink_N, *, op, implementation, **options):
    """Compiled once for all tests of equal shapes and options."""
    return op(q, k, v, page_RM, work, sink_N=sink_N, implementation=implementation, **options)


def shrunk(shape: HeadShape) -> HeadShape:
    """Equal grouping and options on fewer heads: the reference gathers every row's whole context for every token."""
    kv_heads = min(shape.kv_head_count, 2)
    group = min(shape.head_count // shape.kv_head_count, 16)
    return dataclasses.replace(
        shape, kv_head_count=kv_heads, head_count=kv_heads * group, head_dim=min(shape.head_dim, 64),
        latent_dim=shape.latent_dim and 48,
    )


def make_work(row, start, count, decode_count, tokens: int = T, decode_tokens: int = 1) -> AttentionWork:
    planned = plan_work(
        row_A=row, start_A=start, count_A=count, decode_count=decode_count, token_count_bucket=tokens, row_count=R,
        decode_tokens=decode_tokens,
    )
    return AttentionWork.from_arrays({name: jnp.asarray(value) for name, value in planned.items()})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", HEAD_SHAPES[:-1], ids=lambda s: s.name)     # the last is the one before it, shrunk
def test_float32_equals_the_reference_closely(shape, op):
    step = Step(shrunk(shape), jnp.float32)
    expected, got = step.run(op, "reference"), step.run(op, "xla")
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stored", ["bfloat16", "uint16"])
def test_bfloat16_equals_the_reference_to_its_precision(op, stored):
    step = Step(SMOL, jnp.bfloat16)
    expected = step.run(op, "reference")
    if stored == "uint16":
        step.k_PKSH, step.v_PKSH = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (step.k_PKSH, step.v_PKSH))
    np.testing.assert_allclose(step.run(op, "xla"), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["smollm2-135m", "gpt-oss-20b-local", "deepseek-v2-lite"])
def test_poisoned_slots_and_padding_change_no_bit(op, name):
    step = Step(shrunk(head_shape(name)), jnp.float32)
    clean = step.run(op, "xla")
    free = jnp.asarray(~step.held_PS)[:, None, :, None]
    k, v = (None if x is None else jnp.where(free, jnp.nan, x) for x in (step.k_PKSH, step.v_PKSH))
    q = jnp.where(jnp.arange(T)[:, None, None] < step.token_count, step.q_TNH, jnp.nan)
    poisoned = step.run(op, "xla", q=q, k=k, v=v)
    np.testing.assert_array_equal(poisoned, clean)
    assert (poisoned[step.token_count :] == 0).all()


def test_slots_before_the_window_are_never_read():
    step = Step(SMOL, jnp.float32)
    step.options["window"] = 50
    for op in OPS:
        clean = step.run(op, "xla")
        seen = np.zeros((P, S), bool)
        for row, start, count in step.entries:
            at = np.arange(max(0, start - 49), start + count)
            seen[np.asarray(step.page_RM)[row, at // S], at % S] = True
        poison = jnp.asarray(~seen)[:, None, :, None]
        k, v = (jnp.where(poison, jnp.nan, x) for x in (step.k_PKSH, step.v_PKSH))
        np.testing.assert_array_equal(step.run(op, "xla", k=k, v=v), clean)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_gives_the_same_bits_whatever_runs_beside_it(dtype):
    """Alone, among others, in another order and another bucket: chunks start at fixed positions."""
    step = Step(SMOL, dtype)
    together = {op: step.run(op, "xla") for op in OPS}
    first = np.cumsum([0] + [count for _, _, count in step.entries])
    for index, (row, start, count) in enumerate(step.entries):
        op = paged_decode if index < 9 else paged_prefill
        tokens = 64
        alone = object.__new__(Step)
        alone.__dict__.update(step.__dict__)
        columns = (np.array([value], np.int32) for value in (row, start, count))
        alone.work = make_work(*columns, decode_count=int(index < 9), tokens=tokens)
        begin = first[index]
        own_TNH = step.q_TNH[begin : begin + count]
        alone.q_TNH = jnp.zeros((tokens, *own_TNH.shape[1:]), dtype).at[:count].set(own_TNH)
        np.testing.assert_array_equal(alone.run(op, "xla")[:count], together[op][begin : begin + count])


def test_a_prefill_of_one_token_equals_a_decode():
    decode = Step(SMOL, jnp.float32, entries=((1, 70, 1), (2, 5, 1)), decode_count=2)
    chunk = Step(SMOL, jnp.float32, entries=((1, 70, 1), (2, 5, 1)), decode_count=0)
    np.testing.assert_allclose(chunk.run(paged_prefill, "xla"), decode.run(paged_decode, "xla"), rtol=1e-5, atol=1e-6)


def test_shared_pages_serve_two_rows():
    step = Step(SMOL, jnp.float32, entries=((1, 70, 1), (2, 70, 1)), decode_count=2)
    step.page_RM = step.page_RM.at[2].set(step.page_RM[1])
    step.q_TNH = step.q_TNH.at[1].set(step.q_TNH[0])
    out = step.run(paged_decode, "xla")
    np.testing.assert_array_equal(out[0], out[1])


def test_an_empty_step_gives_zeros():
    step = Step(SMOL, jnp.float32)
    empty = np.zeros(0, np.int32)
    step.work = make_work(empty, empty, empty, 0)
    for op in OPS:
        assert (step.run(op, "xla") == 0).all()


def test_every_violation_is_named():
    step = Step(SMOL, jnp.float32)
    with pytest.raises(ContractError, match=r"head dimension of q is 32.*window must be None or >= 1, got 0"):
        paged_decode(step.q_TNH[..., :32], step.k_PKSH, step.v_PKSH, step.page_RM, step.work, scale=1.0, window=0)
    with pytest.raises(ContractError, match="decode_token_W"):
        paged_decode(step.q_TNH[:4], step.k_PKSH, step.v_PKSH, step.page_RM, step.work, scale=1.0)


def test_keys_that_are_values_need_their_width_and_nothing_beside_them():
    step = Step(shrunk(head_shape("deepseek-v2-lite")), jnp.float32)
    arrays = (step.q_TNH, step.k_PKSH, None, step.page_RM, step.work)
    for wrong in (None, 0, 65):
        with pytest.raises(ContractError, match=f"value_dim must be 1 .. 64, .* got {wrong}"):
            paged_decode(*arrays, scale=1.0, value_dim=wrong)
    with pytest.raises(ContractError, match="value_dim 48 is for keys that are values too"):
        paged_prefill(step.q_TNH, step.k_PKSH, step.k_PKSH, step.page_RM, step.work, scale=1.0, value_dim=48)
    refused = {"triton": "48 values and 16 numbers more", "native": "a latent cache. are not implemented"}
    for backend, why in refused.items():
        with pytest.raises(NoImplementationError, match=why):
            paged_prefill(*arrays, scale=1.0, value_dim=48, implementation=backend)


def test_what_nobody_serves_is_refused_with_each_reason():
    step = Step(SMOL, jnp.float32)
    k, v = (x.astype(jnp.int8) for x in (step.k_PKSH, step.v_PKSH))
    with pytest.raises(NoImplementationError, match=r"xla: pages of int8.*need scales.*reference: pages of int8"):
        paged_prefill(step.q_TNH, k, v, step.page_RM, step.work, scale=1.0)
    with pytest.raises(NoImplementationError, match="implementation 'mosaic'; there are native, xla, reference, m"):
        paged_prefill(step.q_TNH, step.k_PKSH, step.v_PKSH, step.page_RM, step.work, scale=1.0, implementation="mosaic")


def test_context_length_needs_no_bucket():
    """The loops' trip counts are data: one program serves short and long contexts, and short ones read little."""
    step = Step(SMOL, jnp.float32)
    traces = []

    @jax.jit
    def run(q, k, v, p, w):
        traces.append(1)
        return paged_decode(q, k, v, p, w, implementation="xla", **step.options)

    for start in (0, 100, 380):
        row, count = np.array([1], np.int32), np.array([1], np.int32)
        work = make_work(row, np.array([start], np.int32), count, 1)
        run(step.q_TNH, step.k_PKSH, step.v_PKSH, step.page_RM, work)
    assert len(traces) == 1
    gathered = run.lower(step.q_TNH, step.k_PKSH, step.v_PKSH, step.page_RM, step.work).compile().memory_analysis()
    whole_context = 2 * R * M * S * SMOL.kv_head_count * SMOL.head_dim * 4
    assert gathered.temp_size_in_bytes < whole_context


DRAFTED = ((3, 0, 4), (1, 300, 4), (7, 13, 4), (9, 14, 4), (10, 253, 4), (2, 100, 40), (0, 30, 4))


@pytest.mark.parametrize("name", [pytest.param("smollm2-135m", marks=pytest.mark.slow), "gpt-oss-20b-local"])
def test_tokens_that_verify_a_draft_equal_the_reference_and_a_prefill_of_them(name):
    """Four tokens an entry over one reading of its context, beside a prefill of other rows."""
    step = Step(shrunk(head_shape(name)), jnp.float32, entries=DRAFTED, decode_count=5, decode_tokens=4)
    expected, got = (step.run(paged_decode, which, tokens=4) for which in ("reference", "xla"))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-6)
    assert (got[20:] == 0).all() and (step.run(paged_prefill, "xla")[:20] == 0).all()
    step.work = make_work(*(np.array(column, np.int32) for column in zip(*DRAFTED, strict=True)), decode_count=0)
    np.testing.assert_allclose(step.run(paged_prefill, "xla")[:20], got[:20], rtol=1e-5, atol=3e-6)


def test_tokens_beyond_the_step_are_a_violation():
    step = Step(SMOL, jnp.float32)
    with pytest.raises(ContractError, match="tokens must be 1 .. 160, those of the step, got 161"):
        step.run(paged_decode, "xla", tokens=161)
