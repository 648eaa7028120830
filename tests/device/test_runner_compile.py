"""Programs: what is compiled when, what a second start finds, and what happens when a step fails."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.errors import ConfigError, EngineError, StepAllocationError
from jaxserve.core.plan import StepLimits
from jaxserve.core.progress import NoProgress
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.compile import Compiler
from jaxserve.runner.executable_store import ExecutableStore
from jaxserve.runner.runner import Runner
from tests.device.plans import Driver, Entry, complete
from tests.device.tiny import prompt_of, tiny_config, tiny_params, tiny_setup, tiny_spec

SPEC = tiny_spec(is_tied=True)
SMALL, LARGE = 8, 16
# reset, admit, admit_slot, clear; forward (begin, layers, finish) and score by T; sample by B
PROGRAMS = 4 + (3 + 1) * 2 + 2


@pytest.fixture(scope="module")
def params():
    return tiny_params(SPEC)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store") / "programs"


def make(params, store) -> Runner:
    setup = tiny_setup(SPEC, params, tiny_config(store=store, tokens=LARGE, pages=32))
    return Runner.create(setup=replace(setup, buckets=_Serving(tokens=(SMALL, LARGE), rows=(2, 8))), params=params)


class _Serving(Buckets):
    """Serves from the smallest buckets, so that limits have room to grow."""

    def serving(self, *, whole_prompts: bool) -> Buckets:
        return Buckets(tokens=self.tokens[:1], rows=self.rows[:1])


@pytest.fixture(scope="module")
def runner(params, store):
    """Started on an empty store; the tests below read what its start left there."""
    runner = make(params, store)
    runner.compile_serving_set(NoProgress())
    assert runner.limits() == StepLimits(tokens_max=SMALL, samples_max=2) and not runner.is_ready
    assert complete(runner, prompt_of(5, 1), 2), "it serves before it is ready"
    told = []
    runner.compile_rest(NoProgress(), on_ready=lambda: told.append(runner.is_ready))
    assert runner.wait_ready(240) and told == [True]
    assert runner.limits() == StepLimits(tokens_max=LARGE, samples_max=8)
    yield runner
    runner.close()


def test_the_first_start_compiles_every_program_once(runner):
    stats = runner.compile_stats
    assert (stats.compiled_count, stats.loaded_count) == (PROGRAMS, 0)
    assert runner.stats.compiled_count == PROGRAMS


def test_nothing_compiles_on_the_path_of_requests(runner):
    """Admissions, slots, chunks, logprobs, scores, clearing, rebuilding: all programs are there already."""
    before = runner.stats
    runner.rebuild()
    driver = Driver(runner)
    for row in range(8):
        bias = {1: 1.0} if row < 3 else {}
        wants = SamplingParams(temperature=row / 4, logprobs=2 if row % 2 else None, logit_bias=bias)
        driver.admit(row, [row + 1, 2], wants, slot=row if row < 3 else -1)
    driver.run(*(Entry(row, [row + 1, 2], targets=[2, -1] if row == 4 else None) for row in range(8)))
    pending = [driver.launch(*(Entry(row) for row in range(8))) for _ in range(3)]
    assert all((step.result().token_A >= 0).all() for step in pending)
    driver.run(Entry(3))
    runner.clear_pages(0, np.array([1, 2, 3], np.int32))
    assert runner.stats == before
    assert before.compiled_after_ready_count == 0


def test_a_compilation_after_ready_is_counted(runner):
    before = runner.stats.compiled_after_ready_count
    jax.jit(lambda x: x * 3 + 41)(jnp.zeros(7))
    assert runner.stats.compiled_after_ready_count > before


def test_the_second_start_compiles_nothing_and_computes_the_same(runner, params, store):
    runner.rebuild()
    expected = complete(runner, prompt_of(6, 2), 4)
    second = _started(params, store)
    stats = second.compile_stats
    assert (stats.compiled_count, stats.loaded_count) == (0, PROGRAMS)
    assert complete(second, prompt_of(6, 2), 4) == expected
    second.close()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_a_damaged_entry_is_a_miss(runner, params, store, damage, caplog):
    entry = sorted((store / "executables").glob("*.exe"), key=lambda path: path.stat().st_size)[0]
    content = entry.read_bytes()
    flipped = bytearray(content)
    flipped[-100] ^= 1
    entry.write_bytes({
        "truncated": content[:-50], "flipped": bytes(flipped), "foreign": b"not ours", "empty": b""
    }[damage])
    second = _started(params, store)
    stats = second.compile_stats
    assert (stats.compiled_count, stats.loaded_count) == (1, PROGRAMS - 1)
    assert "damaged" in caplog.text
    assert len(complete(second, prompt_of(6, 2), 2)) == 2
    second.close()


def test_an_entry_that_does_not_load_is_a_miss(runner, params, store, caplog):
    """Intact on disk, yet no executable: what an incompatible jax would leave."""
    entry = sorted((store / "executables").glob("*.exe"), key=lambda path: path.stat().st_size)[0]
    ExecutableStore(store / "executables").save(entry.stem, b"\x80\x04N.")
    second = _started(params, store)
    assert second.compile_stats.compiled_count == 1
    assert "does not load" in caplog.text
    second.close()


def _started(params, store) -> Runner:
    runner = make(params, store)
    runner.compile_serving_set(NoProgress())
    runner.compile_rest(NoProgress())
    assert runner.wait_ready(240)
    return runner


def test_out_of_memory_at_launch_or_result_is_survived(runner):
    """The loop's contract: StepAllocationError, then rebuild, then everything works again."""
    prompt = prompt_of(6, 3)
    runner.rebuild()
    expected = complete(runner, prompt, 3)
    forward, message = dict(runner._builder.forward), "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes."
    for bucket in forward:
        runner._builder.forward[bucket] = _raising(message)
    driver = Driver(runner)
    driver.admit(0, prompt)
    with pytest.raises(StepAllocationError, match="123 bytes"):
        driver.launch(Entry(0, prompt))
    runner._builder.forward.update(forward)
    runner.rebuild()
    assert complete(runner, prompt, 3) == expected


