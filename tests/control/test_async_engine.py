"""AsyncEngine routes outputs, refuses work it cannot take, and fails everything when the engine is gone."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from jaxserve.core.errors import EngineBusyError, EngineDeadError, EngineNotReadyError
from jaxserve.core.request import EngineInfo, EngineRequest, EngineStats, SequenceOutput
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.channel import ApiEnd, EngineEnd, Failed, Outputs, Serving, Status, Submit

INFO = EngineInfo(model="m", vocab_size=8, max_model_len=64, page_size=4, page_count=9, dtype="float32", row_count=2)


def _request(name: str) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_token_ids=(1,), params=SamplingParams())


@asynccontextmanager
async def _engine(**options: object) -> AsyncIterator[tuple[AsyncEngine, EngineEnd, asyncio.Task]]:
    ours, theirs = socket.socketpair()
    end = EngineEnd(theirs)
    engine = AsyncEngine(**options)
    channel = await ApiEnd.on(ours)
    task = asyncio.create_task(engine.run(channel))
    end.send(Serving(INFO, "/folder"))
    end.send(Status("ready"))
    await engine.serving.wait()
    await asyncio.sleep(0.01)
    try:
        yield engine, end, task
    finally:
        end.close()
        await task
        await channel.close()


def test_outputs_reach_the_sink_of_their_request():
    async def scenario() -> None:
        async with _engine() as (engine, end, _):
            got: list[SequenceOutput] = []
            engine.submit([_request("a"), _request("b")], got.append)
            assert engine.live_count == 2
            assert end.receive() == Submit((_request("a"), _request("b")))
            end.send(Outputs((SequenceOutput(request_id="a", token_ids=(3,)),), EngineStats(running_count=2)))
            end.send(Outputs((
                SequenceOutput(request_id="b", finish_reason="stop"),
                SequenceOutput(request_id="a", token_ids=(4,), finish_reason="length"),
                SequenceOutput(request_id="nobody", token_ids=(4,)),
            ), EngineStats()))
            assert await engine.wait_idle(5)
            assert [(o.request_id, o.token_ids) for o in got] == [("a", (3,)), ("b", ()), ("a", (4,))]
            assert engine.live_count == 0 and engine.stats == EngineStats()

    asyncio.run(scenario())


def test_before_serving_work_is_refused_with_the_phase():
    engine = AsyncEngine()
    with pytest.raises(EngineNotReadyError, match="starting"):
        engine.submit([_request("a")], lambda output: None)
    with pytest.raises(EngineNotReadyError, match="starting"):
        _ = engine.info


def test_a_full_queue_refuses_and_takes_nothing():
    async def scenario() -> None:
        async with _engine(queue_max=1) as (engine, _, __):
            for name in "abc":   # two rows and one place in the queue
                engine.submit([_request(name)], lambda output: None)
            with pytest.raises(EngineBusyError):
                engine.submit([_request("d")], lambda output: None)
            assert engine.live_count == 3

    asyncio.run(scenario())


def test_an_aborted_request_hears_nothing_more():
    async def scenario() -> None:
        async with _engine() as (engine, end, _):
            got: list[SequenceOutput] = []
            engine.submit([_request("a")], got.append)
            engine.abort(["a", "unknown"])
            end.send(Outputs((SequenceOutput(request_id="a", token_ids=(3,)),), EngineStats()))
            await asyncio.sleep(0.05)
            assert got == [] and engine.live_count == 0

    asyncio.run(scenario())


def test_death_fails_every_live_request_once_and_says_why():
    async def scenario() -> None:
        got: list[SequenceOutput] = []
        async with _engine() as (engine, end, task):
            engine.submit([_request("a"), _request("b")], got.append)
            end.send(Failed("out of luck"))
            end.close()
            await task
            assert [(o.request_id, o.finish_reason) for o in got] == [("a", "error"), ("b", "error")]
            assert all("out of luck" in (o.error or "") for o in got)
            assert engine.status.phase == "dead"
            with pytest.raises(EngineDeadError, match="out of luck"):
                engine.submit([_request("c")], got.append)

    asyncio.run(scenario())


def test_a_failing_reader_harms_nobody_else():
    async def scenario() -> None:
        async with _engine() as (engine, end, _):
            got: list[SequenceOutput] = []

            def broken(output: SequenceOutput) -> None:
                raise RuntimeError("reader")

            engine.submit([_request("a")], broken)
            engine.submit([_request("b")], got.append)
            end.send(Outputs((
                SequenceOutput(request_id="a", token_ids=(1,)),
                SequenceOutput(request_id="b", token_ids=(2,), finish_reason="stop"),
            ), EngineStats()))
            assert await engine.wait_idle(5)
            assert [o.token_ids for o in got] == [(2,)]

    asyncio.run(scenario())
