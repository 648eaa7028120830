"""The engine process: takes sequences from the channel, turns the engine's loop, sends what each step gave.

`python -m jaxserve.engine_process FD`, started by `jaxserve.supervisor` with its end of the socket pair as FD.
Three threads: this one turns the loop and alone touches the engine, one reads the channel, one writes it; so neither
a slow reader nor a long decode of a frame delays a step. Exits 0 when told to or when the API process is gone, 1
after it has said why in a `Failed` frame.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time

from jaxserve.cluster.entry import open_leader
from jaxserve.cluster.link import Pulse
from jaxserve.core.clock import MonotonicClock
from jaxserve.core.errors import CapacityError, ConfigError, JaxserveError, ModelError
from jaxserve.core.request import EngineRequest, SequenceOutput
from jaxserve.engine.channel import (
    Abort,
    Alive,
    EngineEnd,
    Failed,
    Outputs,
    Profile,
    Profiled,
    Serving,
    Shutdown,
    Start,
    Status,
    Submit,
    Up,
)
from jaxserve.engine.loop import EngineLoop
from jaxserve.launch import LocalEngine, build_engine
from jaxserve.logs import configure_logging
from jaxserve.progress import ConsoleProgress

logger = logging.getLogger("jaxserve.engine")

BEAT_S = 1.0   # an engine without outputs says it is alive this often
STALL_S = 0.05  # how often to look whether the buckets that the waiting work needs are compiled by now
HOLD_S = 0.02    # how often to look whether a step whose successor waits for newcomers has landed early

LOST_S = 1.0    # another process's end may first show as a failed collective: the link to it says more, and ends this
FAIL_S = 0.5    # for the last frame to reach the API process

_GONE = object()


def main() -> int:
    """Runs one engine until told to stop. Returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)   # the API process decides when to stop: it drains first
    channel = EngineEnd(socket.socket(fileno=int(sys.argv[1])))
    start = channel.receive()
    if not isinstance(start, Start):
        return 0
    configure_logging(start.log_level)
    outbox: queue.SimpleQueue[Up | None] = queue.SimpleQueue()
    writer = threading.Thread(target=_write, args=(channel, outbox), name="channel-writer", daemon=True)
    writer.start()
    status = 0
    try:
        _serve(channel, start, outbox)
    except JaxserveError as error:
        if start.config.parallel.nnodes > 1:
            time.sleep(LOST_S)
        outbox.put(Failed(str(error), is_users=isinstance(error, (ConfigError, ModelError, CapacityError))))
        status = 1
    except Exception as error:
        logger.exception("the engine failed")
        outbox.put(Failed(f"{type(error).__name__}: {error}"))
        status = 1
    outbox.put(None)
    writer.join(timeout=5)
    return status


def _serve(channel: EngineEnd, start: Start, outbox: queue.SimpleQueue[Up | None]) -> None:
    progress = ConsoleProgress(on_phase=lambda name, detail: outbox.put(Status(name, detail)))  # type: ignore[arg-type]
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    pulse = Pulse(MonotonicClock())
    threading.Thread(target=_read, args=(channel, inbox, pulse), name="channel-reader", daemon=True).start()
    leader = None
    if start.config.parallel.nnodes > 1:
        threading.Thread(target=_say_alive, args=(outbox,), name="alive", daemon=True).start()
        threading.Thread(target=_watch_api, args=(pulse, os.getppid(), outbox), name="watch-api", daemon=True).start()
        leader = open_leader(
            start.config, lambda reason: _fail(reason, outbox),
            lambda ranks: outbox.put(Status("starting", f"waiting for node-rank {ranks}")),
        )
    engine = build_engine(start.config, progress=progress, member=leader)
    if logger.isEnabledFor(logging.INFO):
        engine.report.print()
    outbox.put(Serving(engine.info, str(engine.folder)))
    progress.phase("serving")   # from here on what the background reports is a detail of serving
    engine.compile_rest(on_ready=lambda: progress.phase("ready"))
    gc.collect()
    gc.freeze()   # what start-up made lives as long as the process: no later collection walks it
    _turn(engine, inbox, outbox)
    if leader is not None:
        leader.stop()


