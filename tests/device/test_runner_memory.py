"""How memory is shared out, and how buckets are chosen: arithmetic only."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
import pytest

from jaxserve.core.config import CacheConfig, EngineConfig, ModelConfig
from jaxserve.core.errors import CapacityError, ConfigError
from jaxserve.launch import _set_allocator
from jaxserve.runner.buckets import Buckets, choose_buckets, holder
from jaxserve.runner.memory import Budget, grant_pages, tightest
from jaxserve.runner.start import plan_memory
from kernels_pallas.native import api as native
from tests.device.tiny import PAGE_SIZE, tiny_config, tiny_mesh, tiny_params, tiny_setup, tiny_spec

MIB = 1 << 20
PAGE_BYTES = 2 * 2 * 2 * 16 * 16 * 2        # the tiny model's pages of 16 slots in two bytes: 4096


def grant(**changes: object):
    wanted: dict[str, object] = {
        "spec": tiny_spec(), "budget": Budget(total_bytes=100 * MIB, budget_bytes=90 * MIB, reserve_bytes=10 * MIB),
        "weight_bytes": 50 * MIB, "temporary_bytes": 10 * MIB, "state_bytes": MIB, "page_size": 16, "itemsize": 2,
        "row_count": 10_000, "tokens_max": 512, "length_wanted": None, "pool_bytes_wanted": None,
    }
    return grant_pages(**(wanted | changes))  # type: ignore[arg-type]


def test_the_pool_is_what_is_left_on_a_coarse_grid():
    table = grant()
    assert table.page_bytes == PAGE_BYTES
    assert table.left_bytes == 19 * MIB
    assert table.groups[0].page_count == 4864, "19 MiB / 4 KiB = 4864 = 19 * 256: five bits"
    assert grant(weight_bytes=50 * MIB - 100_000).groups == table.groups, "a little more free, the same shapes"
    assert table.pool_bytes <= table.left_bytes
    assert table.length_max == 64 and table.concurrency == 4864 * 16 / 64


def test_no_more_pages_than_sequences_can_use():
    assert grant(row_count=3).groups[0].page_count == 3 * 4


def test_a_given_pool_size_is_obeyed_or_refused():
    assert grant(pool_bytes_wanted=100 * PAGE_BYTES).groups[0].page_count == 100
    with pytest.raises(CapacityError, match="does not fit: 19,922,944 bytes are left"):
        grant(pool_bytes_wanted=20 * MIB)
    with pytest.raises(CapacityError, match="less than one page"):
        grant(pool_bytes_wanted=100)


def test_the_longest_sequence_is_what_fits():
    assert grant(pool_bytes_wanted=2 * PAGE_BYTES).length_max == 32
    with pytest.raises(CapacityError, match="at most 32") as refused:
        grant(pool_bytes_wanted=2 * PAGE_BYTES, length_wanted=60)
    assert "weights" in str(refused.value) and "KV pages" in str(refused.value), "the refusal carries the table"


def test_a_model_that_does_not_fit_is_refused_with_the_table():
    with pytest.raises(CapacityError, match="nothing is left for KV pages") as refused:
        grant(weight_bytes=80 * MIB)
    assert "weights" in str(refused.value) and "reserve" in str(refused.value)


def test_a_default_pool_yields_to_what_is_left():
    budget = Budget(total_bytes=100 * MIB, budget_bytes=90 * MIB, reserve_bytes=10 * MIB, pool_bytes_default=4 * MIB)
    assert grant(budget=budget).groups[0].page_count == 1024
    assert grant(budget=budget, weight_bytes=67 * MIB).groups[0].page_count == 512


def buckets_of(tokens_max, rows_max, *, size_min=1, is_cpu=True, is_eager=False, skips_padding=False):
    return choose_buckets(
        tokens_max=tokens_max, rows_max=rows_max, size_min=size_min, is_cpu=is_cpu, is_eager=is_eager,
        skips_padding=skips_padding,
    )


def test_buckets_are_few_and_end_at_the_maxima():
    buckets = buckets_of(1000, 48, size_min=2)
    assert buckets.tokens == (2, 4, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1000)
    assert buckets.rows == (2, 6, 16, 32, 48)
    assert buckets_of(1000, 48, is_eager=True) == Buckets(tokens=(64, 1000), rows=(48,))
    assert buckets_of(1, 1, size_min=2) == Buckets(tokens=(2,), rows=(2,))
    assert [holder(buckets.tokens, count) for count in (1, 2, 3, 64, 65, 1000)] == [2, 2, 4, 64, 96, 1000]
    with pytest.raises(ValueError, match="above the largest"):
        holder(buckets.tokens, 1001)


@pytest.mark.parametrize("costs", ["CPU_TOKENS", "NATIVE_TOKENS", "GPU"])
def test_padding_to_the_next_bucket_never_nearly_doubles_a_step(costs):
    from jaxserve.runner import buckets

    of, is_native = getattr(buckets, costs).of, costs == "NATIVE_TOKENS"
    sizes = buckets_of(8192, 256, is_cpu=costs != "GPU", skips_padding=is_native).tokens
    for count in range(1, 8193, 7):
        assert of(count, holder(sizes, count)) <= (1.15 if is_native else 1.6) * of(count, count), count


def test_where_products_leave_padding_out_fewer_sizes_do():
    from jaxserve.runner.buckets import skips_padding

    assert buckets_of(256, 16, skips_padding=True).tokens == (1, 6, 16, 32, 64, 128, 256)
    assert skips_padding(tiny_spec(), itemsize=2, is_cpu=True) == (not native.refusals())
    assert not skips_padding(tiny_spec(), itemsize=2, is_cpu=True, products="xla")
    assert not skips_padding(tiny_spec(), itemsize=4, is_cpu=True)
    assert not skips_padding(tiny_spec(), itemsize=2, is_cpu=False)


def test_one_row_has_a_bucket_only_where_lanes_multiply_it(tmp_path):
    from jaxserve.runner.buckets import smallest_size

    spec = tiny_spec()
    assert smallest_size(spec, itemsize=2, is_cpu=True, batch_invariant=False) == 1
    assert smallest_size(spec, itemsize=2, is_cpu=True, batch_invariant=True) == (3 if native.refusals() else 1)
    assert smallest_size(spec, itemsize=4, is_cpu=True, batch_invariant=True) == 2
    assert smallest_size(spec, itemsize=2, is_cpu=False, batch_invariant=False) == 2
    with pytest.raises(ConfigError, match="batch-invariant: .* not built yet for GPUs"):
        smallest_size(spec, itemsize=2, is_cpu=False, batch_invariant=True)


def test_the_serving_set_is_one_bucket_of_each_kind():
    buckets = buckets_of(512, 64)
    assert buckets.serving(whole_prompts=False) == Buckets(tokens=(64,), rows=(16,))
    assert buckets.serving(whole_prompts=True) == Buckets(tokens=(512,), rows=(16,))


def test_several_processes_plan_with_the_tightest_of_their_memories():
    budgets = [
        Budget(total_bytes=100, budget_bytes=90, reserve_bytes=5),
        Budget(total_bytes=80, budget_bytes=70, reserve_bytes=4),
        Budget(total_bytes=90, budget_bytes=60, reserve_bytes=9),
    ]
    said: list[Sequence[int]] = []
    for budget in budgets:
        tightest(budget, lambda values: said.append(values) or tuple(values))      # type: ignore[func-returns-value]
    agreed = tuple(map(min, *said))
    expected = Budget(total_bytes=80, budget_bytes=60, reserve_bytes=9)
    assert [tightest(budget, lambda _: agreed) for budget in budgets] == [expected] * 3
    small = replace(budgets[0], pool_bytes_default=7)
    assert tightest(small, lambda values: tuple(map(min, values, (80, 70, -4, 3)))).pool_bytes_default == 3


def test_pages_are_what_the_process_with_the_least_memory_has_room_for(tmp_path):
    spec, config = tiny_spec(), tiny_config(store=tmp_path / "store")
    params, page_bytes = tiny_params(spec), 2 * 2 * 2 * 16 * PAGE_SIZE * 4
    config = replace(config, cache=replace(config.cache, kv_cache_memory_bytes=None))

    def least(values: Sequence[int]) -> tuple[int, ...]:
        """Another process has as much, but room for 20 pages only."""
        return (*values[:3], min(values[3], 20 * page_bytes)) if len(values) == 4 else tuple(values)

    planned = functools.partial(
        plan_memory, spec=spec, params=params, mesh=tiny_mesh(), dtype=jnp.dtype(jnp.float32), config=config
    )
    assert planned().shape.groups[0].page_count > 20
    assert planned(least=least).shape.groups[0].page_count == 20


def test_sizes_that_contradict_each_other_are_refused(tmp_path):
    spec = tiny_spec()
    params, config = tiny_params(spec), tiny_config(store=tmp_path / "store")
    with pytest.raises(ConfigError, match="max-num-batched-tokens 4 is less than max-num-seqs 8"):
        tiny_setup(spec, params, replace(config, scheduler=replace(config.scheduler, max_num_batched_tokens=4)))
    with pytest.raises(ConfigError, match="max-model-len 65 is above the 64"):
        tiny_setup(spec, params, replace(config, model=replace(config.model, max_model_len=65)))
    whole = replace(config.scheduler, enable_chunked_prefill=False)
    with pytest.raises(ConfigError, match="chunked prefill is off"):
        tiny_setup(spec, params, replace(config, scheduler=whole))


def test_a_window_gets_what_it_can_hold_and_leaves_the_rest():
    """Two groups of one layer each, one with a window of 20: at most 3 pages a row, and two steps in flight."""
    spec = replace(tiny_spec(window=20), context_length=4096)
    table = grant(spec=spec, row_count=8, tokens_max=64, pool_bytes_wanted=3 * MIB)
    everything, window = table.groups
    assert (everything.window, window.window) == (None, 20)
    assert window.page_count == 8 * 3 + 2 * 4
    assert everything.page_count == (3 * MIB - window.pool_bytes) // everything.page_bytes // 64 * 64
    assert table.pool_bytes <= 3 * MIB and table.length_max == 4096
    assert any("window 20" in line for line in table.lines())
    tight = grant(spec=replace(spec, context_length=640), row_count=8, tokens_max=64, pool_bytes_wanted=39 * PAGE_BYTES)
    assert [group.page_count for group in tight.groups] == [60, 18], "as 10 pages of 160 positions to 3 of the window"
    assert tight.length_max == 640 and tight.concurrency == 60 / 40
    slides = replace(spec, layers=(spec.layers[1],) * 2)
    assert grant(spec=slides, row_count=8, tokens_max=64, pool_bytes_wanted=MIB).length_max == 4096
    assert grant(spec=slides, row_count=8, tokens_max=64, pool_bytes_wanted=2 * PAGE_BYTES).length_max == 32


def test_what_the_user_gives_the_allocator_stands(monkeypatch):
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    config = EngineConfig(model=ModelConfig(model="m"), cache=CacheConfig(gpu_memory_utilization=0.7))
    cases = (({}, [None, "0.7"]), ({names[0]: "0.5"}, ["0.5", None]), ({names[1]: "0.4"}, [None, "0.4"]))
    for given, expected in cases:
        for name in names:
            monkeypatch.setenv(name, given.get(name, ""))
            if name not in given:
                monkeypatch.delenv(name)
        _set_allocator(config)
        assert [os.environ.get(name) for name in names] == expected
