"""A step costs no more programs, dispatches, transfers, leaves, instructions and copies than is recorded.

Where a change is meant, `scripts/bench_step.py --write-counts tests/fixtures/step_counts.json` records it, and the
difference is part of the commit.
"""

import json
from copy import deepcopy
from pathlib import Path

import jax
import pytest

from scripts.step_counts import counts_of, differences

RECORD = Path(__file__).parents[1] / "fixtures" / "step_counts.json"
RECORDED = json.loads(RECORD.read_text())


def test_both_versions_of_jax_that_are_served_with_are_recorded():
    assert set(RECORDED) >= {"0.10.2", "0.11.2"}


@pytest.fixture(scope="module")
def counts(tiny_llama):
    return counts_of(tiny_llama)


def test_counts_are_as_recorded(counts):
    if jax.__version__ not in RECORDED:
        pytest.skip(f"no counts for jax {jax.__version__}: scripts/bench_step.py --write-counts {RECORD.name}")
    assert differences(counts, RECORDED[jax.__version__]) == []


def test_a_decode_is_few_dispatches_and_one_transfer(counts):
    """Whatever is recorded: these are the engine's promises."""
    for name, step in counts["steps"].items():
        if name.startswith("decode"):
            assert step["transfers"] == 1, name


def test_what_grows_is_named(counts):
    worse = deepcopy(counts)
    name = next(iter(counts["programs"]))
    worse["programs"][name]["leaves"] += 1
    worse["programs"][name]["copies"] = counts["programs"][name]["copies"] * 2 + 3
    worse["steps"]["decode of 1 row"]["dispatches"] += 1
    worse["programs"]["forward_T3"] = worse["programs"].pop("admit")
    said = differences(worse, counts)
    assert len(said) == (5 if name != "admit" else 3)
    assert any("decode of 1 row: dispatches" in line for line in said) and "admit is gone" in said
    assert differences(counts, counts) == []
