"""Dense random schedules, seeded: many sequences at once in pools that hardly hold them.

The state machine beside this file explores odd orders of few events and shrinks what it finds; this one keeps rows,
pages and budgets fully contended, where preemption, prefix waiting and page reuse meet.
"""

from __future__ import annotations

import random

import pytest

from jaxserve.core.plan import RowAdmission, StepLimits
from jaxserve.core.request import EngineRequest
from tests.engine_harness import Harness, make_harness, make_request
from tests.fakes import alone

LENGTH_MAX = 48
WINDOWS = [(None,), (None,), (None, 7), (5,), (3, None, 9), (1, None)]


def play(seed: int) -> Harness:
    """One schedule, checked; everything follows from `seed`."""
    rng = random.Random(seed)
    windows = rng.choice(WINDOWS)
    page_size = rng.choice([1, 2, 4, 8])
    fit = -(-LENGTH_MAX // page_size)
    chunked = rng.random() < 0.75
    tokens_max = rng.choice([5, 16, 64]) if chunked else LENGTH_MAX
    harness = make_harness(
        tokens_max=tokens_max,
        samples_max=rng.choice([1, 4, 8]),
        prefix=rng.random() < 0.7,
        overlap=rng.random() < 0.7,
        chunked=chunked,
        policy=rng.choice(["fcfs", "priority"]),
        pages=[int(fit * rng.choice([1, 1.3, 2])) for _ in windows],
        windows=windows,
        page_size=page_size,
        rows=rng.choice([2, 4, 8]),
        slots=rng.choice([1, 3]),
        length_max=LENGTH_MAX,
    )
    base = [rng.randrange(101) for _ in range(LENGTH_MAX)]
    corrupt_from: dict[int, int] = {}

    def corrupts(row: RowAdmission, position: int) -> bool:
        return position >= corrupt_from.get(row.seed, LENGTH_MAX)

    harness.runner.corrupts = corrupts
    todo = requests_of(rng, base, corrupt_from)
    aborted = set()
    if rng.random() < 0.5:
        harness.runner.limits_now, final = StepLimits(tokens_max=2, samples_max=1), harness.runner.limits_now
    else:
        final = harness.runner.limits_now
    while todo:
        if rng.random() < 0.6:
            harness.add(todo.pop())
        if rng.random() < 0.03 and harness.requests:
            name = rng.choice(sorted(harness.requests))
            harness.loop.abort([name])
            aborted.add(name)
        if rng.random() < 0.1:
            harness.runner.limits_now = final
        harness.step()
    harness.runner.limits_now = final
    harness.run()
    check(harness, seed, corrupt_from, aborted)
    return harness


def requests_of(rng: random.Random, base: list[int], corrupt_from: dict[int, int]) -> list[EngineRequest]:
    """Fourteen requests that share beginnings of `base`; those that go non-finite enter `corrupt_from`."""
    todo = []
    for number in range(14):
        length = rng.choice([1, 4, 12, rng.randrange(1, 40)])
        shared = rng.choice([0, length, rng.randrange(length + 1)])
        if rng.random() < 0.1:
            corrupt_from[number] = length - 1 + rng.randrange(6)
        todo.append(make_request(
            str(number), base[:shared] + [rng.randrange(101) for _ in range(length - shared)], seed=number,
            priority=rng.randrange(3), max_tokens=rng.choice([None, None, 1, 4, 20]),
            min_tokens=rng.choice([0, 0, 1]), eos_token_ids=rng.choice([(), (), (3, 4, 5)]),
            presence_penalty=rng.choice([0, 0, 0, 1.0]), prompt_logprobs=rng.choice([None, None, None, 1]),
        ))
    return todo


def check(harness: Harness, seed: int, corrupt_from: dict[int, int], aborted: set[str]) -> None:
    """Every sequence got what it gets alone, as far as it went."""
    for name, request in harness.requests.items():
        expected = alone(request, harness.runner.shape)
        tokens = harness.tokens(name)
        assert tokens == expected.token_ids[: len(tokens)], (seed, name)
        if request.seed in corrupt_from and harness.end(name) == "error":
            assert len(tokens) == corrupt_from[request.seed] - len(request.prompt_token_ids) + 1, (seed, name)
        elif name not in aborted:
            harness.assert_alone(name)
            if request.params.prompt_logprobs:
                scores = harness.outputs[name][0].prompt_logprobs or ()
                assert tuple(s.logprob for s in scores if s is not None) == expected.prompt_scores, (seed, name)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("block", range(4))
def test_contended_schedules(block: int) -> None:
    played = [play(seed) for seed in range(block * 30, block * 30 + 30)]
    assert sum(harness.loop.stats.preemption_count for harness in played) > 20, "the schedules are not contended"
    assert sum(harness.loop.stats.prefix_hit_tokens for harness in played) > 100


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("block", range(10))
def test_many_contended_schedules(block: int) -> None:
    for seed in range(10_000 + block * 500, 10_000 + block * 500 + 500):
        play(seed)
