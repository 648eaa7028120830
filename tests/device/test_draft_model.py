"""A draft model on the real runner: tokens are those without it, whatever it drafts and whatever befalls a sequence."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.clock import MonotonicClock
from jaxserve.core.config import CacheConfig, SchedulerConfig, SpeculativeConfig
from jaxserve.core.errors import StepAllocationError
from jaxserve.core.plan import DraftPlan, PageUpdates
from jaxserve.core.progress import NoProgress
from jaxserve.core.request import EngineRequest
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.loop import EngineLoop
from jaxserve.engine.speculation import ModelSpeculation
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.draft_model import unrolled
from jaxserve.runner.runner import Runner
from jaxserve.runner.setup import DraftSetup
from jaxserve.runner.start import plan_memory
from tests.device.tiny import PAGE_SIZE, continuation, prompt_of, tiny_config, tiny_mesh, tiny_params, tiny_spec

CONFIG = SpeculativeConfig(method="draft_model", model="draft", num_speculative_tokens=3)
SPEC = tiny_spec()
PROMPTS = [prompt_of(4, 1) * 4, prompt_of(9, 2), [5, 6] * 6, prompt_of(3, 3), prompt_of(21, 4), prompt_of(1, 5)]


def make_runner(store, draft_seed: int, draft_layers: int = 2) -> Runner:
    params = tiny_params(SPEC, seed=5)
    spec = replace(SPEC, layers=SPEC.layers[:draft_layers])
    draft_params = tiny_params(SPEC, seed=draft_seed)
    if draft_layers == 1:
        del draft_params["layers_1"]
    setup = plan_memory(
        spec=SPEC, params=params, mesh=tiny_mesh(), dtype=jnp.dtype(jnp.float32),
        config=tiny_config(store=store, pages=128), draft=DraftSetup(spec=spec, tokens_max=3),
        draft_params=draft_params,
    )
    buckets = Buckets(tokens=(8, 32), rows=(32,))
    runner = Runner.create(
        setup=replace(setup, buckets=buckets, samples_max=32), params=params, draft_params=draft_params
    )
    runner.compile_serving_set(NoProgress())
    runner.compile_rest(NoProgress())
    assert runner.wait_ready(240)
    return runner


@pytest.fixture(scope="module")
def store(compile_cache):
    return compile_cache


@pytest.fixture(scope="module")
def same(store):
    """The draft model is the served one."""
    runner = make_runner(store, draft_seed=5)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def other(store):
    """The draft model has one layer, and knows nothing."""
    runner = make_runner(store, draft_seed=6, draft_layers=1)
    yield runner
    runner.close()


def make_loop(runner, *, drafts: bool = True) -> EngineLoop:
    runner.rebuild()
    return EngineLoop(
        runner, config=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
        cache=CacheConfig(block_size=PAGE_SIZE), clock=MonotonicClock(),
        speculation=ModelSpeculation(CONFIG, runner) if drafts else None,
    )


def add(loop: EngineLoop, name: str, prompt: list[int], seed: int = 0, **wanted: object) -> None:
    params: dict[str, object] = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True} | wanted
    loop.add(EngineRequest(
        request_id=name, prompt_token_ids=tuple(prompt), seed=seed,
        params=SamplingParams(**params),  # type: ignore[arg-type]
    ))


def finish(loop: EngineLoop, tokens: dict[str, list[int]] | None = None) -> dict[str, list[int]]:
    tokens = {} if tokens is None else tokens
    while loop.has_work:
        for output in loop.step():
            assert output.error is None, output.error
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        loop.check()
    return tokens


def run(runner, *, drafts: bool = True, **wanted: object):
    loop = make_loop(runner, drafts=drafts)
    for index, prompt in enumerate(PROMPTS):
        add(loop, str(index), prompt, seed=index, **wanted, **({"presence_penalty": 0.7} if index == 3 else {}))
    return finish(loop), loop.stats


@pytest.mark.parametrize("wanted", [{}, {"temperature": 0.7}, {"temperature": 0.9, "top_k": 8}],
                         ids=["greedy", "seeded", "restricted"])
@pytest.mark.parametrize("which", ["same", "other"])
def test_tokens_are_those_without_a_draft_model(request, which, wanted):
    runner = request.getfixturevalue(which)
    plain, _ = run(runner, drafts=False, **wanted)
    drafted, stats = run(runner, **wanted)
    assert drafted == plain
    assert stats.draft_count > 0
    accepted = sum(stats.draft_accepted_at) / stats.draft_tokens
    if which == "other":
        assert accepted < 0.3
    elif not wanted:
        assert accepted > 0.95
    assert runner.stats.compiled_after_ready_count == 0


def test_every_drafted_token_is_the_draft_models_own(same):
    """Alone and greedy the served model as its own draft is never wrong: its pages miss no position, ever."""
    for length in range(1, 12):
        prompt = prompt_of(length, 40 + length)
        loop = make_loop(same)
        add(loop, "a", prompt, max_tokens=20)
        assert finish(loop)["a"] == continuation(SPEC, tiny_params(SPEC, seed=5), prompt, 20)
        assert sum(loop.stats.draft_accepted_at) == loop.stats.draft_tokens > 0


def test_a_prefix_hit_serves_the_draft_too(same):
    loop = make_loop(same)
    prompt = prompt_of(17, 8)
    add(loop, "a", prompt)
    first = finish(loop)["a"]
    before = loop.stats
    add(loop, "b", [*prompt, *first[:7]], max_tokens=17)
    assert finish(loop)["b"] == first[7:]
    stats = loop.stats
    assert stats.prefix_hit_tokens > before.prefix_hit_tokens
    drafted = stats.draft_tokens - before.draft_tokens
    assert sum(stats.draft_accepted_at) - sum(before.draft_accepted_at) == drafted > 0


def test_preempted_and_aborted_sequences_leave_the_others_right(same):
    plain, _ = run(same, drafts=False)
    loop = make_loop(same)
    for index, prompt in enumerate(PROMPTS[:3]):
        add(loop, str(index), prompt, seed=index)
    add(loop, "gone", prompt_of(5, 9))
    tokens: dict[str, list[int]] = {}
    for turn in range(9):
        if turn == 5:
            loop.abort(["gone"])
        if turn == 7:     # everybody loses the row with a draft in flight or about to be
            for sequence in list(loop._roster.running):
                if not sequence.in_flight:
                    loop._roster.unseat(sequence)
        for output in loop.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        loop.check()
    finish(loop, tokens)
    for name in ("0", "1", "2"):
        assert tokens[name] == plain[name], name


def test_a_lost_device_state_is_drafted_anew(same):
    plain, _ = run(same, drafts=False)
    loop = make_loop(same)
    for index, prompt in enumerate(PROMPTS[:3]):
        add(loop, str(index), prompt, seed=index)
    failing, calls = same.draft, []

    def draft(plan):
        calls.append(plan)
        if len(calls) == 3:
            raise StepAllocationError("no memory for a draft")
        return failing(plan)

    loop._scheduler._speculation._port = type("Port", (), {"draft": staticmethod(draft)})()
    tokens = finish(loop)
    assert len(calls) > 3 and loop._counters.allocation_failures == 1
    assert all(tokens[name] == plain[name] for name in tokens)


def test_pages_come_with_the_step_that_first_writes_them():
    updates = PageUpdates(
        row_U=np.array([3, 3, 1, 7], np.int32), index_U=np.array([2, 3, 5, 0], np.int32),
        page_U=np.array([40, 41, 42, 43], np.int32),
    )
    plan = DraftPlan(
        row_N=np.array([3, 1], np.int32), start_N=np.array([8, 18], np.int32), token_N=np.array([9, 4], np.int32),
        count_N=np.array([5, 2], np.int32), pages=updates,
    )
    steps = unrolled(plan, 5, 4)
    for step in steps[:-1]:
        step.check()
    taken = [step.page_updates[0].page_U.tolist() for step in steps]
    assert taken == [[40], [], [42], [], [41], []]
    assert [step.start_A.tolist() for step in steps] == [[8, 18], [9, 19], [10, 20], [11], [12], [13]]
