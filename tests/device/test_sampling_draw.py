"""Choosing tokens and reporting on them: greedy, the draw's distribution and keys, logprobs in four modes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.plan import RowAdmission
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.runner import row_state, sampling, vocab

V, R, X = 300, 16, 5
MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")


def admitted(holders: dict[int, tuple[SamplingParams, int, int]]) -> row_state.RowState:
    """Row -> (params, seed, choice); prompts of four tokens."""
    rows = row_state.empty_rows(row_count=R, slot_count=2, vocab_size=V)
    admissions = [
        RowAdmission(row=row, params=params, seed=seed, choice=choice, prompt_length=4,
                     token_ids=np.arange(4, dtype=np.int32), pages=(), slot=0 if params.needs_shaping else -1)
        for row, (params, seed, choice) in holders.items()
    ]
    rows = row_state.admit(rows, row_state.pack_admission(admissions, R, 16))
    for admission in admissions:
        if admission.slot >= 0:
            rows = row_state.admit_slot(rows, row_state.pack_slot(admission, vocab_size=V))
    return rows


@functools.partial(jax.jit, static_argnames="mode")
def run(x, rows, row, position, mode="raw_logprobs"):
    return sampling.sample_rows(x, rows, row, position, mode=mode, alternatives=X)


def sampled(rows, x, row, position, mode="raw_logprobs", size=R) -> sampling.Sampled:
    """Of these rows among `size`; padding is a step's."""
    count, fill = len(x), size - len(x)
    at = (np.array([*values, *[of_padding] * fill], np.int32) for values, of_padding in ((row, R), (position, 0)))
    got = run(jnp.pad(jnp.asarray(x), ((0, fill), (0, 0))), rows, *at, mode=mode)
    return jax.tree.map(lambda array: np.asarray(array)[:count], got)


def logits(count: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, V)).astype(np.float32) * scale


