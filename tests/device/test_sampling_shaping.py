"""Each stage between logits and the draw against a numpy oracle written here, and their order."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.plan import RowAdmission
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.runner import row_state, shaping, threshold

V, R, Y = 300, 6, 3      # V is no multiple of a block
PROMPT = [3, 5, 5, 9]


def admitted(*params: SamplingParams, output=(), stop=()) -> row_state.RowState:
    """Rows 0, 1, ... hold these parameters, the same prompt and output so far."""
    rows = row_state.empty_rows(row_count=R, slot_count=Y, vocab_size=V)
    tokens = np.array([*PROMPT, *output], np.int32)
    admissions, slots = [], iter(range(Y))
    for row, p in enumerate(params):
        slot = next(slots) if p.needs_shaping else -1
        admissions.append(
            RowAdmission(row=row, params=p, seed=row, choice=0, prompt_length=len(PROMPT), token_ids=tokens, pages=(),
                         slot=slot, stop_token_ids=stop)
        )
    rows = row_state.admit(rows, row_state.pack_admission(admissions, R, 8))
    for admission in admissions:
        if admission.slot >= 0:
            rows = row_state.admit_slot(rows, row_state.pack_slot(admission, vocab_size=V))
    return rows


def logits(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, V)).astype(np.float32) * 3


def shaped(rows, x, row, position) -> np.ndarray:
    call = jax.jit(shaping.shape_logits)
    return np.asarray(call(jnp.asarray(x), rows, jnp.asarray(row, jnp.int32), jnp.asarray(position, jnp.int32)))


@functools.cache
def restricting(*searches):
    """One program for all who restrict R rows by these searches."""
    return jax.jit(lambda x, rows, row: shaping.restrict(x, shaping.gather_settings(rows, row)))


def restricted(rows, x, row) -> np.ndarray:
    """Rows of `x`, filled up with copies of the last one to R."""
    count, fill = len(x), (0, R - len(x))
    call = restricting(shaping.kth_largest, shaping.least_of_mass)
    x = jnp.pad(jnp.asarray(x, jnp.float32), (fill, (0, 0)), "edge")
    return np.asarray(call(x, rows, jnp.pad(jnp.asarray(row, jnp.int32), fill, "edge")))[:count]


def test_penalties_bias_and_masks_in_order():
    params = SamplingParams(
        repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=-0.25,
        logit_bias={3: 2.0, 7: -1.5, 40: 4.0}, allowed_token_ids=tuple(range(0, V, 1))[:200],
        bad_words_token_ids=((11,), (20, 21), (8, 30, 31)),
    )
    output = [20, 8, 30, 8, 30]
    rows, x = admitted(params, SamplingParams(), output=output), logits(2)
    want = x[0].copy()
    want[200:] = -np.inf
    want[[11, 31]] = -np.inf          # 20, 21: the newest output is not 20; 8, 30, 31: it is 8, 30
    for token, bias in ((3, 2.0), (7, -1.5), (40, 4.0)):
        want[token] += bias
    counts = np.bincount(output, minlength=V)
    for token in set(PROMPT) | set(output):
        want[token] = want[token] / 1.3 if want[token] > 0 else want[token] * 1.3
    want -= 0.5 * counts
    want -= -0.25 * (counts > 0)
    got = shaped(rows, x, [0, 1], [9, 9])
    np.testing.assert_allclose(got[0], want, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got[1], x[1])      # its neighbour has no slot


def test_stop_ids_are_masked_until_min_tokens_are_out():
    rows, x = admitted(SamplingParams(min_tokens=3), SamplingParams(), stop=(4, 17)), logits(2)
    for output_count, is_masked in ((0, True), (2, True), (3, False), (9, False)):
        got = shaped(rows, x, [0, 1], [len(PROMPT) + output_count] * 2)
        assert np.isneginf(got[0, [4, 17]]).all() == is_masked
        assert np.isneginf(got[0]).sum() == 2 * is_masked
        np.testing.assert_array_equal(got[1], x[1])


def test_a_step_without_wishes_changes_no_bit():
    rows, x = admitted(SamplingParams(), SamplingParams(temperature=0)), logits(2)
    np.testing.assert_array_equal(shaped(rows, x, [0, 1], [5, 5]), x)
    np.testing.assert_array_equal(restricted(rows, x, [1, 1]), x)


def test_admission_leaves_no_trace_of_the_former_holder():
    """The slot and row of a heavily shaped sequence go to a plain one."""
    heavy = SamplingParams(
        presence_penalty=1.0, logit_bias={1: 9.0}, bad_words_token_ids=((5, 6),), min_tokens=5, top_k=3, min_p=0.5
    )
    rows = admitted(heavy, output=[5, 1, 2], stop=(9,))
    light = SamplingParams(frequency_penalty=1e-9)
    admission = RowAdmission(
        row=0, params=light, seed=0, choice=0, prompt_length=1, token_ids=np.array([7], np.int32), pages=(), slot=0
    )
    rows = row_state.admit(rows, row_state.pack_admission([admission], R, 8))
    rows = row_state.admit_slot(rows, row_state.pack_slot(admission, vocab_size=V))
    x = logits(1)
    np.testing.assert_array_equal(shaped(rows, x, [0], [1]), x)
    np.testing.assert_array_equal(restricted(rows, x, [0]), x)
    assert int(rows.last_token_R[0]) == 7


def test_advance_counts_remembers_and_drops_padding():
    params = SamplingParams(frequency_penalty=1.0, bad_words_token_ids=((40, 41, 42),))
    rows, x = admitted(params, SamplingParams()), logits(2)
    start = jax.tree.map(np.asarray, rows)
    advance = jax.jit(row_state.advance)
    for token in (40, 41):
        rows = advance(rows, jnp.array([0, R, R], jnp.int32), jnp.array([token, 99, 98], jnp.int32))
    got = shaped(rows, x, [0, 1], [6, 6])
    want = x[0].copy()
    want[[40, 41]] -= 1
    want[42] = -np.inf
    np.testing.assert_allclose(got[0], want, rtol=1e-6)
    assert int(rows.last_token_R[0]) == 41
    for name in ("last_token_R", "history_RJ"):
        np.testing.assert_array_equal(np.asarray(getattr(rows, name))[1:], getattr(start, name)[1:])
    assert int(rows.count_YV.sum()) == 2 and int(rows.count_YV[:, 98:100].sum()) == 0


def test_bad_words_look_at_the_output_only():
    """As vLLM: the prompt's last token 9 does not arm the word (9, 10)."""
    params = SamplingParams(bad_words_token_ids=((9, 10),))
    x = logits(1)
    assert not np.isneginf(shaped(admitted(params), x, [0], [4])).any()
    assert np.isneginf(shaped(admitted(params, output=[9]), x, [0], [5])[0, 10])


