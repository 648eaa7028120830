"""Replicas by Ray Serve, real processes: the whole API through them, and a killed one fails only its own streams."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from openai import APIError, APIStatusError, AuthenticationError, NotFoundError, OpenAI

from tests.conftest import free_port
from tests.e2e.test_life import is_alive

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install .[ray]"),
]
SCRIPT = Path(__file__).with_name("replicas_app.py")
ROOT = Path(__file__).parents[2]
STREAMS = 64
KEY = "sk-of-the-test"
WAIT_S_MAX = 120.0


class Replicas:
    """An application that serves at `url`."""

    def __init__(self, url: str, process: subprocess.Popen[str]) -> None:
        self.url, self._process, self._pid = url, process, process.pid
        self.client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        self.model = self.client.models.list().data[0].id

    def pids(self) -> list[int]:
        """Processes of Ray's that hold a replica of this application."""
        return [pid for pid in _processes("ray::ServeReplica:jaxserve:replica") if _session(pid) == _session(self._pid)]

    def deploy(self, options: dict[str, Any]) -> None:
        """Other options in their place; returns when they serve."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(options) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline().strip() == "serving"

    def metric(self, name: str) -> dict[str, float]:
        """A metric's value by replica."""
        lines = [line for line in self._page().splitlines() if line.startswith(name + "{")]
        return {line.split('replica="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    def _page(self) -> str:
        return requests.get(f"{self.url}/metrics", timeout=60).text

    def wait(self, is_so: Any) -> None:
        begin = time.monotonic()
        while not is_so():
            assert time.monotonic() - begin < WAIT_S_MAX, self._page()
            time.sleep(0.1)


def _processes(title: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(title.encode()):
                found.append(int(entry.name))
        except OSError:
            continue    # it ended meanwhile
    return found


def _session(pid: int) -> bytes:
    """The folder of the cluster that a process belongs to, by the name of this test's own folder."""
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(word for word in words if word.startswith(b"JAXSERVE_TEST_CLUSTER="))


@contextmanager
def application(folder: Path, port: int, **options: Any) -> Iterator[Replicas]:
    """Runs until left; its cluster has a folder of its own. Unix sockets want a short path."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)]),
        "JAXSERVE_TEST_CLUSTER": str(folder),
    }
    log = folder.parent / "application.log"
    command = [sys.executable, str(SCRIPT), str(port), str(folder), json.dumps(options)]
    with log.open("w") as errors, subprocess.Popen(
        command, text=True, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "serving", log.read_text()
            replicas = Replicas(f"http://127.0.0.1:{port}", process)
            yield replicas
            pids = replicas.pids()
            process.communicate("", timeout=60)
            assert process.returncode == 0
            assert not any(is_alive(pid) for pid in pids), "nothing is left"
        finally:
            process.kill()


def stream(replicas: Replicas, number: int, tokens: int) -> str:
    """How a stream ended: `whole`, or what the client raised."""
    try:
        pieces = replicas.client.completions.create(
            model=replicas.model, prompt=[number % 50 + 5, 6, 7], max_tokens=tokens, stream=True, temperature=0,
            extra_body={"ignore_eos": True},
        )
        ended = [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1]
        return "whole" if ended == "length" else f"cut: {ended}"
    except APIStatusError as error:
        return f"{error.status_code}"
    except APIError as error:
        return f"event {error.code}"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Ray's Unix sockets want a short path."""
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as name:
        yield Path(name) / "ray"


def test_many_streams_and_a_killed_replica(tiny_llama, compile_cache, folder):
    options = {"dtype": "float32", "max-model-len": 256, "max-num-seqs": 4, "kv-cache-memory-bytes": "16M"}
    check_life(str(tiny_llama), compile_cache, folder, tokens=200, options=options)


@pytest.mark.slow
def test_many_streams_of_the_demo_model_and_a_killed_replica(demo_model, compile_cache, folder):
    options = {"config": "smollm2-135m.yaml", "kv-cache-memory-bytes": "256M", "max-model-len": 2048}
    check_life(str(demo_model), compile_cache, folder, tokens=100, options=options)


def check_life(model: str, cache: Path, folder: Path, *, tokens: int, options: dict[str, Any]) -> None:
    options |= {
        "model": model, "min-replicas": 2, "enforce-eager": "true", "api-key": KEY, "compilation-cache-dir": str(cache),
    }
    with application(folder, free_port(), **options) as replicas:
        check_api(replicas)
        victim, other = replicas.pids()
        killed = threading.Event()
        ends: list[list[str]] = [[] for _ in range(STREAMS)]

        def client(number: int) -> None:
            """One stream after the other, so that both replicas are busy until one is killed."""
            while not killed.is_set():
                ends[number].append(stream(replicas, number, tokens))

        threads = [threading.Thread(target=client, args=(number,)) for number in range(STREAMS)]
        for thread in threads:
            thread.start()
        replicas.wait(lambda: [v > 0 for v in replicas.metric("vllm:num_requests_running").values()] == [True] * 2)
        killed.set()
        os.kill(victim, signal.SIGKILL)
        for thread in threads:
            thread.join(WAIT_S_MAX)
        assert {end for of_one in ends for end in of_one[:-1]} <= {"whole"}
        counts = Counter(of_one[-1] for of_one in ends)
        assert set(counts) <= {"whole", "503", "event 503"}, counts
        assert counts["whole"] >= STREAMS // 2 - 4 and counts["event 503"] + counts["503"] > 0, counts
        assert stream(replicas, 1, 4) == "whole", "the other one serves"
        replicas.wait(lambda: len(replicas.pids()) == 2 and len(replicas.metric("vllm:num_requests_running")) == 2)
        assert is_alive(other) and not is_alive(victim)
        for number in range(8):
            assert stream(replicas, number, 2) == "whole"
        assert all(replicas.metric("vllm:generation_tokens_total").values()), "the one that came back takes its part"


SMALL = {"dtype": "float32", "max-model-len": 256, "max-num-seqs": 4, "kv-cache-memory-bytes": "16M",
         "enforce-eager": "true", "api-key": KEY}


@pytest.mark.slow
def test_a_queue_brings_another_replica(tiny_llama, compile_cache, folder):
    options = SMALL | {
        "model": str(tiny_llama), "compilation-cache-dir": str(compile_cache), "min-replicas": 1, "max-replicas": 2,
        "target-ongoing-requests": 2,
    }
    with application(folder, free_port(), **options) as replicas:
        assert len(replicas.pids()) == 1
        done, ends = threading.Event(), []

        def client(number: int) -> None:
            while not done.is_set():
                ends.append(stream(replicas, number, 100))

        threads = [threading.Thread(target=client, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        try:
            replicas.wait(lambda: len(replicas.metric("vllm:num_requests_running")) == 2)
            replicas.wait(lambda: all(replicas.metric("vllm:generation_tokens_total").values()))
        finally:
            done.set()
            for thread in threads:
                thread.join(WAIT_S_MAX)
        assert set(ends) == {"whole"}


@pytest.mark.slow
def test_what_is_replaced_finishes_its_streams(tiny_llama, compile_cache, folder):
    options = SMALL | {"model": str(tiny_llama), "compilation-cache-dir": str(compile_cache), "shutdown-timeout": 60}
    with application(folder, free_port(), **options) as replicas:
        old, ends, done = replicas.pids(), [], threading.Event()

        def client(number: int) -> None:
            while not done.is_set():
                ends.append(stream(replicas, number, 240))

        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        replicas.wait(lambda: any(replicas.metric("vllm:num_requests_running").values()))
        replicas.deploy(options | {"max-num-seqs": 2})
        replicas.wait(lambda: not any(is_alive(pid) for pid in old))
        done.set()
        for thread in threads:
            thread.join(WAIT_S_MAX)
        assert len(ends) >= len(threads) and set(ends) == {"whole"}, Counter(ends)
        assert set(replicas.pids()).isdisjoint(old) and stream(replicas, 1, 4) == "whole"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")     # of Ray's own modules
def test_what_ray_is_asked_for(tiny_llama):
    from jaxserve.replicas.build import _replica_options
    from jaxserve.replicas.options import read_options

    def asked(**more: Any) -> dict[str, Any]:
        return _replica_options(*read_options({"model": str(tiny_llama), "shutdown-timeout": 30, **more}))

    fixed = asked(**{"min-replicas": 3, "num-cpus": 2, "prefix-routing": "false"})
    assert fixed["num_replicas"] == 3 and "autoscaling_config" not in fixed
    assert fixed["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0}
    assert fixed["graceful_shutdown_timeout_s"] > 30, "its streams may finish"
    assert not fixed["request_router_config"].request_router_kwargs["follows_prefixes"]
    scaled = asked(**{"min-replicas": 1, "max-replicas": 8, "target-ongoing-requests": "48", "max-ongoing-requests": 9})
    of = scaled["autoscaling_config"]
    assert (of.min_replicas, of.max_replicas, of.target_ongoing_requests) == (1, 8, 48) and "num_replicas" not in scaled
    assert scaled["max_ongoing_requests"] == 9
    assert asked(**{"num-gpus": 4})["ray_actor_options"]["num_gpus"] == 4


def check_api(replicas: Replicas) -> None:
    """What any server of ours answers, through Ray's proxy."""
    client, model = replicas.client, replicas.model
    prompt = list(range(5, 40))
    whole = client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0)
    pieces = client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert requests.get(f"{replicas.url}/health", timeout=10).status_code == 200
    with pytest.raises(NotFoundError, match="does not exist"):
        client.completions.create(model="another", prompt=prompt)
    with pytest.raises(AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    refused = requests.post(f"{replicas.url}/v1/completions", data=b"{", headers={"Authorization": f"Bearer {KEY}"},
                            timeout=10)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == 400
