"""Several machines by flags, or by what started the process."""

from __future__ import annotations

import pytest

from jaxserve.cluster.entry import settings
from jaxserve.cluster.handshake import SECRET
from jaxserve.core.errors import ConfigError
from jaxserve.flags import engine_config_from_kwargs, parse_serve_args
from jaxserve.flags.nodes import placed

TWO = "m --nnodes 2 --tensor-parallel-size 4"


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "0123456789abcdef")


@pytest.mark.parametrize(("line", "reason"), [
    ("m --node-rank 1", "node-rank 1 must be below nnodes"),
    (f"{TWO} --node-rank 2", "node-rank 2 must be below nnodes"),
    ("m --nnodes 2", "multiple of nnodes"),
    ("m --nnodes 2 -tp 3", "multiple of nnodes"),
    ("m --nnodes 0", "nnodes must be in"),
    ("m --nnodes auto", "none of Kubernetes"),
])
def test_what_cannot_be_is_refused(line: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_serve_args(line.split())


def test_without_a_secret_several_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET)
    with pytest.raises(ConfigError, match=SECRET):
        parse_serve_args(TWO.split())
    assert parse_serve_args(["m"]).engine.parallel.nnodes == 1


SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "gpu[03-05,09]"}
LWS = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "serve-0.serve.default"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}


@pytest.mark.parametrize(("environment", "given", "expected"), [
    (SLURM, {}, (4, 3, "gpu03")),
    (SLURM | {"SLURM_STEP_NODELIST": "a1,b[2-3]"}, {}, (4, 3, "a1")),
    (SLURM | {"SLURM_STEP_NODELIST": "one"}, {"master_addr": "10.0.0.1"}, (4, 3, "10.0.0.1")),
    (LWS, {}, (2, 1, "serve-0.serve.default")),
    (MPI, {"master_addr": "10.0.0.1"}, (2, 0, "10.0.0.1")),
    (MPI, {"master_addr": "10.0.0.1", "node_rank": 1}, (2, 1, "10.0.0.1")),
])
def test_auto_reads_what_the_starter_says(environment, given, expected) -> None:
    found = placed({"nnodes": None, **given}, environment)
    assert (found["nnodes"], found["node_rank"], found["master_addr"]) == expected


def test_auto_wants_what_the_starter_does_not_say() -> None:
    with pytest.raises(ConfigError, match="Open MPI does not say where node-rank 0 is"):
        placed({"nnodes": None}, MPI)
    with pytest.raises(ConfigError, match="not a number"):
        placed({"nnodes": None}, LWS | {"LWS_GROUP_SIZE": "two"})


def test_folders_may_differ_from_machine_to_machine_and_nothing_else_may() -> None:
    def of(model: str, draft: str, count: int = 4) -> dict[str, str]:
        drafting = {"method": "draft_model", "model": draft, "num_speculative_tokens": count}
        return settings(engine_config_from_kwargs(model, speculative_config=drafting))

    assert of("/a/m", "/a/d") == of("/b/m", "/b/d")
    differing = {name for name, value in of("m", "d").items() if of("m", "d", 5)[name] != value}
    assert differing == {"speculative-config"}


def test_only_auto_reads_the_environment() -> None:
    assert placed({}, SLURM) == {}
    assert placed({"nnodes": 2}, SLURM) == {"nnodes": 2}


def test_a_follower_is_a_server_without_http() -> None:
    config = parse_serve_args(f"{TWO} --node-rank 1 --master-addr 10.0.0.1 --master-port 4000".split())
    parallel = config.engine.parallel
    assert (parallel.nnodes, parallel.node_rank, parallel.master_addr, parallel.master_port) == (2, 1, "10.0.0.1", 4000)


def test_offline_use_refuses_several_machines() -> None:
    from jaxserve.launch import build_engine

    config = engine_config_from_kwargs("m", nnodes=2, tensor_parallel_size=4)
    with pytest.raises(ConfigError, match="jaxserve serve"):
        build_engine(config)