# The restrictions, against an oracle that sorts.

def sorted_oracle(x: np.ndarray, p: SamplingParams) -> np.ndarray:
    x = x.astype(np.float64) / p.temperature
    kept = np.ones(V, bool)
    if p.min_p:
        kept &= x >= x.max() + np.log(p.min_p)
    if p.top_k and p.top_k < V:
        kept &= x >= np.sort(np.where(kept, x, -np.inf))[-p.top_k]
    if p.top_p < 1:
        mass = np.where(kept, np.exp(x - x.max()), 0)
        mass /= mass.sum()
        order = np.argsort(-mass, kind="stable")
        needed = int(np.searchsorted(np.cumsum(mass[order]), p.top_p)) + 1
        kept &= mass >= mass[order[min(needed, V) - 1]]      # ties with the last one stay
    return kept


RESTRICTIONS = [
    {"top_k": 1}, {"top_k": 7}, {"top_k": V - 1}, {"top_k": V}, {"top_k": 10**6}, {"top_p": 0.9}, {"top_p": 0.01},
    {"top_p": 0.999}, {"min_p": 0.1}, {"min_p": 1.0}, {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    {"min_p": 0.02, "top_k": 50, "top_p": 0.95, "temperature": 1.7}, {"temperature": 0.3}, {"top_k": 5, "min_p": 0.2},
]


@pytest.fixture(params=["halves", "digits"])
def _form(request, monkeypatch):
    """The searches of CPUs, then those of GPUs."""
    for name, search in (("kth_largest", "kth"), ("least_of_mass", "mass")):
        monkeypatch.setattr(shaping, name, getattr(threshold, f"{search}_by_{request.param}"))


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "flat", "peaked", "negative", "around zero"])
def test_restrictions_equal_the_sorting_oracle(kind):
    for start in range(0, len(RESTRICTIONS), R):
        wishes = [SamplingParams(**options) for options in RESTRICTIONS[start : start + R]]
        rows, x = admitted(*wishes), logits(len(wishes), seed=start)
        x = {
            "float32": lambda x: x,
            "bfloat16": lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)),   # many ties
            "flat": lambda x: x * 1e-3,
            "peaked": lambda x: x * 12,
            "negative": lambda x: x - 500,
            "around zero": lambda x: np.where(np.abs(x) < 2, x * 1e-8, x),
        }[kind](x)
        got = restricted(rows, x, range(len(wishes)))
        for row, p in enumerate(wishes):
            if kind == "around zero" and p.top_p < 1:
                continue        # equally likely in float32, so all tied: the oracle's float64 tells them apart
            kept = sorted_oracle(x[row], p)
            np.testing.assert_array_equal(~np.isneginf(got[row]), kept, err_msg=f"{kind} {RESTRICTIONS[start + row]}")
            np.testing.assert_allclose(got[row][kept], x[row][kept] / p.temperature, rtol=1e-6)


