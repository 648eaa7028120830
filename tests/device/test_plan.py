"""`jaxserve plan`: its bytes are a start's, its messages the programs', its refusals honest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxserve.core.config import EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from jaxserve.core.errors import ConfigError
from jaxserve.flags import engine_config_from_kwargs
from jaxserve.launch import build_engine
from jaxserve.models.registry import read_spec
from jaxserve.plan.__main__ import main
from jaxserve.plan.devices import KINDS, Devices, kind, parse_devices
from jaxserve.plan.planner import Plan, Question, Refusal, plan_or_refuse
from jaxserve.plan.roofline import Roofline, Step, messages
from jaxserve.plan.sizes import Sized, Sizer
from jaxserve.plan.temporaries import estimate
from jaxserve.runner.programs import ProgramSet
from jaxserve.runner.setup import RunnerSetup
from scripts.write_plan import GUIDE, PAGE, guide_sections, sections, written
from tests.device.hub_configs import HUB

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHAPES = Path(__file__).parents[2] / "configs" / "shapes"
H200 = kind("H200")


def no_temporaries(*_: Any) -> int:
    return 0


def sizer_of(folder: Path, content: dict[str, Any] | None = None) -> Sizer:
    """From a config.json alone, which is written first if its content is given."""
    if content is not None:
        (folder / "config.json").write_text(json.dumps(content))
    return Sizer(spec=read_spec(folder), folder=folder)


def sized(sizer: Sizer, count: int = 1, *, whole_experts: bool = False, rows: int = 8) -> Sized:
    config = EngineConfig(
        model=ModelConfig(model="m", dtype="bfloat16"),
        scheduler=SchedulerConfig(max_num_seqs=rows, max_num_batched_tokens=64),
        parallel=ParallelConfig(tensor_parallel_size=count, enable_expert_parallel=whole_experts),
    )
    return sizer.size(config, H200, no_temporaries)


@pytest.mark.parametrize(
    "name", ["tiny-qwen2-window", pytest.param("families/deepseek-v3", marks=pytest.mark.slow)]
)
def test_weights_and_pages_are_those_of_a_real_start(name: str, tmp_path: Path):
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "enforce_eager": True, "dtype": "float32"}
    config = engine_config_from_kwargs(str(FIXTURES / name), compilation_cache_dir=str(tmp_path), **options)
    planned = sizer_of(FIXTURES / name).size(config, kind("CPU"), no_temporaries).setup
    engine = build_engine(config)
    try:
        real, leaves, state = engine.runner._setup, engine.runner._leaves, engine.runner._state
        assert planned.memory == real.memory and planned.shape == real.shape and planned.buckets == real.buckets
        held = (leaves.begin, leaves.segments, leaves.finish, engine.runner._head_leaves)
        arrays = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(held)}
        assert planned.memory.weight_bytes == engine.report.weight_bytes == sum(arrays.values())
        assert planned.memory.pool_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state.kv))
    finally:
        engine.close()


def collectives(jaxpr: Any) -> Iterator[tuple[str, int]]:
    """Name and bytes of every message that a traced program sends."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name.startswith(("psum", "all_")):
            yield name.split("_invariant")[0], sum(v.aval.size * v.aval.dtype.itemsize for v in equation.invars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from collectives(inner)


@pytest.mark.parametrize(
    ("name", "whole_experts"),
    [("tiny-qwen2", False), ("families/olmo2", False), ("families/deepseek-v3", True), ("families/qwen2-moe", False)],
)
def test_the_messages_are_those_of_the_programs(name: str, whole_experts: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RunnerSetup, "platform", property(lambda _: "cpu"))     # the mesh has no devices to ask
    of = sized(sizer_of(FIXTURES / name), 2, whole_experts=whole_experts)
    programs, tokens, rows = ProgramSet(of.setup, of.params[0]), 64, 8
    forward, found = programs.forward(tokens), Counter[str]()
    counts = Counter(segment.kind for segment in programs.segments)
    times = [1, *(counts[number] for number in sorted(counts)), 1]
    for program, count in [*zip(forward, times, strict=True), (programs.sample(rows), 1)]:
        traced = jax.make_jaxpr(program.function)(*program.arguments)
        for kind_, size in collectives(traced.jaxpr):
            found[kind_] += count * size
            found["count"] += count
    sent = messages(of, Step(tokens=tokens, samples=rows, context=1))
    assert found == {
        "psum": sent.reduce_bytes, "all_to_all": sent.logits_bytes, "all_gather": sent.gather_bytes // 2,
        "count": sent.count,
    }, sent


def test_a_decode_reads_every_weight_once_and_multiplies_by_each(tmp_path: Path):
    of = sized(sizer_of(tmp_path, HUB["Llama-3.1-8B"]))
    devices = Devices(kind=H200, per_host=1)
    bound = Roofline(sized=of, devices=devices).bound(Step.decode(1, 1))
    assert bound is not None and bound.messages_s == 0 and bound.limit == "memory"
    multiplied = 8_030_261_248 - 128_256 * 4096      # all but the embedding
    assert bound.read_s * 4.8e12 == pytest.approx(2 * multiplied, rel=1e-3)
    assert bound.multiply_s * 989.5e12 == pytest.approx(2 * multiplied, rel=1e-3)
    long = Roofline(sized=of, devices=devices).bound(Step.decode(16, 8192))
    assert long is not None
    assert (long.read_s - bound.read_s) * 4.8e12 == pytest.approx(16 * 8192 * 131_072, rel=1e-3), "128 KiB a token"


def test_few_tokens_touch_few_experts(tmp_path: Path):
    of, devices = sized(sizer_of(tmp_path, HUB["Mixtral-8x7B"])), Devices(kind=H200, per_host=1)

    def read(batch: int) -> float:
        bound = Roofline(sized=of, devices=devices).bound(Step.decode(batch, 1))
        assert bound is not None
        return bound.read_s * 4.8e12

    experts = 32 * 8 * 3 * 4096 * 14336 * 2
    assert read(64) - read(1) == pytest.approx(0.75 * experts, rel=0.01), "two experts of eight, then all"


LLAMA = HUB["Llama-3.1-8B"]
WIDE = LLAMA | {     # more than an L4 holds, in few layers
    "hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_hidden_layers": 3,
}


def answer(folder: Path, content: dict[str, Any], devices: str, **changes: Any) -> Plan | Refusal:
    where = parse_devices(devices)
    config = engine_config_from_kwargs("m", **{"tensor_parallel_size": where.count} | changes)
    question = Question(model="m", config=config, devices=where)
    return plan_or_refuse(question, sizer_of(folder, content), estimate, "formula", None, estimate)


def test_more_devices_hold_more_and_replicas_multiply(tmp_path: Path):
    one, eight = answer(tmp_path, LLAMA, "H200"), answer(tmp_path, LLAMA, "8xH200")
    replicas = answer(tmp_path, LLAMA, "8xH200", tensor_parallel_size=1)
    assert isinstance(one, Plan) and isinstance(eight, Plan) and isinstance(replicas, Plan)
    norms = 2 * 65 * 4096
    assert (eight.memory.weight_bytes - norms) * 8 == one.memory.weight_bytes - norms
    assert eight.memory.page_bytes * 8 == one.memory.page_bytes
    assert eight.memory.concurrency > 8 * one.memory.concurrency
    assert replicas.question.replicas == 8 and replicas.memory == one.memory
    far = answer(tmp_path, LLAMA, "2x4xH200")
    assert isinstance(far, Plan) and far.memory == eight.memory
    assert far.decode[0].seconds > eight.decode[0].seconds, "messages between machines are slower"


def test_what_does_not_fit_says_why_and_what_would(tmp_path: Path):
    refused = answer(tmp_path, WIDE, "L4")
    assert isinstance(refused, Refusal) and "nothing is left for KV pages" in refused.reason
    assert "weights" in refused.reason
    same, more = refused.nearest
    assert same.words == "--quantization int8" and more.words == "--devices 2xL4"
    again = answer(tmp_path, WIDE, "L4", quantization="int8")
    assert isinstance(again, Plan) and again.memory == same.plan.memory and again.fits == same.plan.fits
    assert again.sized.quantization == "int8: 12 matrices", "it says what is packed"


def test_splitting_comes_before_shortening(tmp_path: Path):
    refused = answer(tmp_path, LLAMA, "4xL4", tensor_parallel_size=1, max_model_len=100_000)
    assert isinstance(refused, Refusal) and "lower --max-model-len to at most" in refused.reason
    assert refused.nearest[0].words == "--tensor-parallel-size 2"
    assert refused.nearest[0].plan.memory.length_max == 100_000


def test_every_device_is_described_wholly_or_not_at_all():
    for one in KINDS:
        figures = (one.bandwidth, one.bfloat16, one.int8, one.float32, one.link, one.network)
        assert any(figures) != one.is_cpu and all(figures) != one.is_cpu, one.name
    assert kind("a100 80g") is kind("A100-80G") and kind("rtx-4090").name == "RTX4090"
    assert parse_devices("2x8xH200") == Devices(kind=H200, per_host=8, hosts=2)
    with pytest.raises(ConfigError, match="unknown device 'H300'; did you mean H200\\? Known are H200, H100"):
        parse_devices("8xH300")
    for wrong in ("", "8x", "0xH200", "8*H200", "9999xH200"):
        with pytest.raises(ConfigError):
            parse_devices(wrong)


def test_the_command(capsys: pytest.CaptureFixture[str]):
    words = [str(FIXTURES / "tiny-llama3"), "--temporaries", "formula"]
    assert main([*words, "--devices", "2xL4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["tensor_parallel_size"] == 2 and found["replicas"] == 1
    assert found["per_device"]["kv_pages"][0]["bytes"] > 0 and found["decode"][0]["messages"]["count"] > 0
    assert main([*words, "--devices=2xL4", "-tp", "1"]) == 0
    shown = capsys.readouterr().out
    assert "2 replica(s) of 1 device(s)" in shown and "nothing here was measured" in shown
    assert main([*words, "--devices", "L4", "--max-model-len", "100000000"]) == 1
    assert main([*words, "--devices", "3xL4", "-tp", "2"]) == 2
    assert "does not divide the 3 devices" in capsys.readouterr().err
    assert main(words) == 2 and "--devices 8xH200" in capsys.readouterr().err
    assert main([*words, "--devices", "MI300X", "--temporaries", "compile"]) in (1, 2)
    assert "no compiler for MI300X" in capsys.readouterr().err


def test_shipped_shapes_are_models(capsys: pytest.CaptureFixture[str]):
    folders = sorted(SHAPES.iterdir())
    assert len(folders) >= 4
    counts = {folder.name: len(read_spec(folder).layers) for folder in folders}
    assert counts["meta-llama--Llama-3.1-405B-Instruct"] == 126 and counts["DeepSeek-V3-bf16"] == 61
    assert main(["--config", "llama3-70b.yaml", "--devices", "8xH200", "--hf-overrides.num_hidden_layers", "2",
                 "--temporaries", "formula", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "meta-llama/Llama-3.1-70B-Instruct"


@pytest.mark.slow
@pytest.mark.parametrize(("page", "computed"), [(PAGE, sections), (GUIDE, guide_sections)])
def test_the_page_is_what_this_version_computes(page: Path, computed: Callable[[], Iterable[tuple[str, str]]]):
    assert page.read_text(encoding="utf-8") == written(page.read_text(encoding="utf-8"), computed()), "run `make docs`"


def test_the_formula_is_above_what_the_compiler_said():
    """Of docs/plan.md's table, without the compiler."""
    said = (("8B", "H200", 980_185_248), ("70B", "8xH200", 507_485_152))
    for name, devices, compiled in said:
        folder = SHAPES / f"meta-llama--Llama-3.1-{name}-Instruct"
        config = engine_config_from_kwargs("m", tensor_parallel_size=parse_devices(devices).count, hf_overrides={})
        memory = sizer_of(folder).size(config, H200, estimate).setup.memory
        assert compiled < memory.temporary_bytes < 1.4 * compiled
