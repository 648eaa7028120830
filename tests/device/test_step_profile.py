"""Traces read like the source: operations carry their named scopes, and time is counted once."""

import gzip
import json

import jax
import jax.numpy as jnp

from jaxserve.runner.trace import scopes_of
from scripts.step_profile import _own_times, profiled


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
