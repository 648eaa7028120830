"""Who attends on a GPU where nobody was named: tried on that GPU when it first meets such a model, not assumed.

Each kernel that could serve all layers runs steps of them in a process of its own with a time limit, beside XLA's
loops. The fastest that gives XLA's results serves; what was found is kept beside the compiled programs.
Knows what layers ask for and how an answer is judged; `runner.trial_step` is what runs.
Invariant: a kernel that errs, dies or hangs costs its time limit at most and never the server, and nobody is chosen
who was not seen to be right on this device.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

import jax

from jaxserve.core.model_spec import LatentAttention, LayerSpec, SlidingWindow
from jaxserve.runner.compile import environment
from jaxserve.runner.setup import RunnerSetup
from jaxserve.runner.trial_step import AttentionLayer, Finding, arrays_of, call_of, decodes
from kernels_pallas.contract import NoImplementationError

logger = logging.getLogger("jaxserve.start")

CANDIDATES = ("mosaic_gpu", "triton")
ERROR_MAX = 0.02        # beside XLA's, of the largest value; outputs and weights rounded to 16 bits make up to 0.006
TRIAL_S_MAX = 120.0     # of one candidate: its process starts, compiles some ten programs and runs them
SAID = 300              # characters of what a process said last

# What another start may end otherwise: memory, or a device that this process alone could have.
PASSING = ("RESOURCE_EXHAUSTED", "out of memory", "OUT_OF_MEMORY", "the target is 'cpu'")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of one candidate: a finding a kind of layer, or why there is none.

    Attributes:
      is_final: another trial would not end otherwise.
    """

    findings: tuple[Finding, ...] = ()
    failure: str = ""
    is_final: bool = True


Try = Callable[[str, tuple[AttentionLayer, ...]], Outcome]


def fastest(setup: RunnerSetup, run: Try | None = None) -> str | None:
    """The candidate to attend with, or None for XLA, which needs no name. Says so in the log."""
    layers = layers_of(setup)
    # Triton refuses some sizes of pools of codes, and how large the pool will be is not known yet.
    candidates = [name for name in CANDIDATES if not (setup.kv_codes and name == "triton") and serves(name, layers)]
    if not candidates:
        return None
    if setup.spans_processes:
        logger.info("attention is XLA's: kernels are not tried on several machines; --attention-backend names one")
        return None
    key, store, device = _key(setup, layers), setup.store, setup.devices[0]
    kept = store.load(key) if store is not None else None
    if kept is None:
        logger.info("attention: trying %s on %s", " and ".join(candidates), device.device_kind)
        run = run or partial(run_in_process, device=device.local_hardware_id or 0)
        outcomes = {name: run(name, layers) for name in candidates}
        name, why = judge(layers, outcomes)
        answer = json.dumps({"name": name, "why": why}).encode()
        kept = store.load(key) if store is not None else None     # another engine of this server may have been quicker
        if kept is None and store is not None and all(outcome.is_final for outcome in outcomes.values()):
            store.save(key, answer)
        kept = kept or answer
    found = json.loads(kept)
    logger.info("attention: %s (%s)", found["name"] or "xla", found["why"])
    return found["name"]


def layers_of(setup: RunnerSetup) -> tuple[AttentionLayer, ...]:
    """What the layers of the model, and of the one that drafts, ask of attention on one device; equal ones once."""
    specs = [setup.spec, *([] if setup.draft is None else [setup.draft.spec])]
    found = Counter(_asked(layer, setup) for spec in specs for layer in spec.layers)
    return tuple(replace(layer, layers=count) for layer, count in found.items())


def _asked(layer: LayerSpec, setup: RunnerSetup) -> AttentionLayer:
    attention = layer.attention
    window = attention.span.size if isinstance(attention.span, SlidingWindow) else None
    common = partial(
        AttentionLayer, layers=1, head_count=attention.head_count, scale=attention.scale, window=window,
        page_size=setup.shape.page_size, dtype=setup.dtype.name, codes=setup.kv_codes,
    )
    if isinstance(attention, LatentAttention):
        return common(
            kv_head_count=1, head_dim=attention.latent_dim + attention.rope_dim, soft_cap=None, has_sinks=False,
            value_dim=attention.latent_dim,
        )
    return common(
        kv_head_count=attention.kv_head_count, head_dim=attention.head_dim, soft_cap=attention.soft_cap,
        has_sinks=attention.has_sinks, value_dim=None,
    )


def serves(name: str, layers: tuple[AttentionLayer, ...]) -> bool:
    """Whether an implementation takes all these layers here: traced, not run."""
    try:
        for layer in layers:
            arrays = jax.eval_shape(partial(arrays_of, layer, decodes(layer)))
            jax.eval_shape(partial(call_of(layer), implementation=name), *arrays)
    except NoImplementationError:
        return False
    return True


def judge(layers: tuple[AttentionLayer, ...], outcomes: Mapping[str, Outcome]) -> tuple[str | None, str]:
    """The fastest candidate that is right everywhere and faster than XLA, else None; and why, for people."""
    best, best_ms, said = None, float("inf"), []
    for name, outcome in outcomes.items():
        if outcome.failure:
            said.append(f"{name} {outcome.failure}")
            continue
        errors = [finding.error for finding in outcome.findings]
        pairs = list(zip(layers, outcome.findings, strict=True))
        ms, xla_ms = (sum(layer.layers * time(finding) for layer, finding in pairs) for time in (_ms, _xla_ms))
        if not all(error <= ERROR_MAX for error in errors):
            said.append(f"{name} is off by {', '.join(f'{error:.3g}' for error in errors)} of the largest value, "
                        f"{ERROR_MAX} is allowed")
            continue
        said.append(f"{name} {ms:.2f} ms, xla {xla_ms:.2f} ms for a step of decodes and one of a chunk")
        if ms < min(best_ms, xla_ms):
            best, best_ms = name, ms
    return best, "; ".join(said)


def _ms(finding: Finding) -> float:
    return finding.ms


def _xla_ms(finding: Finding) -> float:
    return finding.xla_ms


def run_in_process(
    name: str, layers: tuple[AttentionLayer, ...], *, device: int = 0, timeout_s: float = TRIAL_S_MAX
) -> Outcome:
    """One candidate in a process of its own, on that device, with memory as it needs it of what this process left."""
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    own |= {f"JAX_{kind}_VISIBLE_DEVICES": str(device) for kind in ("CUDA", "ROCM")}
    command = [sys.executable, "-m", "jaxserve.runner.trial_step", name, str(timeout_s)]
    try:
        done = subprocess.run(
            command, input=json.dumps([asdict(layer) for layer in layers]), capture_output=True, text=True,
            timeout=timeout_s, env=os.environ | own, check=False,
        )
    except subprocess.TimeoutExpired:
        return Outcome(failure=f"took longer than {timeout_s:.0f} s")
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        is_final = not any(words in said for words in PASSING)
        return Outcome(failure=f"failed (exit status {done.returncode}): {said[:SAID]}", is_final=is_final)
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
        return Outcome(findings=tuple(Finding(**each) for each in found))
    except (IndexError, TypeError, ValueError):
        return Outcome(failure=f"printed no findings: {done.stdout.strip()[-SAID:]!r}")


def _key(setup: RunnerSetup, layers: tuple[AttentionLayer, ...]) -> str:
    return hashlib.sha256("\n".join(["attention", environment(setup.devices), repr(layers)]).encode()).hexdigest()
