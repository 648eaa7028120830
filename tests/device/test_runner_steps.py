"""What a runner computes: mixed steps, chunks, feed-back, resumption, poison, logprobs and shaping.

The oracle is the same decoder over whole sequences without a cache.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.sampling_params import SamplingParams
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.inputs import FED_BACK, StepLayout, pack
from jaxserve.runner.runner import Runner
from tests.device.plans import Driver, Entry, complete
from tests.device.tiny import continuation, dense_logits, prompt_of, tiny_config, tiny_params, tiny_runner, tiny_spec

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module", params=["one group", "two groups"])
def model(request):
    spec = tiny_spec(window=7 if request.param == "two groups" else None)
    return spec, tiny_params(spec)


@pytest.fixture(scope="module")
def runner(model, compile_cache):
    spec, params = model
    runner = tiny_runner(
        spec, params, tiny_config(store=compile_cache), Buckets(tokens=(2, 32), rows=(2, 8))
    )
    yield runner
    runner.close()


@pytest.fixture(autouse=True)
def fresh(runner):
    runner.rebuild()


def test_a_sequence_equals_the_dense_oracle(runner, model):
    prompt = prompt_of(21, 1)
    assert complete(runner, prompt, 12) == continuation(*model, prompt, 12)


def test_a_mixed_step_gives_each_sequence_what_it_gets_alone(runner, model):
    """Row 5 decodes while row 2 is prefilled in chunks and row 0 starts; then all decode."""
    prompts = {5: prompt_of(9, 1), 2: prompt_of(23, 2), 0: prompt_of(3, 3)}
    driver = Driver(runner)
    for row, prompt in prompts.items():
        driver.admit(row, prompt, GREEDY)
    got: dict[int, list[int]] = {5: [], 2: [], 0: []}

    def step(*entries: Entry) -> None:
        for entry, token in zip(entries, driver.run(*entries).token_A.tolist(), strict=True):
            assert (token >= 0) == entry.samples
            if entry.samples:
                got[entry.row].append(token)

    step(Entry(5, prompts[5]), Entry(2, prompts[2][:7], samples=False))
    step(Entry(5), Entry(2, prompts[2][7:16], samples=False))
    step(Entry(5), Entry(2, prompts[2][16:]), Entry(0, prompts[0]))
    step(Entry(2), Entry(0), Entry(5))
    step(Entry(0), Entry(5), Entry(2))
    for row, prompt in prompts.items():
        assert got[row] == continuation(*model, prompt, len(got[row])), row
        assert len(got[row]) >= 3


def test_steps_in_flight_feed_their_samples_back(runner, model):
    """Three steps are launched before the first result is read; the results come in any order."""
    prompt = prompt_of(6, 4)
    driver = Driver(runner)
    driver.admit(1, prompt, GREEDY)
    pending = [driver.launch(Entry(1, prompt)), driver.launch(Entry(1)), driver.launch(Entry(1))]
    tokens = [step.result().token_A[0] for step in reversed(pending)][::-1]
    assert tokens == continuation(*model, prompt, 3)
    assert pending[0].result().token_A[0] == tokens[0], "a result may be read again"


def test_a_resumed_sequence_goes_on_as_if_never_preempted(runner, model):
    prompt = prompt_of(10, 5)
    expected = continuation(*model, prompt, 8)
    driver = Driver(runner)
    driver.admit(3, prompt, GREEDY, known=expected[:4])
    tokens = [int(driver.run(Entry(3, [*prompt, *expected[:4]])).token_A[0])]
    tokens += [int(driver.run(Entry(3)).token_A[0]) for _ in range(3)]
    assert tokens == expected[4:]


def test_a_row_keeps_nothing_of_who_held_it_before(runner, model):
    driver = Driver(runner)
    noisy = SamplingParams(temperature=1.7, logit_bias={7: 100.0}, logprobs=2)
    driver.admit(4, prompt_of(30, 6), noisy, slot=0, seed=3)
    assert driver.run(Entry(4, prompt_of(30, 6))).token_A[0] == 7
    prompt = prompt_of(5, 7)
    driver.admit(4, prompt, GREEDY)
    result = driver.run(Entry(4, prompt))
    assert result.token_A.tolist() == continuation(*model, prompt, 1)
    assert result.logprobs is None


def test_unfinished_prefill_leaves_the_row_alone(runner, model):
    """A sample of another row in the same step must not advance a row whose chunk is not the last."""
    long, short = prompt_of(12, 8), prompt_of(4, 9)
    driver = Driver(runner)
    driver.admit(0, long, GREEDY)
    driver.admit(1, short, GREEDY)
    first = driver.run(Entry(0, long[:6], samples=False), Entry(1, short))
    assert first.token_A[0] == -1 and first.is_finite_A.all()
    second = driver.run(Entry(1), Entry(0, long[6:]))
    assert second.token_A[1] == continuation(*model, long, 1)[0]


def test_poisoned_pages_and_padding_change_nothing(runner, model):
    """Every page nobody holds is NaN, and the padding of every packed step is garbage under row R."""
    prompt = prompt_of(13, 10)
    poison = _PaddingPoison(runner)
    state = runner._state
    state.kv = jax.tree.map(lambda pages: jnp.full_like(pages, jnp.nan), state.kv)
    driver = Driver(poison)
    driver.admit(6, prompt, GREEDY)
    tokens = [int(driver.run(Entry(6, prompt)).token_A[0])]
    for _ in range(6):
        result = driver.run(Entry(6))
        assert result.is_finite_A.all()
        tokens.append(int(result.token_A[0]))
    assert tokens == continuation(*model, prompt, 7)
    assert poison.poisoned_count == 7


class _PaddingPoison:
    """A runner whose packed vectors carry garbage wherever padding is."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.shape = runner.shape
        self.poisoned_count = 0

    def launch(self, plan):
        forward = self._runner._forward

        def poisoned(tokens, packed, plan):
            layout = self._runner._programs.layout(tokens)
            view = layout.views(packed)
            view["token_T"][plan.token_count :] = 41
            view["position_T"][plan.token_count :] = 3
            view["sample_token_B"][plan.sample_count :] = layout.tokens - 1
            view["sample_position_B"][plan.sample_count :] = 63
            for group, updates in enumerate(plan.page_updates):
                for name in ("index_U", "page_U"):
                    view[f"{name}.{group}"][len(updates.row_U) :] = 1
            self.poisoned_count += 1
            return forward(tokens, packed, plan)

        self._runner._forward = poisoned
        try:
            return self._runner.launch(plan)
        finally:
            del self._runner._forward


