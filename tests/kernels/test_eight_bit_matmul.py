"""Products of 8 bits on both sides: every form against the reference, refusals."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.contract import ContractError, NoImplementationError
from kernels_pallas.eight_bit_matmul import eight_bit_matmul, refusals
from kernels_pallas.native import api as native
from tests.kernels.packed_simulator import Case, eight_bits


def test_integers_are_exact() -> None:
    arrays, exact = eight_bits(Case(kind="int8", outs=48))
    for implementation in ("xla", "reference", *(() if native.refusals() else ("native",))):
        found = eight_bit_matmul(*arrays, implementation=implementation)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, exact)


@pytest.mark.parametrize("group", [384, 192], ids=["one-group", "groups"])
def test_floats_are_sums_of_exact_products(group: int) -> None:
    arrays, exact = eight_bits(Case(kind="float8_e4m3fn", outs=48, group=group))
    assert (arrays[2] is None) == (group == 384)
    for implementation in ("xla", "reference"):
        found = eight_bit_matmul(*arrays, implementation=implementation)
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


def test_refuses_what_breaks_the_contract_or_cannot_be_served() -> None:
    (x_TI, weight_OI, *_), _ = eight_bits(Case(kind="int8", outs=48))
    with pytest.raises(ContractError, match="both must be int8 or both float8_e4m3fn, got int8 and int32"):
        eight_bit_matmul(x_TI, weight_OI.astype(jnp.int32))
    with pytest.raises(ContractError, match="scales are of groups of floats"):
        eight_bit_matmul(x_TI, weight_OI, jnp.ones((12, 1)), jnp.ones((48, 1)))
    with pytest.raises(NoImplementationError, match="mosaic_gpu: needs .*; outputs must be a multiple of 64, got 48"):
        eight_bit_matmul(x_TI, weight_OI, implementation="mosaic_gpu")
    found = "; ".join(refusals(x_TI[:, :320], weight_OI[:, :320]))
    assert "inputs must be a multiple of 128, got 320" in found
    assert "groups must be multiples of 128 inputs, got 64" in "; ".join(refusals(x_TI, weight_OI, jnp.ones((48, 6))))
