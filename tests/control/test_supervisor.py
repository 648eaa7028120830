"""The supervisor keeps one engine process alive, starts it again after a failure, gives up at last, leaves nothing."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from jaxserve.core.config import EngineConfig, ModelConfig, ParallelConfig
from jaxserve.engine import async_engine
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.supervisor import RESTARTS_MAX, EngineGaveUpError, Supervisor

# An engine process without an engine: serves at once, then obeys Shutdown or does what its argument says.
FAKE = """
import os, socket, sys, time
from jaxserve.core.request import EngineInfo, EngineStats
from jaxserve.engine.channel import Alive, EngineEnd, Failed, Outputs, Serving, Shutdown, Status
mode, end = sys.argv[1], EngineEnd(socket.socket(fileno=int(sys.argv[2])))
end.receive()
if mode == "refuse":
    end.send(Failed("no such model", is_users=True)); sys.exit(1)
info = EngineInfo(model="m", vocab_size=8, max_model_len=8, page_size=4, page_count=2, dtype="float32")
end.send(Serving(info, "/f"))
end.send(Status("ready"))
if mode == "die":
    os._exit(3)
if mode == "stall":
    end.send(Alive())
if mode in ("hang", "stall"):
    time.sleep(60)
if mode == "listen":
    end.send(Alive())
    os._exit(0 if isinstance(end.receive(), Alive) else 4)
while not isinstance(end.receive(), (Shutdown, type(None))):
    pass
"""
CONFIG = EngineConfig(model=ModelConfig(model="m"))
OF_SEVERAL = EngineConfig(model=ModelConfig(model="m"), parallel=ParallelConfig(nnodes=2, tensor_parallel_size=2))


def _supervisor(tmp_path: Path, mode: str, config: EngineConfig = CONFIG) -> Supervisor:
    script = tmp_path / "fake_engine.py"
    script.write_text(FAKE)
    return Supervisor(AsyncEngine(), config, log_level="info", command=(sys.executable, str(script), mode))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_stop_leaves_no_process(tmp_path):
    async def scenario() -> int:
        supervisor = _supervisor(tmp_path, "obey")
        task = asyncio.create_task(supervisor.run(supervisor.spawn()))
        await asyncio.wait_for(supervisor.engine.serving.wait(), 20)
        await supervisor.stop()
        await asyncio.wait_for(task, 20)
        assert supervisor.process.returncode == 0
        return supervisor.process.pid

    assert not _is_alive(asyncio.run(scenario()))


def test_a_killed_engine_is_started_again(tmp_path):
    async def scenario() -> None:
        supervisor = _supervisor(tmp_path, "obey")
        task = asyncio.create_task(supervisor.run(supervisor.spawn()))
        await asyncio.wait_for(supervisor.engine.serving.wait(), 20)
        first = supervisor.process.pid
        os.kill(first, signal.SIGKILL)
        while supervisor.process.pid == first:
            await asyncio.sleep(0.01)
        await asyncio.wait_for(supervisor.engine.serving.wait(), 20)
        assert not _is_alive(first)
        await supervisor.stop()
        await asyncio.wait_for(task, 20)

    asyncio.run(scenario())


def test_an_engine_that_keeps_dying_is_given_up_with_the_reason(tmp_path):
    async def scenario() -> None:
        supervisor = _supervisor(tmp_path, "die")
        with pytest.raises(EngineGaveUpError, match=f"failed {RESTARTS_MAX + 1} times .* ended with status 3"):
            await asyncio.wait_for(supervisor.run(supervisor.spawn()), 60)
        assert supervisor.engine.status.phase == "dead"

    asyncio.run(scenario())


def test_an_error_of_the_user_is_not_tried_again(tmp_path):
    async def scenario() -> None:
        supervisor = _supervisor(tmp_path, "refuse")
        with pytest.raises(EngineGaveUpError, match="^no such model$"):
            await asyncio.wait_for(supervisor.run(supervisor.spawn()), 20)

    asyncio.run(scenario())


def test_a_hung_engine_is_killed_and_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxserve.supervisor.BEAT_MISSED_S_MAX", 1.0)

    async def scenario() -> None:
        supervisor = _supervisor(tmp_path, "hang")
        task = asyncio.create_task(supervisor.run(supervisor.spawn()))
        await asyncio.wait_for(supervisor.engine.serving.wait(), 20)
        first = supervisor.process.pid
        while supervisor.process.pid == first:
            await asyncio.sleep(0.05)
        assert not _is_alive(first)
        await supervisor.stop(grace_s=0.5)
        await asyncio.wait_for(task, 20)

    assert async_engine.BEAT_MISSED_S_MAX > 60   # the real bound outlasts any step
    asyncio.run(scenario())


def test_an_engine_of_several_machines_that_stalls_ends_the_server(tmp_path, monkeypatch):
    """Long before the loop of a lone engine would be called hung; and the restart is left to who started them all."""
    monkeypatch.setattr("jaxserve.supervisor.SILENCE_S_MAX", 1.0)

    async def scenario() -> None:
        supervisor = _supervisor(tmp_path, "stall", OF_SEVERAL)
        with pytest.raises(EngineGaveUpError, match="hung: silent for"):
            await asyncio.wait_for(supervisor.run(supervisor.spawn()), 20)
        assert supervisor.engine.status.phase == "dead" and not _is_alive(supervisor.process.pid)

    asyncio.run(scenario())


def test_an_engine_of_several_machines_that_never_speaks_ends_the_server(tmp_path, monkeypatch):
    """Stopped while it starts: before it could say that it is alive."""
    monkeypatch.setattr("jaxserve.supervisor.FIRST_BEAT_S_MAX", 1.0)

    async def scenario() -> None:
        supervisor = _supervisor(tmp_path, "hang", OF_SEVERAL)
        with pytest.raises(EngineGaveUpError, match="hung: silent for"):
            await asyncio.wait_for(supervisor.run(supervisor.spawn()), 20)
        assert not _is_alive(supervisor.process.pid)

    asyncio.run(scenario())


def test_an_engine_of_several_machines_is_told_that_its_server_is_alive(tmp_path):
    async def scenario() -> None:
        supervisor = _supervisor(tmp_path, "listen", OF_SEVERAL)
        with pytest.raises(EngineGaveUpError, match="^the engine process ended with status 0$"):
            await asyncio.wait_for(supervisor.run(supervisor.spawn()), 20)

    asyncio.run(scenario())


def test_one_engine_of_several_is_not_started_again_alone(tmp_path):
    async def scenario() -> None:
        supervisor = _supervisor(tmp_path, "die", OF_SEVERAL)
        with pytest.raises(EngineGaveUpError, match="^the engine process ended with status 3$"):
            await asyncio.wait_for(supervisor.run(supervisor.spawn()), 20)

    asyncio.run(scenario())
