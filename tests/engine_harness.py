"""An engine loop over the fake runner, with every promise of the loop checked at every turn.

Used by the control and property tests of the engine; knows nothing of devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.core.config import CacheConfig, SchedulerConfig
from jaxserve.core.plan import StepLimits
from jaxserve.core.request import EngineRequest, SequenceOutput
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.loop import EngineLoop
from jaxserve.engine.speculation import Speculation
from tests.fakes import FakeClock, FakeRunner, alone, make_shape

TURNS_MAX = 20_000


def make_request(request_id: str, prompt: object = 5, **fields: object) -> EngineRequest:
    """A request for `prompt` tokens (or these ids); unknown fields are sampling parameters."""
    own = {"choice", "seed", "eos_token_ids", "priority", "cache_salt", "arrival_s"}
    ids = tuple(range(1, prompt + 1)) if isinstance(prompt, int) else tuple(prompt)  # type: ignore[call-overload]
    params: dict[str, object] = {"max_tokens": 5} | {k: v for k, v in fields.items() if k not in own}
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=ids,
        params=SamplingParams(**params),  # type: ignore[arg-type]
        **{k: v for k, v in fields.items() if k in own},  # type: ignore[arg-type]
    )


@dataclass
class Harness:
    """Collects what each request got; `step` checks invariants and the output protocol."""

    runner: FakeRunner
    loop: EngineLoop
    clock: FakeClock
    requests: dict[str, EngineRequest] = field(default_factory=dict)
    outputs: dict[str, list[SequenceOutput]] = field(default_factory=dict)

    def add(self, *requests: EngineRequest) -> None:
        for request in requests:
            self.loop.add(request)
            self.requests[request.request_id] = request
            self.outputs[request.request_id] = []

    def step(self, turns: int = 1) -> list[SequenceOutput]:
        given: list[SequenceOutput] = []
        for _ in range(turns):
            self.clock.advance(0.5)
            for output in self.loop.step():
                earlier = self.outputs[output.request_id]
                assert not earlier or earlier[-1].finish_reason is None, "an output follows the last one"
                assert output.token_ids or output.finish_reason, "an output without content"
                earlier.append(output)
                given.append(output)
            self.loop.check()
        return given

    def run(self) -> Harness:
        """Until nothing is left to do."""
        turns = 0
        while self.loop.has_work:
            self.step()
            turns += 1
            assert turns < TURNS_MAX, "the loop makes no progress"
        assert self.loop.stats.page_used_count == 0
        return self

    def tokens(self, request_id: str) -> tuple[int, ...]:
        return tuple(token for output in self.outputs[request_id] for token in output.token_ids)

    def end(self, request_id: str) -> str | None:
        outputs = self.outputs[request_id]
        return outputs[-1].finish_reason if outputs else None

    def assert_alone(self, *request_ids: str) -> None:
        """These (default: all) requests got exactly what they would have got alone."""
        for request_id in request_ids or self.requests:
            expected = alone(self.requests[request_id], self.runner.shape)
            assert self.tokens(request_id) == expected.token_ids, request_id
            assert self.end(request_id) == expected.finish_reason, request_id
            assert self.outputs[request_id][-1].stop_reason == expected.stop_reason, request_id


def make_harness(
    *,
    tokens_max: int = 64,
    samples_max: int = 8,
    prefix: bool = True,
    overlap: bool = True,
    chunked: bool = True,
    policy: str = "fcfs",
    batching: str = "continuous",
    queue_max: int | None = None,
    itl_target_ms: float | None = None,
    max_num_seqs: int | None = None,
    runner: FakeRunner | None = None,
    speculation: Speculation | None = None,
    **shape: object,
) -> Harness:
    """An engine over a small fake device; `shape` goes to `make_shape`."""
    runner = runner or FakeRunner(
        shape=make_shape(**shape),  # type: ignore[arg-type]
        limits_now=StepLimits(tokens_max=tokens_max, samples_max=samples_max),
    )
    clock = FakeClock()
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=tokens_max,
        enable_chunked_prefill=chunked,
        async_scheduling=overlap,
        scheduling_policy=policy,  # type: ignore[arg-type]
        batching=batching,  # type: ignore[arg-type]
        max_num_queued_reqs=queue_max,
        itl_target_ms=itl_target_ms,
    )
    loop = EngineLoop(
        runner, config=config, cache=CacheConfig(enable_prefix_caching=prefix), clock=clock, speculation=speculation
    )
    return Harness(runner, loop, clock)
