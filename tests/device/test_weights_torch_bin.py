"""The reader of torch.save's files: what torch wrote is read, what is more than tensors is refused by name."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.core.errors import WeightsError
from jaxserve.models.registry import read_spec
from jaxserve.sharding.mesh import make_mesh
from jaxserve.weights import safetensors, torch_bin
from jaxserve.weights.folder import read_folder
from jaxserve.weights.loader import load_params
from tests.device.fixture_models import FIXTURES
from tests.device.torch_files import call, from_arrays, opened, plain, storage, tensor, write_torch

TORCH_BIN = FIXTURES / "torch-bin"
ONES = np.ones(6, np.float32)


@pytest.mark.parametrize("name", ["dtypes", "views", "parameters", "state_dict"])
def test_what_torch_saves_is_read(name: str) -> None:
    found, expected = torch_bin.read_file(TORCH_BIN / f"{name}.bin"), safetensors.read_file(
        TORCH_BIN / f"{name}.safetensors"
    )
    assert found.keys() == expected.keys()
    for key, wanted in expected.items():
        assert found[key].data.dtype == wanted.data.dtype and found[key].shape == wanted.shape, key
        np.testing.assert_array_equal(found[key].data, wanted.data)
        assert not wanted.data.size or not found[key].data.flags.writeable


def test_tied_tensors_share_their_bytes() -> None:
    found = torch_bin.read_file(TORCH_BIN / "views.bin")
    assert np.shares_memory(found["embedding"].data, found["head"].data)


def test_the_old_format_says_what_to_do() -> None:
    with pytest.raises(WeightsError, match=r"before 1\.6.*convert it to safetensors"):
        torch_bin.read_file(TORCH_BIN / "old_format.bin")


def test_our_own_writer_is_read(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "a.bin", {"a": tensor(shape=(2, 3))}, {"0": ONES.tobytes()})
    np.testing.assert_array_equal(torch_bin.read_file(path)["a"].data, np.ones((2, 3), np.float32))


def test_a_lone_file_of_any_name_and_counts_beside_its_tensors(tmp_path: Path) -> None:
    """SqueezeLLM's "sq-llama-2-7b-w4-s45.pt"; two of them would not say which one counts."""
    tensors = {"a": tensor(shape=(2, 3)), "sparse_threshold.model.layers.0.mlp.up_proj": plain(1234)}
    path = write_torch(tmp_path / "sq-tiny-w4-s45.pt", tensors, {"0": ONES.tobytes()})
    assert set(read_folder(tmp_path)) == {"a"}
    path.rename(tmp_path / "one.pt")
    write_torch(tmp_path / "two.pt", tensors, {"0": ONES.tobytes()})
    with pytest.raises(WeightsError, match="neither"):
        read_folder(tmp_path)


def test_other_numbers_beside_tensors_are_refused(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "a.pt", {"a": tensor(shape=(2, 3)), "step": plain(1234)}, {"0": ONES.tobytes()})
    with pytest.raises(WeightsError, match="'step' is int"):
        torch_bin.read_file(path)


class Exit:
    """Ends the process when it is unpickled."""

    def __reduce__(self) -> Any:
        import os

        return os._exit, (3,)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps({"a": Exit()}, 2), r"byte \d+: global '(posix|nt)\._exit' is refused"),
        (b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00x\x85R.", "global 'os.system' is refused"),
        (b"\x80\x02ctorch\nload\n.", "global 'torch.load' is refused"),
        (b"\x80\x04}.", "protocol 4"),
        (b"\x80\x02(lp0\n.", "opcode LIST is refused"),
        (b"\x80\x02\x8c\x02os\x8c\x06system\x93.", "opcode SHORT_BINUNICODE is refused"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "'a' is int"),
        (b"\x80\x02K\x01.", "one dict of tensors"),
        (b"\x80\x02}K\x01K\x02s.", "key is int"),
        (b"\x80\x02}h\x05.", "memo 5 was never set"),
        (b"\x80\x02}0.", "opcode POP is refused"),
        (b"\x80\x02u.", "mark is missing"),
        (b"\x80\x02R.", "missing from its stack"),
        (b"\x80\x02}", "malformed or cut off"),
        (b"\x80\x02X\xff\xff\xff\x7fa", "malformed or cut off"),
        (b"", "malformed or cut off"),
        (b"\x80\x02)q\x00" + b"h\x00\x86q\x00" * 60 + b".", "one dict of tensors"),     # 2 ** 60 when unfolded
        (b"\x80\x02}" + b")q\x00" + b"h\x00\x86q\x00" * 60 + b"K\x01s.", "key is tuple"),
        (b"\x80\x02" + b"(" * 200_000 + b".", "values wait on its stack"),
        (b"\x80\x02)" + b"\x85" * 200_000 + b".", "one dict of tensors"),       # nested 200,000 deep
        (call("torch._utils", "_rebuild_tensor_v2", ()), "other arguments"),
        (call("torch._utils", "_rebuild_parameter", (1, 2, 3)), "other arguments"),
        (call("torch", "FloatStorage", ()), "it is no function"),
    ],
)
def test_pickles_that_are_more_than_tensors_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        torch_bin.read_file(write_torch(tmp_path / "a.bin", content, {}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": (7,)}, "reaches to element 6 of a storage of 6"),
        ({"shape": (6,), "offset": 1}, "reaches to element 6"),
        ({"shape": (2, 3), "strides": (4, 1)}, "reaches to element 6"),
        ({"shape": (2**40,), "strides": (0,)}, "repeated values"),
        ({"shape": (2**62, 2**62)}, "reaches to"),
        ({"shape": (2**63, 0)}, "not a shape"),
        ({"shape": (-1,)}, "integers from 0"),
        ({"shape": (2,), "strides": (-1,)}, "integers from 0"),
        ({"shape": (2,), "offset": -1}, "integers from 0"),
        ({"shape": (2,), "strides": ()}, "1 sizes and 0 strides"),
        ({"shape": (1,) * 9}, "9 sizes"),
        ({"shape": (6,), "storage": storage(key="5")}, "'5' is not in the file"),
        ({"shape": (6,), "storage": storage(count=8)}, "should be 32 bytes and is 24"),
        ({"shape": (6,), "storage": storage(count=-1)}, "persistent id"),
        ({"shape": (6,), "storage": storage(dtype="ComplexFloatStorage")}, "ComplexFloatStorage' is refused"),
    ],
)
def test_views_that_leave_their_storage_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = write_torch(tmp_path / "a.bin", {"a": tensor(**changes)}, {"0": ONES.tobytes()})
    with pytest.raises(WeightsError, match=said):
        torch_bin.read_file(path)


