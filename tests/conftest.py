"""What all tests share: the CPU platform, one compilation cache for the run, the demo model, real server processes."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"       # before anything imports jax

import pytest

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
START_S_MAX = 240.0


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where programs of this run are kept: what one server compiled the next one loads."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session", name="demo_model")
def _demo_model() -> Path:
    """SmolLM2-135M-Instruct, made by the demo's own script (in the user's cache, so only once a machine)."""
    command = [sys.executable, str(ROOT / "scripts" / "fetch_demo_model.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """A random Llama of three layers and 320 tokens."""
    return FIXTURES / "tiny-llama-tied"


class Shown:
    """What passing tests have shown to work in this run: (family, checkpoint, weights format, backend). Mutable."""

    def __init__(self) -> None:
        self.records: list[tuple[str, str, str, str]] = []

    def note(self, family: str, checkpoint: str, weights: str, backend: str) -> None:
        self.records.append((family, checkpoint, weights, backend))

    def names(self, weights: str) -> set[str]:
        """Checkpoints that were read from that format."""
        return {checkpoint for _, checkpoint, of, _ in self.records if of == weights}


@pytest.fixture(scope="session")
def shown() -> Shown:
    """Collects what docs/models.md may claim."""
    return Shown()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write generated pages instead of comparing them")


class Server:
    """A real server process on a free port."""

    def __init__(self, flags: tuple[str, ...], log: Path, environment: dict[str, str] | None = None) -> None:
        self._log = log
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "jaxserve.serve", "--host", "127.0.0.1", "--port", str(port), *flags]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=ROOT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | (environment or {}),
            )
        self.pid = self._process.pid

    def log(self) -> str:
        """Everything it printed so far."""
        return self._log.read_text(errors="replace")

    def wait_for(self, is_so: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Polls until `is_so`; fails with the log."""
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert self._process.poll() is None, f"the server ended with {self._process.returncode}:\n{self.log()}"
            assert time.monotonic() < deadline, f"waited {timeout_s} s in vain:\n{self.log()[-4000:]}"
            time.sleep(0.05)

    def wait_serving(self) -> None:
        """Until /health says 200."""
        self.wait_for(lambda: self._get("/health") == 200, START_S_MAX)

    def wait_ready(self) -> None:
        """Until every bucket is compiled."""
        self.wait_for(lambda: "ready:" in self.log(), START_S_MAX)

    def wait_exit(self, timeout_s: float) -> int:
        """The exit status; fails with the log if it does not end."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {timeout_s} s:\n{self.log()[-4000:]}") from None

    def stop(self) -> None:
        """Ends it if it runs; nothing may be left, the engine process included."""
        if self._process.poll() is None:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                raise AssertionError(f"the server did not stop on SIGTERM:\n{self.log()[-4000:]}") from None
            left = [child for child in children if Path("/proc", child).exists()]
            assert not left, f"the server left {left} behind:\n{self.log()[-4000:]}"

    def _get(self, path: str) -> int:
        import httpx

        try:
            return httpx.get(self.url + path, timeout=5).status_code
        except httpx.HTTPError:
            return 0


def free_port(count: int = 1) -> int:
    """The first of `count` ports in a row that nobody uses now.

    Below the range from which the system takes a connection's own port: one of those may be gone before a server
    listens on it, and a port beside one that the system has just given is often the next that it gives.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, first - count)
        with ExitStack() as stack:
            try:
                for number in range(port, port + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
        return port


@pytest.fixture
def serve(tmp_path: Path, compile_cache: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers with given flags; all are stopped at the end of the test."""
    yield from _servers(tmp_path, compile_cache)


@pytest.fixture(scope="module")
def serve_module(tmp_path_factory: pytest.TempPathFactory, compile_cache: Path) -> Iterator[Callable[..., Server]]:
    """The same for servers that a whole module shares."""
    yield from _servers(tmp_path_factory.mktemp("servers"), compile_cache)


def _servers(folder: Path, compile_cache: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*flags: str, wait: bool = True, environment: dict[str, str] | None = None) -> Server:
        with_cache = (*flags, "--compilation-cache-dir", str(compile_cache))
        server = Server(with_cache, folder / f"server-{len(servers)}.log", environment)
        servers.append(server)
        if wait:
            server.wait_serving()
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def demo_server(demo_model: Path, compile_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model in float32, as few programs as will do; shared by every test that only asks it things."""
    log = tmp_path_factory.mktemp("demo") / "server.log"
    server = Server(
        ("--config", "smollm2-135m.yaml", "--model", str(demo_model), "--dtype", "float32", "--max-num-seqs", "16",
         "--max-num-batched-tokens", "256", "--enforce-eager", "--compilation-cache-dir", str(compile_cache)),
        log,
    )
    server.wait_serving()
    yield server
    server.stop()