def test_logprobs_are_of_the_raw_distribution(runner, model):
    prompt = prompt_of(8, 11)
    driver = Driver(runner)
    driver.admit(2, prompt, SamplingParams(temperature=0, logprobs=3))
    driver.admit(3, prompt[:5], GREEDY)
    result = driver.run(Entry(2, prompt), Entry(3, prompt[:5]))
    expected_V = _log_softmax(dense_logits(*model, prompt)[-1])
    found = result.logprobs
    assert found is not None and found.top_id_AX.shape == (2, 5)
    np.testing.assert_array_equal(found.top_id_AX[0], np.argsort(-expected_V)[:5])
    np.testing.assert_allclose(found.top_logprob_AX[0], np.sort(expected_V)[::-1][:5], atol=1e-4)
    np.testing.assert_allclose(found.logprob_A[0], expected_V[result.token_A[0]], atol=1e-4)
    assert found.rank_A[0] == 1


def test_scores_are_the_logprobs_of_the_prompt(runner, model):
    """Over two chunks, beside a decode that wants no scores."""
    prompt, other = prompt_of(17, 12), prompt_of(5, 13)
    driver = Driver(runner)
    driver.admit(0, other, GREEDY)
    driver.admit(1, prompt, SamplingParams(temperature=0, prompt_logprobs=2))
    driver.run(Entry(0, other))
    first = driver.run(Entry(0), Entry(1, prompt[:9], samples=False, targets=prompt[1:10])).scores
    second = driver.run(Entry(0), Entry(1, prompt[9:], targets=[*prompt[10:], -1])).scores
    expected_TV = _log_softmax(dense_logits(*model, prompt))
    assert first is not None and second is not None
    assert first.logprob_A[0] == 0 and second.logprob_A[-1] == 0, "what is not scored is zero"
    logprobs = [*first.logprob_A[1:], *second.logprob_A[1:-1]]
    np.testing.assert_allclose(logprobs, expected_TV[np.arange(16), prompt[1:]], atol=1e-4)
    ranks = 1 + (expected_TV[:16] > expected_TV[np.arange(16), prompt[1:]][:, None]).sum(1)
    assert [*first.rank_A[1:], *second.rank_A[1:-1]] == ranks.tolist()
    np.testing.assert_array_equal(second.top_id_AX[1], np.argsort(-expected_TV[9])[:5])


