"""Quantised checkpoints that leave modules as they were, have settings a module, or bring scales of a cache along."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.quantization.joined import JoinedTensor
from jaxserve.quantization.packing import is_packed, path_of
from jaxserve.weights.safetensors import read_file, write_file
from tests.device.packed_folders import write_folders
from tests.device.test_quantised_checkpoints import loaded, logits

ATTENTION = [f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"]
DOWN, Q = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"

MATRICES = {
    f"layers_{layer}/{name}"
    for layer in (0, 1) for name in ("attention/qkv", "attention/out", "mlp/gate_up", "mlp/down")
}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.data for name, tensor in read_file(folder / "model.safetensors").items()}


def rewritten(
    folder: Path, into: Path, config: dict[str, Any], *, without: Sequence[str] = (), more: dict[str, Any]
) -> Path:
    """A folder with other settings of its quantisation, without some modules' tensors, with others."""
    kept = {name: data for name, data in tensors(folder).items() if not name.startswith(tuple(without))}
    into.mkdir()
    write_file(into / "model.safetensors", kept | more)
    content = json.loads((folder / "config.json").read_text())
    if config:
        content["quantization_config"] |= config
    (into / "config.json").write_text(json.dumps(content))
    return into


def packed_paths(params: Any) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_packed)
    return {path_of(path).removesuffix("/weight") for path, leaf in leaves if is_packed(leaf)}


@pytest.mark.parametrize(("kind", "left", "settings"), [
    ("gptq-4bit", [DOWN, Q], {"dynamic": {rf"-:{DOWN}": {}, r"-:.*\.0\..*q_proj": {}}}),
    pytest.param("awq", [DOWN, *ATTENTION], {
        "modules_to_not_convert": ["layers.0.mlp.down_proj", "layers.1.self_attn"]
    }, marks=pytest.mark.slow),
    ("ct-w4a16", [DOWN, *ATTENTION], {"ignore": [DOWN, r"re:.*layers\.1\.self_attn.*"]}),
    pytest.param("ct-int8-weights", [DOWN, *ATTENTION], {
        "ignore": [DOWN, r"re:.*layers\.1\.self_attn.*"]
    }, marks=pytest.mark.slow),
    pytest.param("bitsandbytes-nf4", [DOWN, Q], {"llm_int8_skip_modules": [DOWN, Q]}, marks=pytest.mark.slow),
])
def test_modules_that_are_left_unquantised_stay_so(
    kind: str, left: list[str], settings: dict[str, Any], tmp_path: Path
) -> None:
    """A matrix that is fused with one of them is decoded; all others stay packed."""
    packed_folder, plain_folder = write_folders(kind, tmp_path / "whole")
    plain_of = tensors(plain_folder)
    folder = rewritten(
        packed_folder, tmp_path / "left", settings, without=[f"{module}." for module in left],
        more={f"{module}.weight": plain_of[f"{module}.weight"] for module in left},
    )
    params, plain = loaded(folder), loaded(plain_folder)
    gone = {"layers_0/mlp/down"}
    gone |= {"layers_0/attention/qkv"} if Q in left else {"layers_1/attention/qkv", "layers_1/attention/out"}
    assert packed_paths(params) == MATRICES - gone
    got, expected = logits(folder, params), logits(plain_folder, plain)
    assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()


def test_modules_may_have_bits_of_their_own(tmp_path: Path) -> None:
    """GPTQModel's rules: down-projections, and v beside q and k, in 8 bits."""
    four, four_plain = write_folders("gptq-4bit", tmp_path / "four")
    eight, eight_plain = write_folders("gptq-8bit", tmp_path / "eight")
    modules = [f"model.layers.{layer}.{name}." for layer in (0, 1) for name in ("mlp.down_proj", "self_attn.v_proj")]
    settings = {"dynamic": {r"+:.*\.(down|v)_proj": {"bits": 8}}}
    folder, plain_folder = (
        rewritten(of_four, tmp_path / f"mixed-{number}", config, without=modules, more={
            name: data for name, data in tensors(of_eight).items() if name.startswith(tuple(modules))
        }) for number, (of_four, of_eight, config) in enumerate((
            (four, eight, settings), (four_plain, eight_plain, {}),
        ))
    )
    params = loaded(folder)
    qkv = params["layers_0"]["attention"]["qkv"]["weight"]
    assert isinstance(qkv, JoinedTensor) and [part.weight.code for part in qkv.parts] == ["int4", "int8"]
    got, expected = logits(folder, params), logits(plain_folder, loaded(plain_folder))
    assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()


def test_stored_scales_of_a_cache_are_passed_over(tmp_path: Path) -> None:
    """Under the names of llm-compressor, AutoFP8 and their older versions; the cache measures its own."""
    whole, _ = write_folders("ct-fp8-static", tmp_path / "whole")
    names = ("k_scale", "v_scale", "kv_scale", "k_proj.output_scale", "v_proj.output_scale")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    folder = rewritten(whole, tmp_path / "more", {"kv_cache_scheme": scheme}, more={
        f"model.layers.0.self_attn.{name}": np.array([0.5], np.float32) for name in names
    })
    got, expected = (jax.tree.leaves(loaded(path)) for path in (folder, whole))
    for one, other in zip(got, expected, strict=True):
        assert jnp.array_equal(one, other)
