"""The engine's loop over the real runner: tokens do not depend on how the scheduler cuts, shares or preempts.

A pool so small that preemption happens; the oracle is the decoder without a cache.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jaxserve.core.clock import MonotonicClock
from jaxserve.core.config import CacheConfig, SchedulerConfig
from jaxserve.core.request import EngineRequest, SequenceOutput
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.loop import EngineLoop
from jaxserve.runner.buckets import Buckets
from tests.device.tiny import (
    continuation,
    dense_logits,
    prompt_of,
    tiny_config,
    tiny_params,
    tiny_runner,
    tiny_spec,
)

TURNS_MAX = 2000


@pytest.fixture(scope="module", params=[None, 6], ids=["one group", "two groups"])
def served(request, compile_cache):
    """Model, runner, requests and their outputs alone."""
    spec = tiny_spec(window=request.param)
    params = tiny_params(spec, seed=5)
    config = tiny_config(store=compile_cache, pages=18)
    runner = tiny_runner(spec, params, config, Buckets(tokens=(8, 32), rows=(8,)))
    shared = prompt_of(13, 100)
    requests = [
        (f"r{index}", [*shared[: (index % 3) * 6], *prompt_of(3 + 5 * (index % 4), index)], 14 + 3 * (index % 5))
        for index in range(10)
    ]
    expected = {name: continuation(spec, params, prompt, count) for name, prompt, count in requests}
    yield spec, params, runner, requests, expected
    runner.close()


def run(runner, requests, *, prefix: bool, overlap: bool, chunked: bool = True, **wanted: object):
    """All outputs by request, and how often somebody was preempted."""
    runner.rebuild()
    scheduler = SchedulerConfig(
        max_num_seqs=8, max_num_batched_tokens=32, async_scheduling=overlap, enable_chunked_prefill=chunked
    )
    loop = EngineLoop(
        runner, config=scheduler, cache=CacheConfig(block_size=4, enable_prefix_caching=prefix), clock=MonotonicClock()
    )
    outputs: dict[str, list[SequenceOutput]] = {}
    waiting = list(requests)
    for turn in itertools.count():
        assert turn < TURNS_MAX
        if turn % 2 == 0 and waiting:
            name, prompt, count = waiting.pop(0)
            loop.add(EngineRequest(
                request_id=name, prompt_token_ids=tuple(prompt),
                params=SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **wanted),  # type: ignore[arg-type]
            ))
        for output in loop.step():
            outputs.setdefault(output.request_id, []).append(output)
        loop.check()
        if not waiting and not loop.has_work:
            break
    assert loop.stats.page_used_count == 0
    return outputs, loop.stats


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
def test_tokens_are_those_of_each_request_alone(served, prefix, overlap, chunked):
    _, _, runner, requests, expected = served
    outputs, stats = run(runner, requests, prefix=prefix, overlap=overlap, chunked=chunked)
    got = {name: [token for output in of for token in output.token_ids] for name, of in outputs.items()}
    assert got == expected
    assert stats.preemption_count > 0, "the pool is meant to be too small"
    assert (stats.prefix_hit_tokens > 0) == prefix


def test_prompt_logprobs_survive_chunks_and_preemption(served):
    spec, params, runner, requests, expected = served
    outputs, _ = run(runner, requests, prefix=True, overlap=True, prompt_logprobs=1, logprobs=1)
    for name, prompt, count in requests:
        logits = dense_logits(spec, params, [*prompt, *expected[name]])
        logprob_TV = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logprob_TV -= logits.max(-1, keepdims=True)
        scores = outputs[name][0].prompt_logprobs
        assert scores is not None and scores[0] is None and len(scores) == len(prompt)
        wanted = [logprob_TV[i, token] for i, token in enumerate(prompt[1:])]
        np.testing.assert_allclose([score.logprob for score in scores[1:] if score], wanted, atol=1e-3)
        found = [logprob for output in outputs[name] for logprob in output.logprobs]
        assert [logprob.token_id for logprob in found] == expected[name] and len(found) == count
        wanted = [logprob_TV[len(prompt) - 1 + i, token] for i, token in enumerate(expected[name])]
        np.testing.assert_allclose([logprob.logprob for logprob in found], wanted, atol=1e-3)
