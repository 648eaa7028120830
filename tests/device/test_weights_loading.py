"""Checkpoints to parameters: every parameter once, fused and converted rightly, on one device and over several."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve.core.errors import ConfigError, WeightsError
from jaxserve.core.progress import NoProgress
from jaxserve.models.decoder import abstract_params
from jaxserve.models.registry import read_spec
from jaxserve.sharding.mesh import make_mesh
from jaxserve.weights.files import StoredTensor
from jaxserve.weights.folder import read_folder
from jaxserve.weights.loader import aligned_empty, is_finite, load_params, read_slice
from jaxserve.weights.random import random_params
from jaxserve.weights.rules import Assembly, Block
from jaxserve.weights.safetensors import read_file, write_file
from tests.device.fixture_models import FIXTURES, TINY_NAMES

LLAMA3 = FIXTURES / "tiny-llama3"


def mesh() -> jax.sharding.Mesh:
    return make_mesh(jax.devices()[:1])


def altered(folder: Path, source: Path = LLAMA3, *, rename: Any = None, drop: str = "", **changes: Any) -> Path:
    """A copy of a tiny checkpoint with tensors renamed, dropped or replaced."""
    tensors = {name: tensor.data for name, tensor in read_file(source / "model.safetensors").items()}
    tensors = {name: data for name, data in {**tensors, **changes}.items() if name != drop}
    write_file(folder / "model.safetensors", {(rename or str)(name): data for name, data in tensors.items()})
    shutil.copy(source / "config.json", folder)
    return folder


def load(folder: Path, dtype: Any = jnp.float32) -> dict[str, Any]:
    return load_params(read_spec(folder), folder, mesh(), dtype)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_fused_parameters_are_the_stacked_tensors(name: str) -> None:
    folder = read_folder(FIXTURES / name)
    stored = {key.removeprefix("model."): np.asarray(tensor.data, np.float32) for key, tensor in folder.items()}
    params = load(FIXTURES / name)
    abstract = abstract_params(read_spec(FIXTURES / name), jnp.float32)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    layer = params["layers_1"]
    q, k, v = (stored[f"layers.1.self_attn.{which}_proj.weight"] for which in "qkv")
    np.testing.assert_array_equal(layer["attention"]["qkv"]["weight"], np.concatenate([q, k, v]))
    np.testing.assert_array_equal(
        layer["mlp"]["gate_up"]["weight"],
        np.concatenate([stored[f"layers.1.mlp.{which}_proj.weight"] for which in ("gate", "up")]),
    )
    np.testing.assert_array_equal(layer["mlp"]["down"]["weight"], stored["layers.1.mlp.down_proj.weight"])
    if "bias" in layer["attention"]["qkv"]:
        biases = [stored[f"layers.1.self_attn.{which}_proj.bias"] for which in "qkv"]
        np.testing.assert_array_equal(layer["attention"]["qkv"]["bias"], np.concatenate(biases))
    total = sum(data.size for key, data in stored.items())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == total


def test_names_with_and_without_prefix(tmp_path: Path) -> None:
    folder = altered(tmp_path, rename=lambda name: name.removeprefix("model."))
    jax.tree.map(np.testing.assert_array_equal, load(folder), load(LLAMA3))


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    jax.tree.map(np.testing.assert_array_equal, load(altered(tmp_path, **inv_freq)), load(LLAMA3))
    tied = FIXTURES / "tiny-llama-tied"
    folder = tmp_path / "tied"
    folder.mkdir()
    copy = altered(folder, tied, **{"lm_head.weight": np.ones((320, 48), np.float16)})
    jax.tree.map(np.testing.assert_array_equal, load(copy), load(tied))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float64"])
def test_conversion_of_types(tmp_path: Path, stored: str, dtype: str) -> None:
    norm = np.linspace(-3, 3, 48).astype(stored)
    params = load(altered(tmp_path, **{"model.norm.weight": norm}), jnp.dtype(dtype))
    found = params["final_norm"]["weight"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found), norm.astype(dtype))


def test_missing_extra_and_misshaped_tensors_are_all_named(tmp_path: Path) -> None:
    folder = altered(
        tmp_path, drop="model.layers.1.mlp.up_proj.weight",
        **{
            "model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32),
            "model.layers.2.self_attn.k_proj.weight": np.ones((64, 48), np.float32),
            "model.layers.2.self_attn.v_proj.weight": np.ones((32, 48), np.int8),
        },
    )
    with pytest.raises(WeightsError) as caught:
        load(folder)
    message = str(caught.value)
    assert "1 missing: layers.1.mlp.up_proj.weight" in message
    assert "not part of the model: model.layers.0.self_attn.q_proj.bias" in message
    assert "model.layers.2.self_attn.k_proj.weight is [64, 48], expected [32, 48]" in message
    assert "v_proj.weight is int8: quantised" in message


def test_long_lists_are_cut(tmp_path: Path) -> None:
    folder = altered(tmp_path, rename=lambda name: name.replace("mlp", "ffn"))
    with pytest.raises(WeightsError, match=r"9 missing.*, ….*9 not part"):
        load(folder)


def test_a_missing_head_says_how_tying_is_spelt(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="tie_word_embeddings"):
        load(altered(tmp_path, drop="lm_head.weight"))


def test_two_spellings_of_one_tensor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="name one tensor"):
        load(altered(tmp_path, **{"norm.weight": np.ones(48, np.float32)}))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    weight = np.ones((48, 64), np.float32)
    weight[47, 63] = bad
    with pytest.raises(WeightsError, match=r"'model\.layers\.0\.self_attn\.o_proj\.weight' of model\.safetensors"):
        load(altered(tmp_path, **{"model.layers.0.self_attn.o_proj.weight": weight}), jnp.bfloat16)


def test_values_too_large_for_the_type_are_refused(tmp_path: Path) -> None:
    folder = altered(tmp_path, **{"model.norm.weight": np.full(48, 1e5, np.float32)})
    assert float(load(folder)["final_norm"]["weight"][0]) == 1e5
    with pytest.raises(WeightsError, match=r"in float16 .it is stored as float32"):
        load(folder, jnp.float16)


def test_is_finite() -> None:
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        largest = ml_dtypes.finfo(dtype).max
        assert is_finite(np.array([0, -1, largest, -largest], dtype)) and is_finite(np.empty(0, dtype))
        for bad in (np.nan, np.inf, -np.inf):
            assert not is_finite(np.array([0, bad], dtype))


def test_a_slice_takes_rows_from_the_parts_it_covers() -> None:
    """What a device of a larger mesh owns: rows that begin in one part and end in another, and columns."""
    whole = np.arange(10 * 6, dtype=np.float32).reshape(10, 6)
    blocks = tuple(
        Block(
            tensor=StoredTensor(name=str(start), file="f", data=whole[start:stop].T), at=(start, 0),
            shape=(stop - start, 6), view=np.transpose,
        )
        for start, stop in ((0, 4), (4, 5), (5, 10))
    )
    assembly = Assembly(path="p", abstract=jax.ShapeDtypeStruct((10, 6), jnp.float32), blocks=blocks)
    for start in range(10):
        for stop in range(start + 1, 11):
            index = (slice(start, stop), slice(1, 4))
            np.testing.assert_array_equal(read_slice(assembly, index, lambda amount=1: None), whole[index])


def test_progress_counts_every_byte() -> None:
    class Count(NoProgress):
        total = done = 0

        @contextmanager
        def task(self, title: str, total: int, unit: str) -> Any:
            self.total = total

            def advance(amount: int = 1) -> None:
                self.done += amount

            yield advance

    count = Count()
    load_params(read_spec(LLAMA3), LLAMA3, mesh(), jnp.float32, count)
    assert count.done == count.total > 0


def test_host_memory_becomes_the_device_array_on_the_cpu() -> None:
    """No second copy: XLA adopts aligned memory."""
    values = aligned_empty((64, 32), np.float32)
    values[...] = 1
    whole = jax.sharding.NamedSharding(mesh(), PartitionSpec())
    array = jax.make_array_from_callback((64, 32), whole, lambda index: values[index])
    assert array.unsafe_buffer_pointer() == values.ctypes.data


def test_placement_follows_the_table() -> None:
    spec = read_spec(LLAMA3)
    abstract = abstract_params(spec, jnp.float32, mesh())
    layer = abstract["layers_0"]
    assert abstract["embedding"]["weight"].sharding.spec == PartitionSpec(("model", "expert"), None)
    assert layer["attention"]["qkv"]["weight"].sharding.spec == PartitionSpec(("model", "expert"), None)
    assert layer["attention"]["out"]["weight"].sharding.spec == PartitionSpec(None, ("model", "expert"))
    assert layer["mlp"]["down"]["weight"].sharding.spec == PartitionSpec(None, ("model", "expert"))
    assert layer["mlp_norm"]["weight"].sharding.spec == PartitionSpec(None)
    loaded = load(LLAMA3)
    assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(lambda x: x.sharding, abstract)
    for size in (0, 2 * len(jax.devices())):
        with pytest.raises(ConfigError, match=f"tensor-parallel-size {size}"):
            make_mesh(jax.devices(), size)


def test_random_params_look_like_loaded_ones() -> None:
    spec = read_spec(FIXTURES / "tiny-qwen2")
    first, again, other = (random_params(spec, mesh(), jnp.bfloat16, seed) for seed in (0, 0, 1))
    abstract = abstract_params(spec, jnp.bfloat16, mesh())
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), first) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), abstract
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    weight = np.asarray(first["embedding"]["weight"], np.float32)
    assert abs(weight.std() - 0.02) < 0.001 and abs(weight.mean()) < 0.001
    assert (weight != np.asarray(other["embedding"]["weight"], np.float32)).mean() > 0.9
    assert len(np.unique(weight, axis=0)) == len(weight), "no two rows are equal"
    assert (np.asarray(first["layers_0"]["mlp_norm"]["weight"]) == 1).all()
    assert (np.asarray(first["layers_0"]["attention"]["qkv"]["bias"]) == 0).all()


def test_an_unreadable_index_names_itself(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "tiny-llama-bias-sharded", tmp_path / "copy")
    index = tmp_path / "copy" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    lost = content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=re.escape(f"'model.norm.weight' of {lost} is not listed in {index.name}")):
        load(tmp_path / "copy")