def test_a_device_fault_is_fatal(runner):
    sample = dict(runner._builder.sample)
    for bucket in sample:
        runner._builder.sample[bucket] = _raising("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS")
    runner.rebuild()
    driver = Driver(runner)
    driver.admit(0, [1, 2, 3])
    with pytest.raises(EngineError, match="ILLEGAL_ADDRESS") as raised:
        driver.launch(Entry(0, [1, 2, 3]))
    assert not isinstance(raised.value, StepAllocationError)
    runner._builder.sample.update(sample)
    runner.rebuild()


def test_a_failure_that_shows_at_the_result_is_translated(runner):
    runner.rebuild()
    driver = Driver(runner)
    driver.admit(0, [1, 2, 3])
    pending = driver.launch(Entry(0, [1, 2, 3]))

    class Failing:
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    pending._sampled = pending._sampled._replace(token_B=Failing())
    with pytest.raises(StepAllocationError):
        pending.result()


def test_a_bucket_that_does_not_compile_ends_the_engine(params, store):
    """A background failure is told to the engine's thread at its next launch, and `wait_ready` raises it."""
    broken = make(params, store)
    broken.compile_serving_set(NoProgress())
    begin, *others = broken._programs.forward(LARGE)
    broken._programs.forward = lambda tokens: (replace(begin, function=_broken, name="broken"), *others)
    broken.compile_rest(NoProgress())
    with pytest.raises(EngineError, match="no such luck"):
        broken.wait_ready(240)
    assert not broken.is_ready
    driver = Driver(broken)
    driver.admit(0, [1])
    with pytest.raises(EngineError, match="no such luck"):
        driver.launch(Entry(0, [1]))
    broken.close()


def _broken(*_: object) -> None:
    raise RuntimeError("no such luck")


def _raising(message: str):
    def call(*_: object) -> None:
        raise jax.errors.JaxRuntimeError(message)

    return call


def test_the_store_is_private(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    store = ExecutableStore(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    store.save("key", b"payload")
    assert store.load("key") == b"payload" and store.load("other") is None
    (folder / "key.exe").chmod(0o666)
    assert store.load("key") is None, "someone else may have written it"
    store.save("key", b"payload")
    target = folder / "elsewhere"
    (folder / "key.exe").rename(target)
    (folder / "key.exe").symlink_to(target)
    assert store.load("key") is None, "a link is not followed"
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ConfigError, match="no link"):
        ExecutableStore(tmp_path / "link")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="compilation-cache-dir"):
        ExecutableStore(tmp_path / "file")


def test_the_store_forgets_what_is_longest_unused(tmp_path):
    store = ExecutableStore(tmp_path / "store", bytes_max=1100)      # three entries of 354 bytes
    for index in range(3):
        store.save(f"k{index}", bytes(300))
        os.utime(tmp_path / "store" / f"k{index}.exe", (index, index))
    assert store.load("k0") is not None, "which makes it the newest"
    store.save("k3", bytes(300))
    assert [store.load(f"k{index}") is not None for index in range(4)] == [True, False, True, True]


def test_a_gpu_without_memory_to_try_kernels_in_compiles_without_trying():
    asked = []

    class Lowered:
        def compile(self, compiler_options):
            asked.append(compiler_options)
            if len(asked) < 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return "executable"

    for platform in ("gpu", "cpu"):
        compiler = Compiler(None, (SimpleNamespace(platform=platform),))
        asked.clear()
        if platform == "gpu":
            assert compiler._compiled(Lowered(), "forward") == ("executable", False), "which no later start shall take"
            assert asked == [None, {"xla_gpu_autotune_level": 0}]
        else:
            with pytest.raises(jax.errors.JaxRuntimeError):
                compiler._compiled(Lowered(), "forward")
    options = {"xla_gpu_autotune_level": 0}     # one that this jax knows
    assert jax.jit(lambda x: x + 1).lower(1).compile(compiler_options=options)(1) == 2