def test_shaping_slots_follow_their_rows(runner, model):
    prompt = prompt_of(7, 14)
    best = continuation(*model, prompt, 1)[0]
    allowed = tuple(token for token in (3, 50, 90) if token != best)
    driver = Driver(runner)
    driver.admit(0, prompt, SamplingParams(temperature=0, allowed_token_ids=allowed), slot=1)
    driver.admit(1, prompt, SamplingParams(temperature=0, logit_bias={best: -100.0}), slot=0)
    driver.admit(2, prompt, GREEDY)
    driver.admit(3, prompt, SamplingParams(temperature=0, min_tokens=2), stop_token_ids=(best,))
    entries = [Entry(row, prompt) for row in range(4)]
    tokens = driver.run(*entries).token_A
    logits_V = dense_logits(*model, prompt)[-1]
    assert tokens[0] == max(allowed, key=lambda token: logits_V[token])
    assert tokens[2] == best
    second_best = int(np.argsort(-logits_V)[1])
    assert tokens[1] == second_best and tokens[3] == second_best


def test_draws_depend_on_the_seed_only(runner):
    """Not on the row, the batch or the step's shape."""
    prompt = prompt_of(6, 15)
    params = SamplingParams(temperature=1.5, top_p=0.95)
    alone = complete(runner, prompt, 5, params, seed=11, row=0)
    runner.rebuild()
    driver = Driver(runner)
    driver.admit(7, prompt, params, seed=11)
    for row in range(4):
        driver.admit(row, prompt_of(4, row), params, seed=row)
    tokens = [driver.run(*(Entry(row, prompt_of(4, row)) for row in range(4)), Entry(7, prompt)).token_A[4]]
    for _ in range(4):
        tokens.append(driver.run(*(Entry(row) for row in (0, 7, 1, 2, 3))).token_A[1])
    assert tokens == alone
    runner.rebuild()
    assert complete(runner, prompt, 5, params, seed=12) != alone


def test_a_row_that_turns_non_finite_is_named_and_its_pages_can_be_cleared(runner, model):
    sick, well = prompt_of(9, 16), prompt_of(9, 17)
    driver = Driver(runner)
    driver.admit(0, sick, GREEDY)
    driver.admit(1, well, GREEDY)
    driver.run(Entry(0, sick), Entry(1, well))
    pages = [np.array(pages, np.int32) for pages in driver.rows[0].pages]
    state, spec = runner._state, model[0]
    kv = list(state.kv)
    for group, layers in enumerate(spec.kv_groups):
        for layer in layers.layers:
            kv[layer] = kv[layer]._replace(k_PKSH=kv[layer].k_PKSH.at[pages[group]].set(jnp.nan))
    state.kv = tuple(kv)
    result = driver.run(Entry(0), Entry(1))
    assert result.is_finite_A.tolist() == [False, True]
    assert result.token_A[1] == continuation(*model, well, 2)[1]
    for group, of_group in enumerate(pages):
        runner.clear_pages(group, np.tile(of_group, 7))     # more than one batch
    for layer in runner._state.kv:
        assert np.isfinite(np.asarray(layer.k_PKSH)).all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("row_A", 8, "row"), ("start_A", 60, "position"), ("token_T", 97, "token")],
)
def test_a_plan_out_of_bounds_is_refused(runner, field, value, message):
    driver = Driver(runner)
    prompt = prompt_of(6, 18)
    driver.admit(0, prompt, GREEDY)
    plan = driver.plan(Entry(0, prompt))
    wrong = np.full_like(getattr(plan, field), value)
    with pytest.raises(ValueError, match=f"{message} .* is out of"):
        runner.launch(replace(plan, **{field: wrong}))


def test_a_step_above_the_limits_is_refused(runner):
    driver = Driver(runner)
    driver.admit(0, prompt_of(33, 19), GREEDY)
    with pytest.raises(ValueError, match="33 tokens"):
        driver.run(Entry(0, prompt_of(33, 19)))


def test_packing_places_every_count(runner):
    driver = Driver(runner)
    driver.admit(4, [1, 2, 3, 4, 5], GREEDY)
    driver.admit(2, [9], GREEDY)
    driver.plan(Entry(2, [9]))
    plan = driver.plan(Entry(2), Entry(4, [1, 2, 3, 4, 5]))
    layout = StepLayout(tokens=8, rows=4, row_count=8, group_count=len(runner.shape.groups))
    view = layout.views(pack(plan, layout))
    assert view["token_T"].tolist() == [FED_BACK, 1, 2, 3, 4, 5, 0, 0]
    assert view["row_T"].tolist() == [2, 4, 4, 4, 4, 4, 8, 8]
    assert view["position_T"].tolist() == [1, 0, 1, 2, 3, 4, 0, 0]
    assert view["sample_token_B"][:2].tolist() == [0, 5]
    assert view["sample_row_B"].tolist() == [2, 4, 8, 8]
    assert view["sample_position_B"][:2].tolist() == [2, 5]
    assert (view["row_U.0"] == 8).all()


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
