"""The examples of deploy/ say what the flags understand: read, and run where a stand-in can run them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxserve.cluster.handshake import SECRET
from jaxserve.flags import parse_serve_args
from jaxserve.replicas.options import read_options

DEPLOY = Path(__file__).parents[2] / "deploy"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def test_kubernetes_starts_a_leader_and_a_follower(monkeypatch: pytest.MonkeyPatch) -> None:
    workers, service, policy = documents("kubernetes/leader-worker-set.yaml")
    template = workers["spec"]["leaderWorkerTemplate"]
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart", "one process lost is all lost"
    monkeypatch.setenv("LWS_GROUP_SIZE", str(template["size"]))
    monkeypatch.setenv("LWS_LEADER_ADDRESS", "jaxserve-0.jaxserve.default")
    for rank, role in enumerate(("leaderTemplate", "workerTemplate")):
        (container,) = template[role]["spec"]["containers"]
        assert SECRET in {variable["name"] for variable in container["env"]}
        monkeypatch.setenv(SECRET, "0123456789abcdef")
        monkeypatch.setenv("LWS_WORKER_INDEX", str(rank))
        command = container["command"]
        assert command[:2] == ["jaxserve", "serve"]
        config = parse_serve_args(command[2:])
        parallel = config.engine.parallel
        assert (parallel.nnodes, parallel.node_rank) == (template["size"], rank)
        assert parallel.master_addr == "jaxserve-0.jaxserve.default"
        gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
        assert parallel.tensor_parallel_size == template["size"] * gpus
        assert config.frontend.shutdown_timeout < template[role]["spec"]["terminationGracePeriodSeconds"]
        if rank == 0:
            (port,) = container["ports"]
            assert port["containerPort"] == config.frontend.port
            assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": port["name"]}
    labels = template["leaderTemplate"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert not service["spec"]["selector"].items() <= template["workerTemplate"]["metadata"]["labels"].items()
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_slurm_starts_every_task_and_asks_for_another_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun` and `scontrol` write down what they were asked; `srun` then fails, as after a lost node."""
    asked = tmp_path / "asked"
    for name, end in (("srun", 1), ("scontrol", 0)):
        program = tmp_path / name
        program.write_text(f'#!/bin/bash\necho {name} "$@" "secret=$JAXSERVE_CLUSTER_SECRET" >> {asked}\nexit {end}\n')
        program.chmod(0o755)
    (tmp_path / ".jaxserve-cluster-secret").write_text("0123456789abcdef\n")
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "SLURM_NNODES": "2", "SLURM_JOB_ID": "7",
    }
    command = ["bash", str(DEPLOY / "slurm" / "serve.sbatch"), "some/model"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1, done.stderr
    first, second = (line.split() for line in asked.read_text().splitlines())
    assert second[:3] == ["scontrol", "requeue", "7"]
    assert "--kill-on-bad-exit=1" in first and first[-1] == "secret=0123456789abcdef"
    for name, value in {
        SECRET: "0123456789abcdef", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-2]",
    }.items():
        monkeypatch.setenv(name, value)
    config = parse_serve_args(first[first.index("serve") + 1 : -1])
    parallel = config.engine.parallel
    assert (parallel.nnodes, parallel.node_rank, parallel.master_addr) == (2, 1, "n1")
    assert parallel.tensor_parallel_size == 16
    assert config.engine.model.model == "some/model" and config.frontend.port == 8000
    environment["SLURM_RESTART_COUNT"] = "3"
    asked.unlink()
    assert subprocess.run(command, env=environment, capture_output=True, timeout=30, check=False).returncode == 1
    assert "scontrol" not in asked.read_text(), "enough is enough"


def test_ray_deploys_replicas() -> None:
    ((content,),) = ([one["applications"] for one in documents("ray/replicas.yaml")],)
    (application,) = content
    module, _, name = application["import_path"].partition(":")
    assert (module, name) == ("jaxserve.replicas", "build_app")
    scaling, config = read_options(application["args"])
    assert scaling.min_replicas == 2 and scaling.max_replicas == 8
    assert config.engine.model.model == "meta-llama/Llama-3.1-8B-Instruct" and config.frontend.api_key
