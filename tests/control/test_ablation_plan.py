"""What an ablation's YAML may say, and how each mistake is named; the ready ones are read, too."""

import sys
from pathlib import Path

import pytest
import yaml

from jaxserve.core.errors import ConfigError

ROOT = Path(__file__).parents[2]
READY = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
GOOD = {
    "about": "a test", "engine": {"max-num-seqs": 4},
    "switches": {"batching": ["static", "continuous"], "async-scheduling": [True, False]},
    "workloads": {"one": {"num-prompts": 2}, "two": {"request-rate": 1.5}},
    "figures": [{"x": "batching", "y": "median_ttft_ms"}],
}


@pytest.fixture
def plans(monkeypatch):
    """The module, among its neighbours as when the script runs."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import ablation_plan

    yield ablation_plan
    for name in ("ablation_plan", "bench_serving"):
        sys.modules.pop(name, None)


def read(plans, folder, **changes):
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}, sort_keys=False))
    return plans.read_plan(path, model="folder")


def test_the_grid_is_the_product_of_the_switches_and_cells_take_turns(plans, tmp_path):
    plan = read(plans, tmp_path, repeats=2)
    assert [cell.name for cell in plan.cells][:2] == [
        "batching=static async-scheduling=true", "batching=static async-scheduling=false"
    ]
    assert plan.cells[1].words() == ["--max-num-seqs", "4", "--batching", "static", "--no-async-scheduling"]
    order = [plan.cells.index(cell) for _, cell in plan.rounds()]
    assert order == [0, 1, 2, 3, 1, 2, 3, 0]


def test_cells_get_equal_prompts_in_the_same_repeat_and_new_ones_in_the_next(plans, tmp_path):
    plan = read(plans, tmp_path, repeats=2)
    seeds = [[one.seed for one in plan.measurements(repeat, cell)] for repeat, cell in plan.rounds()]
    assert seeds[0] == seeds[3] != seeds[4] and len({*seeds[0], *seeds[4]}) == 4


@pytest.mark.parametrize("changes, message", [
    ({"swiches": {}}, "unknown key 'swiches'; did you mean 'switches'"),
    ({"switches": {"bloc-size": [8]}}, "unknown key 'bloc-size'; did you mean 'block-size'"),
    ({"switches": {"block-size": [8, 24]}}, "block-size must be a power of two, got 24"),
    ({"switches": {"batching": ["dynamic"]}}, "batching must be one of continuous, static, got 'dynamic'"),
    ({"switches": {"batching": "static"}}, "batching must be a list"),
    ({"switches": {"block-size": [8, 8]}}, "block-size has a value twice"),
    ({"switches": {"block-size": [None]}}, "block-size has no value"),
    ({"switches": {"max-num-seqs": [2]}}, "max-num-seqs is given twice"),
    ({"switches": {"port": [1]}}, "port is no switch of the engine"),
    ({"switches": {"no-async-scheduling": [True]}}, "write async-scheduling: false"),
    ({"workloads": {"one": {"num-promts": 2}}}, "'num-promts'; did you mean 'num-prompts'"),
    ({"workloads": {"one": {"num-prompts": 0}}}, "num-prompts must be a whole number of at least 1, got 0"),
    ({"workloads": {"one": {"num-prompts": 2.5}}}, "whole number"),
    ({"workloads": {"one": {"token-high": 7}}}, "token-high 7 must be above token-low 1000"),
    ({"workloads": {"one": {"input-len": 0}}}, "a prompt of no tokens"),
    ({"workloads": {}}, "workloads is empty"),
    ({"figures": [{"x": "batching", "y": "median_tftt_ms"}]}, "did you mean 'median_ttft_ms'"),
    ({"figures": [{"x": "block-size", "y": "duration"}]}, "unknown x of a figure: 'block-size'"),
    ({"figures": [{"x": "batching"}]}, "a figure needs x and y"),
    ({"repeats": 0}, r"repeats must be a whole number in \[1, 1000\], got 0"),
    ({"repeats": True}, "repeats must be a whole number"),
])
def test_mistakes_are_named_with_what_would_do(plans, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(plans, tmp_path, **changes)


def test_repeats_of_the_command_line_obey_the_same_bounds(plans):
    assert plans.read_plan(READY[0], repeats=1).repeats == 1
    with pytest.raises(ConfigError, match="repeats must be a whole number"):
        plans.read_plan(READY[0], repeats=0)


def test_a_missing_part_and_a_key_given_twice_are_errors(plans, tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("about: one\n")
    with pytest.raises(ConfigError, match="lacks 'switches'"):
        plans.read_plan(path)
    path.write_text("about: one\nabout: two\n")
    with pytest.raises(ConfigError, match="'about' is given twice"):
        plans.read_plan(path)


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_the_ready_ablations_are_whole(plans, path):
    plan = plans.read_plan(path)
    assert len(plan.cells) > 1 and plan.repeats >= 3 and plan.figures


def test_there_are_ready_ablations():
    assert {path.stem for path in READY} >= {"static-batching", "prefix-cache", "chunk-budget"}
