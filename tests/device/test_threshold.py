"""The searches of both kinds of device beside a reference that sorts: what their thresholds keep of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.runner import threshold

KTH = {"halves": jax.jit(threshold.kth_by_halves), "digits": jax.jit(threshold.kth_by_digits)}
MASS = {"halves": jax.jit(threshold.mass_by_halves), "digits": jax.jit(threshold.mass_by_digits)}
SIZES = (1, 300, 1024)      # one entry; no multiple of either block; both blocks full
ROWS = 120                  # searched at once: one program a form and size
INF, NAN = np.inf, np.nan


def patterns(V: int) -> dict[str, np.ndarray]:
    """Rows [V] whose entries lie near and far, are alike, or are no numbers that one samples from."""
    rng = np.random.default_rng(V)
    normal = rng.normal(size=V)
    few = np.where(np.arange(V) < max(1, V // 50), normal, -INF)
    found = {
        "normal": normal * 3, "rounded": np.round(normal * 2), "all alike": np.full(V, 1.5), "zeros": np.zeros(V),
        "signed zeros": np.where(normal > 0, 0.0, -0.0), "negative": -np.abs(normal) - 500, "flat": normal * 1e-3,
        "huge range": np.sign(normal) * 10.0 ** (normal * 12), "largest": np.sign(normal) * np.finfo(np.float32).max,
        "neighbouring floats": np.float32(1) + np.arange(V)[::-1] * 2.0**-23, "few not masked": few,
        "all masked": np.full(V, -INF),
    }
    return {name: row.astype(np.float32) for name, row in found.items()}


def cases(V: int, targets: list[float]) -> Iterator[tuple[str, np.ndarray, float]]:
    for name, row in patterns(V).items():
        for target in targets:
            yield f"{name}, {target}", row, target


def searched(search: Callable[..., jax.Array], rows: Sequence[np.ndarray], *of_rows: Sequence[float]) -> np.ndarray:
    """Thresholds of the rows; the program's other rows repeat the last one."""
    filled = [np.stack([*rows, *[rows[-1]] * (ROWS - len(rows))])]
    filled += [np.array([*each, *[each[-1]] * (ROWS - len(rows))], np.float32) for each in of_rows]
    return np.asarray(search(*filled))[: len(rows)]


def kept(rows: Sequence[np.ndarray], least: np.ndarray) -> np.ndarray:
    """As a program compares: on a CPU it takes the smallest floats for zeros."""
    return np.asarray(jax.jit(jnp.greater_equal)(np.stack(rows), least[:, None]))


@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("form", KTH)
def test_the_kth_largest_keeps_what_sorting_keeps(form: str, V: int) -> None:
    names, rows, ks = zip(*cases(V, [-1, 0, 1, 2, V // 2, V - 1, V, V + 5]), strict=True)
    found = searched(KTH[form], rows, ks)
    expected = np.array([-INF if k < 1 or k > V else np.sort(row)[-int(k)] for row, k in zip(rows, ks, strict=True)])
    for name, *got in zip(names, kept(rows, found), kept(rows, expected.astype(np.float32)), strict=True):
        np.testing.assert_array_equal(*got, err_msg=name)
    if form == "digits":
        entries = np.where(np.abs(found) < np.finfo(np.float32).tiny, 0, found)     # which a CPU takes for zero
        np.testing.assert_array_equal(entries, expected, err_msg="no entries")


def softmax(row: np.ndarray) -> np.ndarray:
    """As float32 has it; the largest entry alone where nothing is to be divided."""
    weight = np.exp(row.astype(np.float64) - row.max()) if np.isfinite(row.max()) else (row == row.max()) * 1.0
    return (weight / weight.sum()).astype(np.float32)


@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("form", MASS)
def test_the_least_of_a_mass_keeps_what_sorting_keeps(form: str, V: int) -> None:
    names, rows, masses = zip(*cases(V, [-0.5, 0.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 0.999999, 1.0]), strict=True)
    rows = [softmax(row) for row in rows]
    found = searched(MASS[form], rows, masses)
    for name, row, mass, least in zip(names, rows, masses, found, strict=True):
        values = np.unique(row)[::-1].astype(np.float64)
        reached = np.array([row[row >= value].astype(np.float64).sum() for value in values])
        kept = np.count_nonzero(values >= least)
        if mass <= 0:
            assert least == 0, name
            continue
        # What is kept reaches the mass, and without the last value it does not; up to the rounding of sums.
        assert reached[kept - 1] > min(mass, reached[-1]) - threshold.ROUNDING, name
        assert kept == 1 or reached[kept - 2] < mass + threshold.ROUNDING, name


def test_both_forms_keep_alike_where_no_rounding_can_tell() -> None:
    rng = np.random.default_rng(0)
    rows = [softmax(rng.normal(size=1024).astype(np.float32) * scale) for scale in (0.1, 1, 3, 9) for _ in range(30)]
    masses = list(rng.uniform(0.01, 0.98, len(rows)))
    halves, digits = (kept(rows, searched(MASS[form], rows, masses)) for form in ("halves", "digits"))
    told = 0
    for row, mass, by_halves, by_digits in zip(rows, masses, halves, digits, strict=True):
        if np.abs(np.cumsum(np.sort(row.astype(np.float64))[::-1]) - mass).min() > 1e-6:
            np.testing.assert_array_equal(by_halves, by_digits)
            told += 1
    assert told > ROWS // 2


@pytest.mark.parametrize("form", KTH)
def test_rows_with_nan_end_and_leave_their_neighbours_alone(form: str) -> None:
    row = patterns(300)["normal"]
    one, all_of_it, infinite = row.copy(), np.full(300, NAN, np.float32), row.copy()
    one[17], infinite[3] = NAN, INF
    rows, ks = [one, row, all_of_it, row, infinite], [4.0] * 5
    found = searched(KTH[form], rows, ks)
    assert [np.count_nonzero(row >= found[place]) for place in (1, 3)] == [4, 4]
    alone = searched(KTH[form], [row] * 5, ks)
    np.testing.assert_array_equal(found[[1, 3]], alone[[1, 3]])
    mass = searched(MASS[form], [all_of_it, softmax(row), all_of_it, all_of_it, all_of_it], [0.5] * 5)
    assert mass[1] == searched(MASS[form], [softmax(row)] * 5, [0.5] * 5)[1]


def test_a_step_for_gpus_asks_its_host_nothing() -> None:
    """No loop that ends by its data, which a GPU's host would wait for at every turn; one on a CPU ends early."""
    x, of_row = np.zeros((2, 300), np.float32), np.ones(2, np.float32)
    for call, arrays in ((threshold.kth_largest, (x, of_row)), (threshold.least_of_mass, (x, of_row))):
        traced = jax.jit(call).trace(*arrays)
        has_loop = {platform: "while" in traced.lower(lowering_platforms=(platform,)).as_text()
                    for platform in ("cpu", "cuda")}
        assert has_loop == {"cpu": True, "cuda": False}
