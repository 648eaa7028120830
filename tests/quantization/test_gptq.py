"""GPTQ: every width, both versions of zeros, groups in order, shuffled and one of all; what is refused, by its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxserve.core.errors import ModelError, UnsupportedModelError, WeightsError
from jaxserve.quantization.formats.gptq import GptqScheme
from tests.quantization import bit_strings

INS, OUTS, GROUP = 64, 32, 32


def config(**changed: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, **changed}


def made(bits: int, group: int, *, version: int, group_I: list[int] | None = None) -> tuple[dict[str, Any], np.ndarray]:
    """A module's tensors and, in plain loops, the matrix that they are."""
    count = 1 if group == -1 else INS // group
    code_IO, zero_GO = bit_strings.draw(bits, (INS, OUTS), bits), bit_strings.draw(bits + 1, (count, OUTS), bits)
    scale_GO = bit_strings.scales(2, (count, OUTS))
    kept_GO = (zero_GO - 1) % (1 << bits) if version == 1 else zero_GO
    stored = {
        "qweight": bit_strings.columns_of_words(code_IO, bits), "qzeros": bit_strings.rows_of_words(kept_GO, bits),
        "scales": scale_GO,
    }
    groups = [0 if group == -1 else i // group for i in range(INS)] if group_I is None else group_I
    if group_I is not None:
        stored["g_idx"] = np.array(group_I, np.int32)
    weight = np.empty((OUTS, INS), np.float32)
    for o in range(OUTS):
        for i in range(INS):
            weight[o, i] = np.float32(scale_GO[groups[i], o]) * (code_IO[i, o] - zero_GO[groups[i], o])
    return stored, weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize("version", [1, 2])
def test_weights_are_what_the_formula_says(bits: int, group: int, version: int) -> None:
    stored, weight = made(bits, group, version=version)
    scheme = GptqScheme.parse(config(
        bits=bits, group_size=group, **({} if version == 1 else {"checkpoint_format": "gptq_v2"})
    ))
    codes = scheme.codes("m", stored)
    assert scheme.shape("m", stored) == (OUTS, INS) == codes.code_OI.shape
    assert codes.code_OI.dtype == np.uint8 and codes.scale_OG.dtype == np.float16
    assert codes.scale_OG.shape == (OUTS, 1 if group == -1 else INS // group)
    np.testing.assert_array_equal(codes.dequantised(), weight)


def test_the_order_of_groups_is_the_stored_one() -> None:
    group_I = list(np.random.default_rng(0).permutation([i // 16 for i in range(INS)]))
    stored, weight = made(4, 16, version=1, group_I=group_I)
    scheme = GptqScheme.parse(config(group_size=16, desc_act=True))
    assert scheme.form("m", stored).has_order
    np.testing.assert_array_equal(scheme.codes("m", stored).dequantised(), weight)


def test_an_order_that_changes_nothing_is_none() -> None:
    stored, weight = made(4, GROUP, version=1, group_I=[i // GROUP for i in range(INS)])
    scheme = GptqScheme.parse(config(desc_act=True))
    assert not scheme.form("m", stored).has_order and scheme.codes("m", stored).group_I is None
    np.testing.assert_array_equal(scheme.codes("m", stored).dequantised(), weight)


def test_symmetric_zeros_of_version_1_are_the_middle() -> None:
    """AutoGPTQ's symmetric 4-bit files hold 0x77777777, its 8-bit files 0x7f7f7f7f."""
    for bits, word, middle in ((4, 0x77777777, 8), (8, 0x7F7F7F7F, 128)):
        stored, _ = made(bits, GROUP, version=1)
        stored["qzeros"] = np.full_like(stored["qzeros"], word)
        assert (GptqScheme.parse(config(bits=bits)).codes("m", stored).zero_OG == middle).all()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"bits": 5}, "bits 5"), ({"bits": None}, "bits None"), ({"bits": "4"}, "bits '4'"),
        ({"group_size": 0}, "group_size is 0"), ({"group_size": "x"}, "group_size is 'x'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"), ({"is_marlin_format": True}, "is_marlin"),
        ({"dynamic": {".*down": {"adapter": "lora"}}}, "adapter = 'lora' of gptq's dynamic"),
        ({"dynamic": {"+:.*down": {"bits": 5}}}, "bits 5 of gptq's dynamic"),
        ({"dynamic": {"-:(": {}}}, r"'\(' in dynamic is no regular expression"), ({"rotation": "hadamard"}, "rotation"),
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        GptqScheme.parse(config(**changed))


def test_some_modules_have_settings_of_their_own() -> None:
    """GPTQModel's rules: the first that matches counts, what it does not say is the checkpoint's."""
    scheme = GptqScheme.parse(config(dynamic={
        "-:.*router": {}, r"+:layers\.1\..*up": {"bits": 8}, r"layers\.1\.": {"group_size": INS, "sym": True}
    }))
    four, weight_of_4 = made(4, GROUP, version=1)
    eight, weight_of_8 = made(8, GROUP, version=1)
    wide, weight_wide = made(4, INS, version=1)
    np.testing.assert_array_equal(scheme.codes("layers.0.up", four).dequantised(), weight_of_4)
    np.testing.assert_array_equal(scheme.codes("layers.1.up", eight).dequantised(), weight_of_8)
    np.testing.assert_array_equal(scheme.codes("layers.1.down", wide).dequantised(), weight_wide)
    assert scheme.form("layers.1.up", eight).code == "int8"
    with pytest.raises(WeightsError, match=r"layers\.2\.router is packed, but dynamic leaves it out by '\.\*router'"):
        scheme.shape("layers.2.router", four)


def test_unknown_settings_are_no_weights_errors() -> None:
    with pytest.raises(UnsupportedModelError, match="novel"):
        GptqScheme.parse(config(novel=3))


def replaced(name: str, value: Any) -> dict[str, Any]:
    stored, _ = made(4, GROUP, version=1, group_I=[i // GROUP for i in range(INS)])
    stored[name] = value
    return stored


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("qweight", np.zeros((8, OUTS), np.int64), r"qweight is int64 \[8, 32\]"),
        ("qweight", np.zeros((8, OUTS, 1), np.int32), r"qweight is int32 \[8, 32, 1\]"),
        ("qweight", np.zeros((7, OUTS), np.int32), "56 inputs are no multiple of the group size 32"),
        ("qzeros", np.zeros((2, 5), np.int32), r"qzeros is int32 \[2, 5\]; expected .* \[2, 4\]"),
        ("scales", np.zeros((3, OUTS), np.float16), r"scales is float16 \[3, 32\]; expected .* \[2, 32\]"),
        ("scales", np.full((2, OUTS), np.nan, np.float16), "scales holds infinities or NaN"),
        ("g_idx", np.zeros(INS - 1, np.int32), r"g_idx is int32 \[63\]"),
        ("g_idx", np.full(INS, 2, np.int32), "g_idx has 2 to 2; groups are 0 to 1"),
        ("g_idx", np.full(INS, -1, np.int32), "g_idx has -1 to -1"),
    ],
)
def test_malformed_tensors_are_refused_by_name(name: str, value: np.ndarray, named: str) -> None:
    with pytest.raises(WeightsError, match=named):
        GptqScheme.parse(config()).codes("layer.q", replaced(name, value))


def test_a_missing_tensor_is_named() -> None:
    stored, _ = made(4, GROUP, version=1)
    del stored["scales"]
    with pytest.raises(WeightsError, match=r"layer\.q\.scales is missing"):
        GptqScheme.parse(config()).codes("layer.q", stored)
