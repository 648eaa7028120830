"""Who attends on a GPU where nobody was named: what is tried, how it is judged, that a bad kernel costs no start."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.core.config import CompilationConfig, EngineConfig, ModelConfig
from jaxserve.core.model_spec import Global
from jaxserve.models.registry import read_spec, spec_from_config
from jaxserve.runner import start, trial, trial_step
from jaxserve.runner.setup import RunnerSetup
from jaxserve.runner.trial import CANDIDATES, Outcome
from jaxserve.runner.trial_step import AttentionLayer, Entries, Finding
from kernels_pallas.quantized import QuantizedPages
from scripts.published_models import LATENT
from tests.device.fixture_models import FIXTURES
from tests.device.interpreted_kernels import interpret
from tests.device.tiny import tiny_config, tiny_params, tiny_setup, tiny_spec

LAYER = AttentionLayer(
    layers=2, head_count=4, kv_head_count=2, head_dim=64, scale=0.125, window=None, soft_cap=None, has_sinks=False,
    value_dim=None, page_size=16, dtype="bfloat16", codes=None,
)
SMALL = Entries(starts=(0, 15, 16, 40, 20), counts=(1, 1, 1, 1, 9), decodes=4)
RIGHT, WRONG = Finding(error=0.004, ms=1.0, xla_ms=5.0), Finding(error=0.5, ms=0.1, xla_ms=5.0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that an interpreter gets through, and no clock."""
    monkeypatch.setattr(trial_step, "mixed", lambda _: SMALL)
    monkeypatch.setattr(trial_step, "milliseconds", lambda *_: 1.0)


@pytest.fixture
def setup(tmp_path: Path) -> RunnerSetup:
    spec = tiny_spec()
    return tiny_setup(spec, tiny_params(spec), tiny_config(store=tmp_path))


def on_hopper() -> Any:
    """An H200 that is not there, for what asks only which device is compiled for."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=auto, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


LAYERS = {
    "plain": LAYER,
    "window, sinks": replace(LAYER, window=20, has_sinks=True),
    "soft cap": replace(LAYER, soft_cap=30.0),
    "int8 pages": replace(LAYER, codes="int8"),
    "latent": replace(LAYER, kv_head_count=1, head_dim=80, value_dim=64),
}
QUICK = ("latent",)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYERS]
)
def test_a_kernel_that_is_right_is_found_right(name: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's, interpreted, beside XLA's loops; NaN lies wherever no token may look."""
    traced = interpret(monkeypatch.setattr)
    found = trial_step.find("triton", LAYERS[name])
    assert {"paged_decode", "paged_prefill"} <= traced.keys() and found.error <= trial.ERROR_MAX / 2


