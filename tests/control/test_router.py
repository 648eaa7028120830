"""Several engines behind one face: who gets a request, what happens when one is full or gone, what is counted."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.core.config import ParallelConfig
from jaxserve.core.errors import ConfigError, EngineBusyError, EngineDeadError
from jaxserve.core.request import EngineInfo, EngineRequest, EngineStats
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.async_engine import AsyncEngine, EngineStatus
from jaxserve.engine.router import EngineRouter
from jaxserve.supervisor import EngineGaveUpError, keep_alive
from jaxserve.visible_devices import engine_environment
from tests.control.server_fakes import make_state
from tests.control.test_supervisor import _supervisor


def info() -> EngineInfo:
    return EngineInfo(
        model="m", vocab_size=99, max_model_len=64, page_size=4, page_count=6, dtype="float32", row_count=8
    )


class FakeAsyncEngine(AsyncEngine):
    """Takes requests without a process."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[str] = []
        self.live, self.is_full = 0, False
        self.start()

    def start(self) -> None:
        self.status, self._info, self.folder = EngineStatus("ready"), info(), "/f"

    @property
    def live_count(self) -> int:
        return self.live

    def submit(self, requests: Sequence[EngineRequest], sink: object) -> int:
        if self.status.phase == "dead":
            raise EngineDeadError("the engine is dead")
        if self.is_full:
            raise EngineBusyError("full")
        self.got += [request.request_id for request in requests]
        self.live += len(requests)
        return 0


def request(name: str, *tokens: int, salt: str | None = None) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_token_ids=tokens, params=SamplingParams(), cache_salt=salt)


def router(count: int = 2) -> tuple[EngineRouter, list[FakeAsyncEngine]]:
    engines = [FakeAsyncEngine() for _ in range(count)]
    return EngineRouter(engines), engines


def send(to: EngineRouter, *requests: EngineRequest) -> None:
    count = len(requests)
    number = to.submit(requests, lambda _: None)
    assert to.engines[number].got[-count:] == [one.request_id for one in requests], "it says who took them"


def test_strangers_go_to_the_idlest():
    to, engines = router(3)
    for name in "abc":
        send(to, request(name, ord(name), 1, 2, 3, 4))
    assert [engine.got for engine in engines] == [["a"], ["b"], ["c"]]
    engines[1].live = 0
    send(to, request("d", 9, 9, 9, 9, 9), request("e", 9, 9, 9, 9, 9))
    assert engines[1].got == ["b", "d", "e"], "choices stay together"


def test_a_known_beginning_goes_where_its_pages_are():
    to, (first, second) = router()
    send(to, request("a", *range(8)))
    send(to, request("b", *range(50, 58)))
    assert first.got == ["a"] and second.got == ["b"]
    second.live = 0
    send(to, request("c", *range(8), 30, 31))
    assert first.got == ["a", "c"], "though the other is idle"
    send(to, request("d", *range(4), 77, 77, 77, 77))
    assert first.got[-1] == "d", "a part of it counts"
    send(to, request("e", *range(8), salt="other"))
    assert second.got[-1] == "e", "another salt shares no pages"
    send(to, request("f", 0, 1, 2))
    assert second.got[-1] == "f", "less than a page is no prefix"


def test_a_popular_beginning_does_not_starve_the_others():
    to, (first, second) = router()
    for number in range(8):
        send(to, request(str(number), *range(8), number))
    assert second.got, "the familiar engine may be ahead by a bound only"
    assert abs(first.live - second.live) <= 3


def test_what_was_remembered_is_bounded_and_dies_with_the_engine():
    to, (first, second) = router()
    send(to, request("a", *range(8)))
    first.start()       # another process: nothing is cached
    first.live = 1
    send(to, request("b", *range(8)))
    assert second.got == ["b"]
    to, (first, second) = router()
    send(to, request("a", *range(8)))
    first.live, second.live = 0, 1
    send(to, request("b", *range(40, 64)))     # six pages, all that the engine has
    first.live, second.live = 1, 0
    send(to, request("c", *range(8)))
    assert second.got == ["c"]