def test_containers_that_are_not_torchs_are_refused(tmp_path: Path) -> None:
    good = {"a": tensor(shape=(6,))}
    content = {"0": ONES.tobytes()}
    with pytest.raises(WeightsError, match="byte order b'big'"):
        torch_bin.read_file(write_torch(tmp_path / "big.bin", good, content, byteorder=b"big"))
    with pytest.raises(WeightsError, match="compressed"):
        torch_bin.read_file(write_torch(tmp_path / "deflated.bin", good, content, method=zipfile.ZIP_DEFLATED))
    with pytest.raises(WeightsError, match="TorchScript"):
        torch_bin.read_file(write_torch(tmp_path / "script.bin", good, content, extra={"archive/code/a.py": b""}))
    with pytest.raises(WeightsError, match=r"0 entries NAME/data\.pkl"):
        with zipfile.ZipFile(tmp_path / "none.bin", "w") as archive:
            archive.writestr("x", b"1")
        torch_bin.read_file(tmp_path / "none.bin")


@pytest.mark.parametrize("keep", [0, 3, 4, 30, 100, -1, -30])
def test_cut_off_files_are_refused(tmp_path: Path, keep: int) -> None:
    path = write_torch(tmp_path / "a.bin", {"a": tensor(shape=(6,))}, {"0": ONES.tobytes()})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError):
        torch_bin.read_file(path)


def test_any_changed_byte_is_read_or_refused(tmp_path: Path) -> None:
    whole = (TORCH_BIN / "views.bin").read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 400):
        path = tmp_path / "a.bin"
        path.write_bytes(whole[:at] + bytes([int(rng.integers(256))]) + whole[at + 1 :])
        opened(path)


def test_formats_are_chosen_as_asked(tmp_path: Path) -> None:
    write_torch(tmp_path / "pytorch_model.bin", {"a": tensor(shape=(6,))}, {"0": ONES.tobytes()})
    assert list(read_folder(tmp_path)) == list(read_folder(tmp_path, "pt")) == ["a"]
    with pytest.raises(WeightsError, match=r"no \*\.safetensors; pass --load-format pt"):
        read_folder(tmp_path, "safetensors")
    safetensors.write_file(tmp_path / "model.safetensors", {"b": ONES})
    assert list(read_folder(tmp_path)) == ["b"] and list(read_folder(tmp_path, "pt")) == ["a"]


def test_an_index_joins_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_torch(tmp_path / f"pytorch_model-{name}.bin", {name: tensor(shape=(6,))}, {"0": ONES.tobytes()})
    index = '{"weight_map": {"a": "pytorch_model-a.bin", "b": "pytorch_model-b.bin"}}'
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    assert {name: stored.file for name, stored in read_folder(tmp_path).items()} == {
        "a": "pytorch_model-a.bin", "b": "pytorch_model-b.bin"
    }


def test_a_model_is_the_same_in_either_format(tmp_path: Path) -> None:
    sound = FIXTURES / "tiny-llama-tied"
    stored = safetensors.read_file(sound / "model.safetensors")
    from_arrays(tmp_path / "pytorch_model.bin", {name: held.data for name, held in stored.items()})
    spec, mesh = read_spec(sound), make_mesh(jax.devices()[:1])
    ours, theirs = (load_params(spec, folder, mesh, "float32") for folder in (tmp_path, sound))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