def _say_alive(outbox: queue.SimpleQueue[Up | None]) -> None:
    """A stopped process must be noticed as soon as the other machines notice it: long before a long step is one."""
    while True:
        outbox.put(Alive())
        time.sleep(BEAT_S)


def _watch_api(pulse: Pulse, api_pid: int, outbox: queue.SimpleQueue[Up | None]) -> None:
    """A stopped API process answers nobody and tells nobody: it is ended here, and so are the other machines."""
    while not pulse.is_lost:
        time.sleep(BEAT_S)
    logger.error("the API process has been silent for %.0f s: killing it", pulse.silent_s)
    if os.getppid() == api_pid:
        os.kill(api_pid, signal.SIGKILL)    # and with it, on Linux, this process
    _fail("the API process was silent", outbox)


def _fail(reason: str, outbox: queue.SimpleQueue[Up | None]) -> None:
    """Ends this process for what happened to another one; the engine's own thread may hang in a collective."""
    logger.error("%s", reason)
    outbox.put(Failed(reason))
    outbox.put(None)
    time.sleep(FAIL_S)
    os._exit(1)


def _turn(engine: LocalEngine, inbox: queue.SimpleQueue[object], outbox: queue.SimpleQueue[Up | None]) -> None:
    """Steps while there is work, waits for the channel while there is none; returns when told to stop."""
    loop = engine.loop
    told_s = 0.0
    while True:
        outputs: list[SequenceOutput] = []
        wait_s = _wait_s(loop)
        try:
            message = inbox.get(timeout=wait_s) if wait_s else inbox.get_nowait()
            while True:
                if message is _GONE or isinstance(message, Shutdown):
                    return
                if isinstance(message, Submit):
                    for request in message.requests:
                        _add(engine, request, outputs)
                elif isinstance(message, Abort):
                    loop.abort(message.request_ids)
                elif isinstance(message, Profile):
                    outbox.put(_profile(engine, message.folder))
                message = inbox.get_nowait()
        except queue.Empty:
            pass
        if loop.has_work and not loop.hold_s:
            outputs += engine.step()
        now_s = time.monotonic()
        if outputs or now_s - told_s >= BEAT_S:
            outbox.put(Outputs(tuple(outputs), engine.stats))
            told_s = now_s


def _wait_s(loop: EngineLoop) -> float:
    """How long the channel may be waited for before the loop is looked at again."""
    if loop.is_stalled:
        return STALL_S
    return min(loop.hold_s, HOLD_S) if loop.has_work else BEAT_S


def _profile(engine: LocalEngine, folder: str | None) -> Profiled:
    try:
        engine.profile(folder)
    except JaxserveError as error:
        return Profiled(str(error))
    return Profiled()


def _add(engine: LocalEngine, request: EngineRequest, outputs: list[SequenceOutput]) -> None:
    try:
        engine.loop.add(request)
    except JaxserveError as error:
        outputs.append(SequenceOutput(request_id=request.request_id, finish_reason="error", error=str(error)))


def _read(channel: EngineEnd, inbox: queue.SimpleQueue[object], pulse: Pulse) -> None:
    try:
        while (message := channel.receive()) is not None:
            pulse.heard()
            if not isinstance(message, Alive):
                inbox.put(message)
    finally:
        inbox.put(_GONE)


def _write(channel: EngineEnd, outbox: queue.SimpleQueue[Up | None]) -> None:
    while (message := outbox.get()) is not None:
        try:
            channel.send(message)
        except OSError:
            return   # the API process is gone; the reader thread has noticed, too


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # Without waiting for a program that is still being compiled: the device goes with the process, and the store's
    # files appear whole or not at all.
    os._exit(status)
