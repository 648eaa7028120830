"""The channel carries every message whole and refuses what no peer sends."""

import asyncio
import socket
import struct
import threading

import pytest

from jaxserve.core.config import EngineConfig, ModelConfig
from jaxserve.core.request import EngineInfo, EngineRequest, EngineStats, SequenceOutput, TokenLogprob
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine import channel as ch


def _pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


DOWN = [
    ch.Start(EngineConfig(model=ModelConfig(model="m", hf_overrides={"a": [1, {"b": None}]})), "debug"),
    ch.Submit((EngineRequest(
        request_id="r/0", prompt_token_ids=tuple(range(1000)), seed=-(2**63),
        params=SamplingParams(temperature=0.5, logit_bias=((3, -1.5),), stop=("a", "b"), allowed_token_ids=(1, 2)),
    ),)),
    ch.Abort(("r/0", "r/1")),
    ch.Shutdown(),
]
UP = [
    ch.Status("loading", "3 of 4"),
    ch.Serving(EngineInfo(model="m", vocab_size=5, max_model_len=9, page_size=16, page_count=3, dtype="float32"), "/f"),
    ch.Outputs((SequenceOutput(
        request_id="r/0", token_ids=(1,), finish_reason="stop", stop_reason=7,
        logprobs=(TokenLogprob(token_id=1, logprob=-0.5, rank=1, top_ids=(1, 2), top_logprobs=(-0.5, -1.0)),),
        prompt_logprobs=(None,),
    ),), EngineStats(running_count=3)),
    ch.Failed("why", is_users=True),
]


def test_messages_down_arrive_equal_and_in_order():
    ours, theirs = _pair()
    end = ch.EngineEnd(theirs)

    async def send() -> None:
        api = await ch.ApiEnd.on(ours)
        for message in DOWN:
            api.send(message)
        await api.close()

    received = []
    reader = threading.Thread(target=lambda: received.extend(iter(end.receive, None)))
    reader.start()
    asyncio.run(send())
    reader.join(10)
    assert received == DOWN
    end.close()


def test_messages_up_arrive_equal_and_in_order():
    ours, theirs = _pair()
    end = ch.EngineEnd(theirs)

    async def receive() -> list[object]:
        api = await ch.ApiEnd.on(ours)
        for message in UP:
            end.send(message)
        end.close()
        got = []
        while (message := await api.receive()) is not None:
            got.append(message)
        await api.close()
        return got

    assert asyncio.run(receive()) == UP


@pytest.mark.parametrize("body", [b"\x00", b"\x81\xa4type\xa5other", b"\x81\xa4type\xa6submit", b""])
def test_a_frame_no_peer_sends_is_an_error(body):
    ours, theirs = _pair()
    end = ch.EngineEnd(theirs)
    ours.sendall(struct.pack("<I", len(body)) + body)
    ours.close()
    with pytest.raises(ch.ChannelError):
        end.receive()
    end.close()


def test_a_length_over_the_bound_is_refused_before_reading():
    ours, theirs = _pair()
    end = ch.EngineEnd(theirs)
    ours.sendall(struct.pack("<I", ch.FRAME_BYTES_MAX + 1))
    with pytest.raises(ch.ChannelError, match="bound"):
        end.receive()
    ours.close()
    end.close()


def test_a_frame_cut_short_reads_as_gone():
    ours, theirs = _pair()
    end = ch.EngineEnd(theirs)
    ours.sendall(ch.encode(ch.Shutdown())[:-1])
    ours.close()
    assert end.receive() is None
    end.close()
