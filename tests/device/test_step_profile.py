"""Traces read like the source: operations carry their named scopes, and time is counted once."""

import gzip
import json

import jax
import jax.numpy as jnp

from jaxserve.runner.trace import scopes_of
from scripts.step_profile import OTHER, _own_times, busy_ms, by_scope, on_streams, profiled


def _twice(x):
    with jax.named_scope("layer_0/mlp.down"):
        y = jnp.tanh(x @ x)
    with jax.named_scope("layer_1/mlp.down"):
        return jnp.tanh(y @ x)


def test_operations_are_named_as_in_the_source_and_layers_added_up(tmp_path):
    x = jnp.ones((64, 64))
    executable = jax.jit(_twice).lower(x).compile()
    scopes = scopes_of([executable])
    assert any(scope.startswith("layer_1/mlp.down/") for scope in scopes.values())
    found = profiled(lambda: executable(x).block_until_ready(), 3, tmp_path / "out", scopes)
    (program,) = found
    assert "_twice" in program and found[program]
    assert all(ms > 0 for ms in found[program].values())
    assert any(scope.startswith("mlp.down/") for scope in found[program]), found
    trace = json.loads(gzip.decompress((tmp_path / "out" / "steps.trace.json.gz").read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert any(name.startswith("layer_0/mlp.down/") for name in names) and not any(n.startswith("end: ") for n in names)


def test_an_operation_counts_without_those_inside_it():
    def event(name, ts, dur, tid=1):
        return {"name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid}

    events = [event("loop", 0, 10), event("a", 1, 4), event("b", 5, 3), event("c", 6, 1), event("other", 2, 5, tid=2)]
    own = {event["name"]: own_us for event, own_us in _own_times(events)}
    assert own == {"loop": 3, "a": 4, "b": 2, "c": 1, "other": 5}


def test_of_a_gpu_what_its_streams_ran_counts_once_named_or_not():
    def named(kind, name, pid, tid=0):
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}

    def event(name, ts, dur, tid, pid=1, **args):
        return {"ph": "X", "name": name, "ts": ts, "dur": dur, "pid": pid, "tid": tid, "args": args}

    stream, ops, copies = 16, 17, 18
    events = [
        named("process_name", "/device:GPU:0", 1), named("process_name", "/host:CPU", 2),
        named("thread_name", "Stream #16(Compute,Memset)", 1, stream), named("thread_name", "XLA Ops", 1, ops),
        named("thread_name", "Stream #18(MemcpyD2H)", 1, copies), named("thread_name", "Stream #1", 2, 1),
        event("layer_3/mlp", 0, 1000, stream, hlo_op="fusion", hlo_module="jit_layers"),
        event("kernel_of_a_graph", 1000, 500, stream, correlation_id=7),
        event("layer_3/mlp", 0, 1500, ops, hlo_op="fusion", hlo_module="jit_layers"),
        event("MemcpyD2H", 1400, 300, copies), event("ThunkExecutor", 0, 9000, 1, pid=2, hlo_op="x", hlo_module="y"),
    ]
    ran = on_streams(events)
    assert [one["name"] for one in ran] == ["layer_3/mlp", "kernel_of_a_graph", "MemcpyD2H"]
    assert busy_ms(ran, 2) == 0.85
    assert by_scope(ran, 1) == {"layers": {"mlp": 1.0}, OTHER: {"kernel_of_a_graph": 0.5, "MemcpyD2H": 0.3}}
    assert on_streams([one for one in events if one["pid"] == 2]) == []