@pytest.mark.usefixtures("_form")
def test_top_k_keeps_k_at_any_temperature():
    """Rounding of quotients may not drop the last of them."""
    count = 1024
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, V)).astype(np.float32) * 3
    k, temperature = rng.integers(1, 40, count), rng.uniform(0.3, 3, count).astype(np.float32)

    @jax.jit
    def call(x, rows, k, temperature):
        settings = shaping.gather_settings(rows, jnp.zeros(count, jnp.int32))
        return shaping.restrict(x, settings.replace(top_k_R=k, temperature_R=temperature))

    got = call(x, admitted(SamplingParams()), jnp.asarray(k, jnp.int32), temperature)
    np.testing.assert_array_equal(np.isfinite(got), x >= np.take_along_axis(np.sort(x), V - k[:, None], 1))


def test_all_tokens_alike_are_all_kept():
    rows = admitted(SamplingParams(top_k=5), SamplingParams(top_p=0.5))
    assert np.isfinite(restricted(rows, np.zeros((2, V), np.float32), [0, 1])).all()


def test_masked_tokens_stay_masked_and_do_not_count():
    x = np.full((2, V), -np.inf, np.float32)
    x[:, [5, 6, 7]] = [1.0, 2.0, 3.0]
    rows = admitted(SamplingParams(top_k=10), SamplingParams(top_p=0.99999))
    np.testing.assert_array_equal(restricted(rows, x, [0, 1]), x)
    rows = admitted(SamplingParams(top_k=2), SamplingParams(top_p=0.7))
    assert [np.flatnonzero(~np.isneginf(row)).tolist() for row in restricted(rows, x, [0, 1])] == [[6, 7], [6, 7]]


def test_rows_with_nan_end_and_leave_their_neighbours_alone():
    x = logits(2)
    x[0, 17] = np.nan
    rows = admitted(SamplingParams(top_k=4, top_p=0.9), SamplingParams(top_k=4))
    got = restricted(rows, x, [0, 1])
    np.testing.assert_array_equal(~np.isneginf(got[1]), sorted_oracle(x[1], SamplingParams(top_k=4)))


def test_packing_names_what_does_not_fit():
    admission = RowAdmission(
        row=0, params=SamplingParams(), seed=0, choice=0, prompt_length=1, token_ids=np.array([7], np.int32), pages=(),
        stop_token_ids=tuple(range(65)),
    )
    with pytest.raises(ValueError, match="at most 64 stop ids, got 65"):
        row_state.pack_admission([admission], R, 8)
    with pytest.raises(ValueError, match="9 admissions do not fit a capacity of 8"):
        row_state.pack_admission([admission] * 9, R, 8)
