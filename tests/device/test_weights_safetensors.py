"""The safetensors reader: what the safetensors package writes is read, what is malformed is refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxserve.core.errors import WeightsError
from jaxserve.weights.folder import read_folder
from jaxserve.weights.safetensors import read_file, write_file

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write_raw(path: Path, header: Any, data: bytes = bytes(24), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**GOOD["a"], **changes}}


def test_round_trip_of_every_dtype_and_rank(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "bf16": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16), "f16": rng.normal(size=7).astype(np.float16),
        "f64": rng.normal(size=(1, 2, 3)), "i8": np.arange(5, dtype=np.int8), "scalar": np.float32(3).reshape(()),
        "empty": np.empty((0, 4), np.float32), "bool": np.array([True, False]),
    }
    write_file(tmp_path / "x.safetensors", tensors)
    found = read_file(tmp_path / "x.safetensors")
    assert list(found) == list(tensors)
    for name, expected in tensors.items():
        assert found[name].data.dtype == expected.dtype and found[name].shape == expected.shape
        np.testing.assert_array_equal(found[name].data, expected)
        assert expected.size == 0 or not found[name].data.flags.writeable


def test_agrees_with_the_safetensors_package(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy")
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(3, np.float16)}
    package.save_file(tensors, tmp_path / "theirs.safetensors")
    write_file(tmp_path / "ours.safetensors", tensors)
    theirs = read_file(tmp_path / "theirs.safetensors")
    ours = package.load_file(tmp_path / "ours.safetensors")
    for name, expected in tensors.items():
        np.testing.assert_array_equal(theirs[name].data, expected)
        np.testing.assert_array_equal(ours[name], expected)


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (b"{ ", "not JSON"),
        (b"[]", "JSON object"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        ({"a": 3}, "data_offsets"),
        (entry(dtype="F31"), "unknown dtype 'F31'"),
        (entry(dtype=["F32"]), "unknown dtype"),
        (entry(shape=[2, -3]), "not a shape"),
        (entry(shape=[2.0, 3]), "not a shape"),
        (entry(shape=[1] * 9), "not a shape"),
        (entry(shape=[2, 2]), "takes 16 bytes"),
        (entry(shape=[2**62, 2**62]), "bytes"),
        (entry(data_offsets=[0, 28]), "outside the file"),
        (entry(data_offsets=[24, 0]), "outside the file"),
        (entry(data_offsets=[-24, 0]), "outside the file"),
        (entry(data_offsets=[0, 24, 48]), "two data_offsets"),
        ({**GOOD, "b": {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}}, "'a' and 'b' overlap"),
    ],
)
def test_malformed_headers_are_refused(tmp_path: Path, header: Any, named: str) -> None:
    with pytest.raises(WeightsError, match=named) as caught:
        read_file(write_raw(tmp_path / "bad.safetensors", header))
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_impossible_header_lengths_allocate_nothing(tmp_path: Path, length: int) -> None:
    with pytest.raises(WeightsError, match="cannot be"):
        read_file(write_raw(tmp_path / "bad.safetensors", GOOD, length=length))


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1])
def test_cut_off_files_are_refused(tmp_path: Path, keep: int) -> None:
    path = write_raw(tmp_path / "cut.safetensors", GOOD)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError):
        read_file(path)


def sharded(folder: Path, weight_map: dict[str, Any]) -> Path:
    write_file(folder / "1.safetensors", {"a": np.ones(2, np.float32)})
    write_file(folder / "2.safetensors", {"b": np.zeros(3, np.float32)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_an_index_joins_files(tmp_path: Path) -> None:
    found = read_folder(sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}))
    assert {name: (tensor.file, tensor.shape) for name, tensor in found.items()} == {
        "a": ("1.safetensors", (2,)), "b": ("2.safetensors", (3,))
    }


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        ({"a": "../1.safetensors"}, "outside its folder"),
        ({"a": "/etc/passwd"}, "outside its folder"),
        ({"a": ".."}, "outside its folder"),
        ({"a": "3.safetensors"}, "missing; the download is incomplete"),
        ({"a": "1.safetensors", "b": "1.safetensors"}, "says that tensor 'b'"),
        ({"a": "1.safetensors", "c": "2.safetensors"}, "'b' of 2.safetensors is not listed"),
        ({"a": 1}, "weight_map"),
    ],
)
def test_wrong_indexes_are_refused(tmp_path: Path, weight_map: dict[str, Any], named: str) -> None:
    with pytest.raises(WeightsError, match=named):
        read_folder(sharded(tmp_path, weight_map))


def test_folders_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"neither"):
        read_folder(tmp_path)
    write_file(tmp_path / "x.safetensors", {"a": np.ones(2, np.float32)})
    write_file(tmp_path / "y.safetensors", {"b": np.ones(2, np.float32)})
    assert sorted(read_folder(tmp_path)) == ["a", "b"]
    write_file(tmp_path / "z.safetensors", {"a": np.ones(2, np.float32)})
    with pytest.raises(WeightsError, match="in both"):
        read_folder(tmp_path)
    write_file(tmp_path / "model.safetensors", {"c": np.ones(2, np.float32)})
    assert sorted(read_folder(tmp_path)) == ["c"], "the usual name counts alone"
