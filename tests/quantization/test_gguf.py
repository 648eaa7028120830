"""Blocks of GGUF files beside the gguf package's own dequantisation, and element by element where a format is easily
mistaken; the container; files that are not what they seem."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from jaxserve.core.errors import WeightsError
from jaxserve.quantization.formats.gguf import KINDS, GgufScheme
from jaxserve.weights.gguf import read_file

OUTS, INS = 5, 512


def random_blocks(number: int, seed: int = 0) -> np.ndarray:
    """Any bits but for the float16 scales, which are numbers."""
    kind, rng = KINDS[number], np.random.default_rng(seed)
    raw = rng.integers(0, 256, (OUTS, INS // kind.size * kind.dtype.itemsize)).astype(np.uint8)
    blocks = raw.view(kind.dtype).copy()
    for name in {"d", "m", "dmin"} & set(kind.dtype.names or ()):
        blocks[name] = rng.uniform(-0.1, 0.1, blocks[name].shape)
    return blocks


@pytest.mark.parametrize("number", KINDS, ids=[kind.name for kind in KINDS.values()])
def test_blocks_are_what_the_gguf_package_makes_of_them(number: int) -> None:
    blocks, scheme, kind = random_blocks(number), GgufScheme(), KINDS[number]
    assert Type(number).name == kind.name
    assert gguf.GGML_QUANT_SIZES[Type(number)] == (kind.size, kind.dtype.itemsize)
    codes = scheme.codes("m", {"blocks": blocks})
    assert scheme.shape("m", {"blocks": blocks}) == (OUTS, INS) == codes.code_OI.shape
    form = scheme.form("m", {"blocks": blocks})
    assert codes.code_OI.dtype == np.uint8 and codes.scale_OG.dtype.name == form.scale
    assert codes.scale_OG.shape == (OUTS, INS // (form.group or INS))
    assert codes.code_OI.max() < (16 if form.code in ("int4", "lut4") else 256)
    expected = gguf.dequantize(blocks.view(np.uint8).reshape(OUTS, -1), Type(number))
    np.testing.assert_array_equal(codes.dequantised(), expected)


def test_q4_k_element_by_element() -> None:
    """Every element of one block from the bytes, as ggml's structure has them."""
    blocks = random_blocks(12)[:1, :1]
    raw = blocks.tobytes()
    d, dmin = struct.unpack("<ee", raw[:4])
    scales, qs = raw[4:16], raw[16:]
    for element, found in enumerate(GgufScheme().codes("m", {"blocks": blocks}).dequantised()[0]):
        group = element // 32
        if group < 4:
            scale, least = scales[group] & 63, scales[group + 4] & 63
        else:
            scale = (scales[group + 4] & 15) + 16 * (scales[group - 4] >> 6)
            least = (scales[group + 4] >> 4) + 16 * (scales[group] >> 6)
        code = (qs[element // 64 * 32 + element % 32] >> (4 * (group % 2))) & 15
        assert found == np.float32(np.float32(d) * np.float32(scale)) * np.float32(code) - np.float32(dmin) * least


def test_scales_must_be_numbers() -> None:
    blocks = random_blocks(14)
    blocks["d"][2, 1] = np.inf
    with np.errstate(all="ignore"), pytest.raises(WeightsError, match=r"layer\.q: scales of Q6_K blocks hold inf"):
        GgufScheme().codes("layer.q", {"blocks": blocks})


@pytest.mark.parametrize("data", [np.zeros((4, 32), np.uint8), random_blocks(2)[0]])
def test_what_is_no_matrix_of_blocks_is_refused(data: np.ndarray) -> None:
    with pytest.raises(WeightsError, match=r"layer\.q: .* no blocks of a matrix"):
        GgufScheme().shape("layer.q", {"blocks": data})


def written(path: Path, **tensors: tuple[np.ndarray, int | None]) -> Path:
    """A file as the gguf package writes it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for name, (data, number) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=None if number is None else Type(number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_the_gguf_package_is_read(tmp_path: Path) -> None:
    blocks, norm = random_blocks(14), np.arange(6, dtype=np.float32)
    half = np.arange(8, dtype=np.float16).reshape(2, 4)
    facts, tensors = read_file(written(
        tmp_path / "m.gguf", q=(blocks.view(np.uint8).reshape(OUTS, -1), 14), norm=(norm, None), half=(half, None)
    ))
    assert facts["general.architecture"] == "llama" and facts["llama.block_count"] == 3
    assert facts["tokenizer.ggml.tokens"] == ["a", "é", ""] and facts["tokenizer.ggml.add_bos_token"] is True
    np.testing.assert_array_equal(facts["tokenizer.ggml.scores"], np.array([0.5, -1], np.float32))
    np.testing.assert_array_equal(tensors["norm"].data, norm)
    np.testing.assert_array_equal(tensors["half"].data, half)
    np.testing.assert_array_equal(
        GgufScheme().codes("q", {"blocks": tensors["q"].data}).dequantised(),
        GgufScheme().codes("q", {"blocks": blocks}).dequantised(),
    )


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return written(tmp_path / "m.gguf", a=(np.ones((2, 32), np.float32), None), b=(np.ones(32, np.float32), None))


def test_cut_off_files_are_refused(sound: Path) -> None:
    content = sound.read_bytes()
    for keep in (2, 7, 20, 40, 100, len(content) // 2, len(content) - 1):
        sound.write_bytes(content[:keep])
        with pytest.raises(WeightsError):
            read_file(sound)


def test_any_changed_byte_is_read_or_refused(sound: Path) -> None:
    content = sound.read_bytes()
    for at in range(len(content) - 200):
        sound.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            read_file(sound)
        except WeightsError:
            pass


def entry(name: bytes, sizes: list[int], kind: int, offset: int) -> bytes:
    return b"".join([
        struct.pack("<Q", len(name)), name, struct.pack("<I", len(sizes)), *(struct.pack("<Q", n) for n in sizes),
        struct.pack("<IQ", kind, offset),
    ])


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ([entry(b"a", [32], 99, 0)], "'a' is of ggml's type 99, which is not read; supported are float32"),
        ([entry(b"a", [33], 2, 0)], r"'a' is \[33\]; rows of Q4_0 are multiples of 32"),
        ([entry(b"a", [64], 0, 16)], "'a': 256 bytes at 16 do not lie"),
        ([entry(b"a", [2**40], 0, 0)], "'a': 4398046511104 bytes at 0 do not lie"),
        ([entry(b"a", [2**63, 2**63], 0, 0)], "do not lie"),
        ([entry(b"a", [8], 0, 0), entry(b"a", [8], 0, 32)], "'a' is there twice"),
        ([entry(b"a", [16], 0, 0), entry(b"b", [8], 0, 32)], "'a' and 'b' overlap"),
        ([entry(b"a", [1] * 9, 0, 0)], "'a' has 9 axes"),
    ],
)
def test_tensors_that_cannot_be_are_refused(tmp_path: Path, entries: list[bytes], named: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(entries), 0) + b"".join(entries) + bytes(512))
    with pytest.raises(WeightsError, match=named):
        read_file(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"GGML" + bytes(64), "no GGUF file"), (b"version https://git-lfs.github.com", "git-lfs"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(64), "version 50331648 of GGUF is not read"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(64), "promises 1152921504606846976 more"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 77) + bytes(64), "type 77"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 60,
         "type 9 is not known"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1s", 1, b"\xff") + bytes(64), "not UTF-8"),
    ],
)
def test_files_that_are_no_gguf_are_refused(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=named):
        read_file(path)
