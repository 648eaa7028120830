"""The GPU kernels in jax's simulator: right beside the reference, no race, no read of what must not be seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.kernels import packed_simulator
from tests.kernels.simulator import CASES, QUICK

ROOT = Path(__file__).parents[2]
LIMIT_S = 150     # a case takes 6 to 25 s; a kernel that waits for itself never ends
OPS = ("paged_decode", "paged_prefill")
RIGHT = [name for name, case in CASES.items() if case.bug is None]
# Prefill multiplies values by their scales before it clears them, but not latents.
BROKEN = [
    (op, name) for op in OPS for name, case in CASES.items()
    if case.bug is not None and ((op, case.bug) != ("paged_prefill", "held_scales") or case.latent_dim is not None)
]

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason=f"the simulator needs jax >= 0.11 (Python >= 3.12), not {jax.__version__}"
)


def simulate(op: str, name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.kernels.simulator", op, name]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)


@pytest.mark.parametrize(("op", "name"), [
    pytest.param(op, name, marks=() if name in QUICK[op] else pytest.mark.slow) for op in OPS for name in RIGHT
])
def test_kernel_equals_the_reference_without_a_race(op: str, name: str) -> None:
    done = simulate(op, name)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["finite"], "poison was read"
    assert not found["races"]
    # One rounding of the output and one of the weights, to 8 bits.
    assert found["error"] <= 0.01 * max(1.0, found["largest"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("op", OPS)
def test_random_steps_equal_the_reference_without_a_race(op: str, seed: int) -> None:
    test_kernel_equals_the_reference_without_a_race(op, f"random-{seed}")


@pytest.mark.slow
@pytest.mark.parametrize(("op", "name"), BROKEN)
def test_the_check_sees_planted_bugs(op: str, name: str) -> None:
    done = simulate(op, name)
    if done.returncode:
        assert "Barrier completed phase 1, but no threads observed phase 0" in done.stderr
    else:
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["races"] or not found["finite"]


def simulate_product(name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.kernels.packed_simulator", name]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in packed_simulator.QUICK else pytest.mark.slow)
    for name, case in packed_simulator.CASES.items() if case.bug is None
])
def test_products_are_exact_but_for_roundings_without_a_race(name: str) -> None:
    """A product whose sums are scaled rounds nothing that is not a table."""
    done = simulate_product(name)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["races"]
    assert found["error"] <= (1e-6 if name in packed_simulator.EXACT else 4e-3) * found["largest"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in packed_simulator.CASES.items() if case.bug is not None])
def test_the_check_of_products_sees_planted_bugs(name: str) -> None:
    done = simulate_product(name)
    if done.returncode:
        assert "Barrier completed phase 1, but no threads observed phase 0" in done.stderr
    else:
        assert json.loads(done.stdout.splitlines()[-1])["races"]
