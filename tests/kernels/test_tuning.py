"""Block sizes to try: all fit, hold the one that is taken without measurements, and compile; the best is read back."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels_pallas import hopper
from kernels_pallas.hopper import Blocks
from scripts import tune_kernels, tune_products
from scripts.check_kernels import missing
from scripts.tune_kernels import Trial

ROOT = Path(__file__).parents[2]
ALL = list(tune_kernels.trials(list(tune_kernels.OPS), list(hopper.HEAD_DIMS), list(hopper.PAGE_SIZES)))


def test_candidates_are_whole_pages_and_fit() -> None:
    for trial in ALL:
        context, stages, number = trial.blocks.context, trial.blocks.stages, 1 if trial.is_quantized else 2
        assert trial.cases, trial
        assert context % 64 == 0 and context % trial.page == 0 and stages >= 2
        ring = 2 * stages * context * trial.head_dim * number
        assert ring <= hopper.SHARED_BYTES_MAX


def test_every_kind_tries_what_is_taken_without_a_file() -> None:
    for key in {(trial.op, trial.key) for trial in ALL}:
        tried = [trial for trial in ALL if (trial.op, trial.key) == key]
        first = tried[0]
        assert hopper.fitting(first.need) in [trial.blocks for trial in tried], key


def of(context: int, stages: int) -> Trial:
    blocks = Blocks(context=context, stages=stages)
    return Trial(op="paged_decode", head_dim=128, page=16, is_quantized=False, blocks=blocks)


def test_the_quickest_right_size_is_written_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = hopper.fitting(of(64, 2).need)
    results: list[tuple[Trial, dict[str, Any]]] = [
        (of(usual.context, usual.stages), {"ms": {"a": 2.0, "b": 4.0}}),
        (of(64, 4), {"ms": {"a": 1.0, "b": 7.0}}),
        (of(192, 2), {"ms": {"a": 1.5, "b": 4.0}}),
        (of(64, 2), {"error": "took longer than 180 s"}),
    ]
    found = tune_kernels.record(results, {"device": "NVIDIA H200", "date": "2000-01-01"})
    file = tmp_path / hopper.tuned_file("NVIDIA H200", "paged_decode")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(found))
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
    monkeypatch.setattr(hopper, "target_kind", lambda: "NVIDIA H200")
    hopper._tuned.cache_clear()
    try:
        assert hopper.blocks("paged_decode", of(64, 2).need) == Blocks(context=192, stages=2)
        for head_dim, group in ((128, 64), (64, 8)):    # too large beside so many heads; not measured
            need = hopper.decode_need(head_dim, 16, is_quantized=False, group=group)
            assert hopper.blocks("paged_decode", need) == hopper.fitting(need)
    finally:
        hopper._tuned.cache_clear()
    assert [trial.get("error") for trial in found["trials"]["128x16"]][-1] == "took longer than 180 s"


def test_nothing_is_chosen_where_the_usual_size_did_not_run() -> None:
    assert tune_kernels.record([(of(64, 2), {"ms": {"a": 1.0}})], {})["blocks"] == {}


def test_dry_run_prints_the_trials_and_a_run_needs_a_gpu() -> None:
    command = [sys.executable, "scripts/tune_kernels.py", "--op", "paged_decode", "--head-dim", "128"]
    options: dict[str, Any] = {
        "cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True, "timeout": 60,
    }
    dry = subprocess.run([*command, "--dry-run"], check=False, **options)
    assert dry.returncode == 0
    assert re.search(r"paged_decode 128x16: blocks of 128, 3 stages; llama-3.1-8b-1x2048", dry.stdout)
    refused = subprocess.run(command, check=False, **options)
    assert refused.returncode == 2 and "nothing to tune here: needs" in refused.stderr


def test_the_quickest_tiles_of_a_product_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = list(tune_products.trials(["quantized_matmul"], "qwen2.5-3b-awq-int4-16"))
    assert len(todo) > 1
    results: list[tuple[tune_products.Trial, dict[str, Any]]] = [(todo[0], {"ms": 2.0}), (todo[-1], {"ms": 1.0})]
    found = tune_products.record(results, {"device": "NVIDIA H200"})
    file = tmp_path / hopper.tuned_file("NVIDIA H200", "quantized_matmul")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(found))
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
    monkeypatch.setattr(hopper, "target_kind", lambda: "NVIDIA H200")
    hopper._tuned.cache_clear()
    try:
        [key] = found["blocks"]
        every = tuple(trial.tiles for trial in todo)
        assert hopper.tiles("quantized_matmul", key, every) == todo[-1].tiles
        assert hopper.tiles("quantized_matmul", key, every[:-1]) == todo[0].tiles      # what does not fit is not taken
        assert hopper.tiles("quantized_matmul", "int4-zero-128-64x64-8", every) == todo[0].tiles
    finally:
        hopper._tuned.cache_clear()
    assert tune_products.record(results[1:], {})["blocks"] == {}


@pytest.mark.slow
def test_every_candidate_compiles_without_spills(tmp_path: Path) -> None:
    """For pages of 16 slots, with the most stages, which cost no registers."""
    if (why := missing()) is not None:
        pytest.skip(why)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_candidates"], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=290, check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    wanted = {(trial.op, trial.key, trial.blocks.context) for trial in ALL if trial.page == 16}
    assert len(done.stdout.splitlines()) == len(wanted)
