"""Speculation on the real runner: greedy and seeded tokens and logprobs are those without it, alone and mixed."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.core.clock import MonotonicClock
from jaxserve.core.config import CacheConfig, SchedulerConfig, SpeculativeConfig
from jaxserve.core.plan import I32
from jaxserve.core.request import EngineRequest, SequenceOutput
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.loop import EngineLoop
from jaxserve.engine.sequence import Sequence
from jaxserve.engine.speculation import NgramSpeculation, Speculation
from jaxserve.runner.buckets import Buckets
from tests.device.tiny import prompt_of, tiny_config, tiny_params, tiny_runner, tiny_spec

NGRAM = NgramSpeculation(SpeculativeConfig(num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1))
PROMPTS = [[*prompt_of(4, 1)] * 4, prompt_of(9, 2), [5, 6] * 6, prompt_of(3, 3)]


@pytest.fixture(scope="module", params=[pytest.param(None, marks=pytest.mark.slow), 6], ids=["one group", "two groups"])
def runner(request, compile_cache):
    spec = tiny_spec(window=request.param)
    config = tiny_config(store=compile_cache, pages=64)
    runner = tiny_runner(spec, tiny_params(spec, seed=5), config, Buckets(tokens=(8, 32), rows=(8,)))
    yield runner
    runner.close()


class Told:
    """Drafts what another run gave, every seventh token wrong."""

    tokens_max = 3

    def __init__(self, outputs: dict[str, list[SequenceOutput]]) -> None:
        self._tokens = {name: _tokens(of) for name, of in outputs.items()}

    def propose(self, sequence: Sequence) -> I32:
        done = sequence.known - sequence.prompt_length
        future = self._tokens[sequence.request.request_id][done : done + self.tokens_max]
        return np.array([max(token - (place % 7 == 0), 0) for place, token in enumerate(future, done)], np.int32)

    def learn(self, sequence: Sequence, *, drafted: int, accepted: int) -> None:
        pass


def run(runner, *, drafts: Speculation | None, **wanted: object):
    """All outputs by request, and the engine's counts."""
    runner.rebuild()
    scheduler = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32)
    loop = EngineLoop(
        runner, config=scheduler, cache=CacheConfig(block_size=4), clock=MonotonicClock(), speculation=drafts
    )
    outputs: dict[str, list[SequenceOutput]] = {str(index): [] for index in range(len(PROMPTS))}
    for index, prompt in enumerate(PROMPTS):
        params: dict[str, object] = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, "logprobs": 2} | wanted
        if index == 3:
            params["presence_penalty"] = 0.7    # does not draft
        loop.add(EngineRequest(
            request_id=str(index), prompt_token_ids=tuple(prompt), seed=index,
            params=SamplingParams(**params),  # type: ignore[arg-type]
        ))
    while loop.has_work:
        for output in loop.step():
            outputs[output.request_id].append(output)
        loop.check()
    return outputs, loop.stats


@pytest.mark.parametrize("is_told", [True, False], ids=["told", "ngram"])
@pytest.mark.parametrize("wanted", [
    {}, {"temperature": 0.3}, {"temperature": 0.2, "top_k": 8, "top_p": 0.9, "min_tokens": 6},
], ids=["greedy", "sampled", "restricted"])
def test_tokens_and_logprobs_are_those_without_drafts(runner, wanted, is_told):
    plain, _ = run(runner, drafts=None, **wanted)
    drafted, stats = run(runner, drafts=Told(plain) if is_told else NGRAM, **wanted)
    for name in plain:
        assert _tokens(drafted[name]) == _tokens(plain[name]), name
        found, expected = (
            [logprob for output in of[name] for logprob in output.logprobs] for of in (drafted, plain)
        )
        assert [logprob.logprob for logprob in found] == pytest.approx(
            [logprob.logprob for logprob in expected], abs=1e-3
        )
        assert [logprob.rank for logprob in found] == [logprob.rank for logprob in expected]
    assert stats.draft_count > 0
    if is_told:
        assert 30 < sum(stats.draft_accepted_at) < stats.draft_tokens
        assert any(len(output.token_ids) > 1 for outputs in drafted.values() for output in outputs)
    assert all(len(output.token_ids) == 1 for output in drafted["3"]), "a row with penalties does not draft"


def test_a_stop_token_inside_an_accepted_run_ends_there(runner):
    plain, _ = run(runner, drafts=None)
    run_of = _tokens(plain["2"])
    stop = run_of[len(run_of) // 2]
    drafted, _ = run(runner, drafts=Told(plain), stop_token_ids=(stop,))
    assert _tokens(drafted["2"]) == run_of[: run_of.index(stop) + 1]
    assert drafted["2"][-1].stop_reason == stop


def _tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]