def softmax(x: np.ndarray) -> np.ndarray:
    weight = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("raw_logprobs", jnp.float32), ("raw_logprobs", jnp.bfloat16), ("processed_logits", jnp.bfloat16)],
)
def test_greedy_is_the_first_maximum(mode, dtype):
    x = np.round(logits(4))       # many ties
    x[1] = 0
    x[2, [130, 290]] = 99
    rows = admitted({row: (SamplingParams(temperature=0), 0, 0) for row in range(4)})
    got = sampled(rows, jnp.asarray(x, dtype), range(4), [9] * 4, mode)
    np.testing.assert_array_equal(got.token_B, x.argmax(-1))
    assert got.is_finite_B.all()


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0.5, top_k=6), SamplingParams(temperature=1.5, top_p=0.6),
     SamplingParams(min_p=0.2), SamplingParams(logit_bias={7: 3.0}, top_k=4)],
    ids=["plain", "top-k", "top-p", "min-p", "bias"],
)
def test_draws_follow_the_distribution(params):
    """Chi-square of 24,000 draws at successive positions; seeds are fixed, so this cannot flicker."""
    x = logits(1, seed=3)[0]
    rows = admitted({row: (params, 1000 + row, 0) for row in range(R)})
    draws, turns = [], 1500
    call = functools.partial(run, jnp.broadcast_to(x, (R, V)), rows, jnp.arange(R, dtype=jnp.int32))
    tokens = jax.jit(lambda positions: jax.lax.map(lambda p: call(jnp.full(R, p)).token_B, positions))
    draws = np.asarray(tokens(jnp.arange(10, 10 + turns, dtype=jnp.int32))).ravel()
    biased = x.copy()
    for token, bias in params.logit_bias:
        biased[token] += bias
    p = softmax(biased / params.temperature)
    if params.top_k:
        p[p < np.sort(p)[-params.top_k]] = 0
    if params.min_p:
        p[p < params.min_p * p.max()] = 0
    if params.top_p < 1:
        order = np.argsort(-p)
        p[order[np.searchsorted(np.cumsum(p[order]), params.top_p) + 1 :]] = 0
    p /= p.sum()
    counts = np.bincount(draws, minlength=V)
    assert counts[p == 0].sum() == 0
    expected = p * draws.size
    is_frequent = expected >= 5
    observed = np.append(counts[is_frequent], counts[~is_frequent].sum())
    expected = np.append(expected[is_frequent], expected[~is_frequent].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    chi_square = ((observed - expected) ** 2 / expected).sum()
    # Wilson-Hilferty: the cube root is nearly normal; 4 standard deviations either way.
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert abs(z) < 4, (chi_square, freedom)


def test_a_token_depends_on_seed_choice_and_position_only():
    """Not on its row, its place in the batch, the padding or the neighbours' wishes."""
    x = logits(1, scale=0.5)[0]
    nucleus, plain = SamplingParams(top_p=0.95), SamplingParams()
    big = 2**63 - 5
    alone = admitted({3: (plain, big, 2)})
    among = admitted({
        11: (plain, big, 2), 0: (SamplingParams(temperature=0), 1, 0), 1: (nucleus, 2, 0), 2: (plain, big, 2),
        5: (SamplingParams(presence_penalty=1.0, top_k=9, min_p=0.1), 3, 0),
    })
    for position in range(20, 30):
        one = sampled(alone, x[None], [3], [position], size=2).token_B[0]
        many = sampled(among, np.stack([x] * 8), [0, 1, 5, R, 11, R, 2, R], [position] * 8).token_B
        assert many[4] == many[6] == one


def test_seeds_choices_and_positions_all_matter():
    x = logits(1, scale=0.1)[0]
    base, high = 5, 5 + 2**40       # equal low words
    rows = admitted({0: (SamplingParams(), base, 0), 1: (SamplingParams(), high, 0), 2: (SamplingParams(), base, 1)})
    tokens = np.stack([sampled(rows, np.stack([x] * 3), range(3), [p] * 3).token_B for p in range(10, 40)])
    for other in (1, 2):
        assert (tokens[:, 0] == tokens[:, other]).mean() < 0.2
    assert len(set(tokens[:, 0].tolist())) > 20
    again = np.stack([sampled(rows, np.stack([x] * 3), range(3), [p] * 3).token_B for p in range(10, 40)])
    np.testing.assert_array_equal(tokens, again)


def test_a_draw_never_takes_a_masked_token_at_the_ends_of_the_unit_interval():
    x = np.full((3, V), -np.inf, np.float32)
    x[0, [0, 299]] = 0
    x[1, [127, 128]] = [-80, 0]
    x[2, 150] = 5
    last = 1 - 2.0**-23
    for u, v in ((0.0, 0.0), (last, last), (0.0, last), (last, 0.0), (0.5, 0.5)):
        token = np.asarray(vocab.draw(jnp.asarray(x), jnp.full((3, 2), jnp.asarray([u, v], jnp.float32))))
        assert np.isfinite(x[np.arange(3), token]).all(), (u, v, token)


@pytest.mark.parametrize("mode", MODES)
def test_logprobs_of_every_mode(mode):
    params = SamplingParams(temperature=0.5, top_k=8, logit_bias={3: 1.5}, logprobs=2, seed=1)
    x = logits(2, seed=5)
    x[1] -= 3000
    rows = admitted({4: (params, 7, 0), 6: (SamplingParams(temperature=0, logprobs=0), 0, 0)})
    got = sampled(rows, x, [4, 6], [9, 9], mode)
    shaped = x.astype(np.float64).copy()
    if mode.startswith("processed"):
        shaped[0, 3] += 1.5
        shaped[0] /= 0.5
        shaped[0, shaped[0] < np.sort(shaped[0])[-8]] = -np.inf
    values = np.log(np.maximum(softmax(shaped), 1e-300)) if mode.endswith("logprobs") else shaped
    values[np.isneginf(shaped)] = -np.inf
    for row in range(2):
        token = got.token_B[row]
        np.testing.assert_allclose(got.logprobs.logprob_B[row], values[row, token], rtol=1e-5, atol=1e-5)
        assert got.logprobs.rank_B[row] == (shaped[row] >= shaped[row, token]).sum()
        order = np.argsort(-shaped[row], kind="stable")[:X]
        np.testing.assert_array_equal(got.logprobs.top_id_BX[row], order)
        np.testing.assert_allclose(got.logprobs.top_logprob_BX[row], values[row, order], rtol=1e-5, atol=1e-5)


def test_logprobs_are_zeros_where_nobody_wants_them():
    rows = admitted({0: (SamplingParams(), 7, 0)})
    assert all((array == 0).all() for array in sampled(rows, logits(1), [0], [9]).logprobs)


@pytest.mark.parametrize(("width", "count"), [(300, 3), (300, 2), (49152, 20), (40, 40), (129, 1)])
def test_top_equals_a_stable_sort(width, count):
    x = np.round(np.random.default_rng(1).normal(size=(3, width)) * 4).astype(np.float32)
    value, index = jax.jit(vocab.top, static_argnums=1)(jnp.asarray(x), count)
    order = np.argsort(-x, axis=-1, kind="stable")[:, :count]
    np.testing.assert_array_equal(index, order)
    np.testing.assert_array_equal(value, np.take_along_axis(x, order, -1))


def test_sick_logits_are_reported():
    x = logits(6)
    x[1, 5], x[2, 299], x[4, 7] = np.nan, np.inf, -np.inf
    x[3] = -np.inf
    rows = admitted({row: (SamplingParams(temperature=0), 0, 0) for row in range(6)})
    got = sampled(rows, x, range(6), [9] * 6)
    np.testing.assert_array_equal(got.is_finite_B, [True, False, False, False, True, True])


@pytest.mark.parametrize(("count", "width"), [(1, 49152), (6, 300), (8, 1024), (16, 300)])
def test_a_nan_is_reported_wherever_it_lies(count, width):
    """Vector instructions of some CPUs take the other number for the larger one."""
    rng = np.random.default_rng(count)
    call = jax.jit(sampling.is_finite)
    for _ in range(20):
        x = rng.normal(size=(count, width)).astype(np.float32)
        row = rng.integers(count)
        x[row, rng.integers(width)] = np.nan
        np.testing.assert_array_equal(call(x), np.arange(count) != row)


def test_grouping_rows_changes_nothing():
    """On CPUs rows are worked on eight at a time, on GPUs all at once."""
    params = SamplingParams(top_p=0.9, logprobs=3)
    rows = admitted({row: (params, row, 0) for row in range(R)})
    x, at = jnp.asarray(logits(R)), jnp.arange(R, dtype=jnp.int32)
    results = []
    for together in (2, None):
        call = jax.jit(
            functools.partial(sampling.sample_rows, mode="raw_logprobs", alternatives=X, together=together)
        )
        results.append(call(x, rows, at, at + 9))
    np.testing.assert_array_equal(results[0].token_B, results[1].token_B)
    np.testing.assert_allclose(results[0].logprobs.logprob_B, results[1].logprobs.logprob_B, rtol=1e-6)