def test_the_full_and_the_dead_are_passed_over():
    to, (first, second) = router()
    first.is_full = True
    send(to, request("a", 1))
    assert second.got == ["a"]
    second.is_full = True
    with pytest.raises(EngineBusyError):
        send(to, request("b", 1))
    first.is_full = False
    second.status = EngineStatus("dead", "killed")
    first.live = 7
    send(to, request("c", 1))
    assert first.got == ["c"]
    assert to.status.phase == "ready" and to.status.is_serving and to.status.detail == "engine 1: dead killed"
    first.status = EngineStatus("dead", "killed, too")
    assert not to.status.is_serving
    with pytest.raises(EngineDeadError):
        send(to, request("d", 1))


def test_metrics_are_each_engines_own():
    state = make_state()
    to, engines = router()
    engines[0]._stats, engines[1]._stats = EngineStats(running_count=3), EngineStats(running_count=4, step_count=2)
    state.engine = to
    families = {family.name: family for family in text_string_to_metric_families(state.metrics.page().decode())}
    running = {sample.labels["engine"]: sample.value for sample in families["vllm:num_requests_running"].samples}
    assert running == {"0": 3, "1": 4}
    assert to.stats.running_count == 7 and to.stats.step_count == 2
    assert {sample.labels["engine"] for sample in families["vllm:cache_config_info"].samples} == {"0", "1"}


def test_one_killed_engine_is_started_again_while_the_other_serves(tmp_path: Path):
    async def scenario() -> None:
        supervisors = [_supervisor(tmp_path, "obey") for _ in range(2)]
        to = EngineRouter([one.engine for one in supervisors])
        task = asyncio.create_task(keep_alive(supervisors, [one.spawn() for one in supervisors]))
        while not all(engine.status.phase == "ready" for engine in to.engines):
            await asyncio.sleep(0.01)
        assert supervisors[0].process is not None
        first = supervisors[0].process.pid
        os.kill(first, signal.SIGKILL)
        while supervisors[0].process.pid == first:
            assert to.status.is_serving
            await asyncio.sleep(0.01)
        await asyncio.wait_for(to.engines[0].serving.wait(), 20)
        assert to.status.is_serving
        for one in supervisors:
            await one.stop()
        await asyncio.wait_for(task, 20)

    asyncio.run(scenario())


def test_an_engine_given_up_leaves_the_others_and_a_refused_start_ends_all(tmp_path: Path):
    for name in "ab":
        (tmp_path / name).mkdir()

    async def scenario() -> None:
        good, bad = _supervisor(tmp_path / "a", "obey"), _supervisor(tmp_path / "b", "die")
        task = asyncio.create_task(keep_alive([good, bad], [good.spawn(), bad.spawn()]))
        await asyncio.wait_for(good.engine.serving.wait(), 20)
        while len(bad._restarts_s) < 3 or bad.engine.status.phase != "dead":
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)
        assert not task.done() and good.engine.status.is_serving
        await good.stop()
        await asyncio.wait_for(task, 20)
        refused = _supervisor(tmp_path / "b", "refuse")
        with pytest.raises(EngineGaveUpError, match="no such model"):
            await asyncio.wait_for(keep_alive([refused], [refused.spawn()]), 20)

    asyncio.run(scenario())


def test_engines_see_devices_of_their_own(tmp_path: Path):
    two = ParallelConfig(data_parallel_size=2, tensor_parallel_size=2)
    seen = [engine_environment(two, index, environment={}, driver=tmp_path / "none") for index in range(2)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in seen] == ["0,1", "2,3"]
    given = {"CUDA_VISIBLE_DEVICES": "7, 5,4,1"}
    assert engine_environment(two, 1, environment=given, driver=tmp_path / "none")["CUDA_VISIBLE_DEVICES"] == "4,1"
    assert engine_environment(ParallelConfig(), 0, environment={}) == {}
    with pytest.raises(ConfigError, match="needs 4 devices; 2 are there \\(CUDA_VISIBLE_DEVICES=0,1\\)"):
        engine_environment(two, 0, environment={"CUDA_VISIBLE_DEVICES": "0,1"}, driver=tmp_path / "none")
    for number in range(3):
        (tmp_path / str(number)).mkdir()
    with pytest.raises(ConfigError, match="needs 4 devices; 3 are there"):
        engine_environment(two, 0, environment={}, driver=tmp_path)