@pytest.mark.parametrize("codes", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_one_that_looks_where_no_token_may_is_found_out(
    codes: str | None, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*arguments: Any, implementation: str, attend: Any = trial_step.paged.attend, **options: Any) -> Any:
        if implementation == "greedy":      # its rows are two tokens longer than they are
            context = arguments[4]
            work = replace(context.work, decode_length_W=context.work.decode_length_W + 2)
            arguments = (*arguments[:4], context.replace(work=work), *arguments[5:])
        return attend(*arguments, implementation="reference" if implementation == "greedy" else "xla", **options)

    monkeypatch.setattr(trial_step.paged, "attend", greedy)
    assert trial_step.find("greedy", replace(LAYER, codes=codes)).error == float("inf")


@pytest.mark.parametrize("codes", [None, "int8"])
def test_pages_hold_numbers_where_tokens_were_and_nowhere_else(codes: str | None) -> None:
    _, _, _, kv, context = trial_step.arrays_of(replace(LAYER, codes=codes), SMALL)
    pages = kv.k_PKSH.scale_PKS if isinstance(kv.k_PKSH, QuantizedPages) else kv.k_PKSH[..., 0]
    is_number_PS = np.isfinite(np.asarray(pages[:, 0], np.float32))
    assert is_number_PS.sum() == sum(SMALL.starts) and not is_number_PS[-1].any()
    page_RM = np.asarray(context.page_RM[0])
    for row, old in enumerate(SMALL.starts):
        assert is_number_PS[page_RM[row]].ravel()[:old].all() and not is_number_PS[page_RM[row]].ravel()[old:].any()


def test_layers_are_those_of_the_model_equal_ones_once(setup: RunnerSetup) -> None:
    assert [layer.layers for layer in trial.layers_of(setup)] == [2]
    window = replace(setup, spec=read_spec(FIXTURES / "tiny-qwen2-window"))
    found = trial.layers_of(window)
    assert sum(layer.layers for layer in found) == len(window.spec.layers)
    spans = [layer.attention.span for layer in window.spec.layers]
    assert {layer.window for layer in found} == {None if isinstance(span, Global) else span.size for span in spans}
    latent = replace(setup, spec=spec_from_config(LATENT["DeepSeek-V2-Lite"]), kv_codes="int8")
    (asked,) = trial.layers_of(latent)
    assert (asked.layers, asked.head_dim, asked.value_dim, asked.kv_head_count) == (27, 576, 512, 1)
    assert asked.codes == "int8"


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax >= 0.11")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_only_who_could_serve_every_layer_is_tried() -> None:
    assert not any(trial.serves(name, (LAYER,)) for name in CANDIDATES), "a CPU"
    odd = replace(LAYER, head_dim=80)
    with on_hopper():
        assert all(trial.serves(name, (LAYER,)) for name in CANDIDATES)
        assert not any(trial.serves(name, (LAYER, odd)) for name in CANDIDATES)
        eight_bits = replace(LAYER, codes="float8_e4m3fn")
        assert [trial.serves(name, (eight_bits,)) for name in CANDIDATES] == [True, False]


@pytest.mark.parametrize(("outcomes", "chosen", "said"), [
    ({"a": Outcome(findings=(RIGHT,))}, "a", "a 2.00 ms, xla 10.00 ms"),
    ({"a": Outcome(findings=(RIGHT,)), "b": Outcome(findings=(replace(RIGHT, ms=0.5),))}, "b", "b 1.00 ms"),
    ({"a": Outcome(findings=(WRONG,)), "b": Outcome(findings=(RIGHT,))}, "b", "a is off by 0.5"),
    ({"a": Outcome(findings=(replace(RIGHT, error=float("inf")),))}, None, "off by inf"),
    ({"a": Outcome(findings=(replace(RIGHT, error=float("nan")),))}, None, "off by nan"),
    ({"a": Outcome(findings=(replace(RIGHT, ms=6.0),))}, None, "a 12.00 ms, xla 10.00 ms"),
    ({"a": Outcome(failure="took longer than 9 s")}, None, "a took longer"),
])
def test_the_fastest_that_is_right_serves(outcomes: dict[str, Outcome], chosen: str | None, said: str) -> None:
    name, why = trial.judge((LAYER,), outcomes)
    assert name == chosen and said in why


def test_no_layer_hides_behind_another() -> None:
    sick = replace(RIGHT, error=float("nan"))
    for findings in ((RIGHT, sick), (sick, RIGHT), (RIGHT, WRONG)):
        assert trial.judge((LAYER, LAYER), {"a": Outcome(findings=findings)})[0] is None


def test_a_trial_takes_little_memory() -> None:
    many = replace(LAYER, kv_head_count=32, head_count=32, head_dim=128)
    assert trial_step.decodes(LAYER).decodes == 64 and trial_step.decodes(many).decodes == 8


def test_layers_count_as_often_as_they_are() -> None:
    """Fast in one layer and slow in nine is slow."""
    layers = (replace(LAYER, layers=1), replace(LAYER, layers=9, window=20))
    fast, slow = replace(RIGHT, ms=0.1), replace(RIGHT, ms=5.6)
    assert trial.judge(layers, {"a": Outcome(findings=(fast, slow))})[0] is None
    assert trial.judge(layers, {"a": Outcome(findings=(slow, fast))})[0] == "a"


def test_what_was_found_is_kept_and_what_may_end_otherwise_is_not(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "serves", lambda name, _: name == "triton")
    tried: list[str] = []

    def answering(outcome: Outcome) -> trial.Try:
        def run(name: str, layers: tuple[AttentionLayer, ...]) -> Outcome:
            tried.append(name)
            return outcome

        return run

    out_of_memory = Outcome(failure="failed: RESOURCE_EXHAUSTED", is_final=False)
    assert trial.fastest(setup, answering(out_of_memory)) is None
    assert trial.fastest(setup, answering(Outcome(findings=(RIGHT,)))) == "triton"
    assert trial.fastest(setup, answering(Outcome(failure="unasked"))) == "triton" and tried == ["triton"] * 2
    monkeypatch.setattr(trial, "serves", lambda *_: True)
    assert trial.fastest(replace(setup, kv_codes="int8"), answering(Outcome(failure="hung"))) is None, "another key"
    assert tried[2:] == ["mosaic_gpu"]


def test_processes_answer_or_die_and_never_take_the_start_along() -> None:
    """Real ones: XLA beside itself, kernels that want a GPU, and one that is too late."""
    layer = replace(LAYER, head_count=2, kv_head_count=1, head_dim=16, dtype="float32")
    (found,) = trial.run_in_process("xla", (layer,)).findings
    assert found.error == 0 and found.ms > 0 and found.xla_ms > 0
    dead = trial.run_in_process("mosaic_gpu", (layer,))
    assert "failed (exit status 1): NoImplementationError: paged_decode: no impl" in dead.failure
    assert not dead.is_final, "the process found no GPU"
    late = trial.run_in_process("xla", (layer,), timeout_s=0.01)
    assert late.failure == "took longer than 0 s" and late.is_final
    orphan = subprocess.run(
        [sys.executable, "-m", "jaxserve.runner.trial_step", "xla", "0.2"], input=json.dumps([asdict(layer)]),
        text=True, capture_output=True, timeout=60, check=False,
    )
    assert orphan.returncode == -signal.SIGALRM, "nobody waited, and it ended"


@pytest.mark.parametrize(("compilation", "is_cpu", "expected"), [
    (CompilationConfig(), False, ["triton"]), (CompilationConfig(), True, []),
    (CompilationConfig(attention_backend="xla"), False, []), (CompilationConfig(batch_invariant=True), False, []),
])
def test_a_start_asks_on_gpus_where_nobody_is_named(
    setup: RunnerSetup, compilation: CompilationConfig, is_cpu: bool, expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor where results must not depend on the batch: kernels cut contexts by what else there is."""
    asked: list[str] = []

    def fastest(setup: RunnerSetup) -> str:
        asked.append("triton")
        return "triton"

    monkeypatch.setattr(trial, "fastest", fastest)
    config = EngineConfig(model=ModelConfig(model="tiny"), compilation=compilation)
    given = replace(setup, attention=None if compilation.attention_backend == "auto" else "xla")
    assert start.choose_attention(config, given, is_cpu=is_cpu) == (expected or [given.attention])[0]
    assert asked == expected
