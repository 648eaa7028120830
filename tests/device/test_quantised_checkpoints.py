"""Quantised checkpoints: each format's logits against plain weights of an oracle, the bytes kept, engines, refusals."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.core.errors import ConfigError, JaxserveError
from jaxserve.layers.context import StepContext
from jaxserve.models.decoder import Decoder, abstract_params
from jaxserve.models.hf import read_config
from jaxserve.models.registry import read_spec
from jaxserve.quantization.formats.registry import find_scheme
from jaxserve.quantization.int8 import Int8Tensor
from jaxserve.quantization.packed import PackedTensor
from jaxserve.quantization.packing import is_packed
from jaxserve.quantization.qtensor import QTensor
from jaxserve.sharding.mesh import make_mesh
from jaxserve.weights.folder import format_of
from jaxserve.weights.loader import load_params, open_checkpoint
from jaxserve.weights.packed import plan, plan_online
from jaxserve.weights.safetensors import read_file
from kernels_pallas import hopper
from kernels_pallas.eight_bit_matmul import refusals as eight_bit_refusals
from kernels_pallas.native import api as native
from kernels_pallas.native import packed as native_packed
from kernels_pallas.quantized_matmul import sizes
from kernels_pallas.quantized_matmul.api import _triton_refusals
from scripts.write_quantization import PAGE, Shown, with_table
from tests.device import gguf_folders
from tests.device.fixture_models import FIXTURES, attend_densely, read_cases
from tests.device.packed_folders import KINDS, write_folders
from tests.device.paged_forward import chunked_logits

ALL = (*KINDS, *gguf_folders.KINDS)
# Formats whose every step others show, too.
VARIANTS = {"gptq-2bit", "gptq-v2", "gptq-channel", "ct-w4a16", "ct-int8-weights", "ct-fp8-static", "squeezellm-4bit"}
VARIANTS |= gguf_folders.KINDS.keys() - {"gguf-Q4_1", "gguf-Q8_0", "gguf-Q4_K", "gguf-Q6_K"}
TOKENS = np.arange(3, 43)
# Of a row's largest number: so close to a border of two codes it becomes either, by the last bits of the layer before.
NEAR = 5e-6
BORDER = 0.02       # of the largest logit: what that may change in this token's logits and, by attention, in later ones
MXFP4 = "gpt-oss, its experts"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, tuple[Path, Path]] = {}

    def of(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            made[kind] = gguf_folders.write_quantised(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


def loaded(folder: Path, dtype: Any = jnp.float32) -> Any:
    return load_params(
        read_spec(folder), folder, make_mesh(jax.devices()[:1]), dtype,
        scheme=find_scheme(folder, read_config(folder), is_gguf=format_of(folder) == "gguf"),
    )


def logits(folder: Path, params: Any, dtype: Any = jnp.float32) -> np.ndarray:
    spec = read_spec(folder)
    # Equal blocks share a trace, which would outlive a product that a test replaces: this attention equals no other.
    model = Decoder(spec=spec, dtype=dtype, attend=functools.partial(attend_densely))
    context = StepContext(position_T=jnp.arange(len(TOKENS)), row_T=jnp.zeros_like(TOKENS), page_RM=(), work=None)
    hidden, _ = model.apply({"params": params}, TOKENS, (None,) * len(spec.layers), context, method="hidden")
    return np.asarray(model.apply({"params": params}, hidden, method="logits"), np.float32)


def rounded(x_TI: jax.Array, tensor: QTensor, shift: float = 0.0) -> jax.Array:
    """The rows as the format's activations say, spelt once more; `shift` moves their numbers, of the largest."""
    if isinstance(tensor, Int8Tensor):
        scale = jnp.abs(x_TI).max(-1, keepdims=True) / 127 if tensor.input_scale is None else tensor.input_scale
        return jnp.clip(jnp.round(x_TI / scale + 127 * shift), -128, 127) * scale
    assert isinstance(tensor, PackedTensor)
    if tensor.activations == "none":
        return x_TI
    groups = tensor.weight.scale_OG.shape[-1] if tensor.activations == "group" else 1
    x = x_TI.reshape(len(x_TI), groups, -1)
    scale = jnp.abs(x).max(-1, keepdims=True) / 448 if tensor.input_scale is None else tensor.input_scale
    codes = jnp.clip(x / scale + 448 * shift, -448, 448).astype("float8_e4m3fn")
    return (codes.astype(jnp.float32) * scale).reshape(x_TI.shape)


def matrix(tensor: QTensor) -> jax.Array:
    if isinstance(tensor, Int8Tensor):
        return tensor.codes_OI.astype(jnp.float32) * tensor.scale_O[:, None]
    assert isinstance(tensor, PackedTensor)
    return tensor.plain()


def has_activations(config: dict[str, Any]) -> bool:
    """Whether a format rounds rows."""
    return "activation_scheme" in config or "input_activations" in str(config)


def matmul(self: QTensor, x_TI: jax.Array, axis: str | None = None) -> jax.Array:
    """What a packed product should give."""
    return jnp.matmul(rounded(x_TI, self), matrix(self).T, precision="highest")


class Products:
    """What packed products of a run are given and give, in order. `apart`: how far from the reference, of its largest.

    `moved`: their rows, rounded after being moved down, not at all, and up by NEAR.
    """

    def __init__(self) -> None:
        self.apart: list[float] = []
        self.moved: list[np.ndarray] = []

    def note(self, got: np.ndarray, expected: np.ndarray, moved: np.ndarray) -> None:
        self.apart.append(float(np.abs(got - expected).max() / np.abs(expected).max()))
        self.moved.append(np.array(moved))


def products_beside(
    monkeypatch: pytest.MonkeyPatch, kinds: Iterable[type[QTensor]], reference: Callable[..., jax.Array], *,
    replace: bool = True,
) -> Products:
    """From now on products are noted, and give what the reference gives if they are to be replaced."""
    products = Products()
    for kind in kinds:
        def both(self: QTensor, x_TI: jax.Array, axis: str | None = None, product: Any = kind.matmul) -> jax.Array:
            got, expected = product(self, x_TI, axis), reference(self, x_TI)
            moved = jnp.stack([rounded(x_TI, self, shift) for shift in (-NEAR, 0, NEAR)])
            jax.debug.callback(products.note, got, expected, moved, ordered=True)
            return expected if replace else got

        monkeypatch.setattr(kind, "matmul", both)
        monkeypatch.setattr(kind, "matmul_total", QTensor.matmul_total)     # which calls it
    return products


def first_other_code(ours: Products, reference: Products) -> int:
    """The first token of which a number became another code; how many tokens there are if none.

    Where codes differ for the first time, numbers must lie on a border.
    """
    # Not the numbers alone: a row's own scale may differ by its last bit.
    differs = [~np.isclose(a[1], b[1], rtol=1e-4, atol=0) for a, b in zip(ours.moved, reference.moved, strict=True)]
    for is_other_TI, (low_TI, _, high_TI) in zip(differs, reference.moved, strict=True):
        if is_other_TI.any():
            assert (low_TI != high_TI)[is_other_TI].all(), "a number far from any border became another code"
            break
    return int(np.append(np.any([is_other_TI.any(-1) for is_other_TI in differs], 0), True).argmax())


def beside_reference(
    folder: Path, params: Any, monkeypatch: pytest.MonkeyPatch, products: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Logits of a format that rounds rows, those of the reference, and the first token of which a code differs."""
    with monkeypatch.context() as as_they_are:
        ours = products_beside(as_they_are, (Int8Tensor, PackedTensor), matmul, replace=False)
        got = logits(folder, params)
    replaced = products_beside(monkeypatch, (Int8Tensor, PackedTensor), matmul)
    expected = logits(folder, params)
    jax.effects_barrier()
    assert len(ours.apart) == products and max(ours.apart + replaced.apart) <= 1e-5, "for the same rows"
    return got, expected, first_other_code(ours, replaced)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in VARIANTS else ()) for kind in ALL]
)
def test_logits_are_those_of_the_plain_weights(
    kind: str, folders: Any, shown: dict[str, Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed_folder, plain_folder = folders(kind)
    packed, plain = loaded(packed_folder), loaded(plain_folder)
    count = 0
    for path, tensor in jax.tree_util.tree_leaves_with_path(packed, is_leaf=is_packed):
        if is_packed(tensor):
            expected = functools.reduce(lambda tree, key: tree[key.key], path, plain)
            np.testing.assert_allclose(matrix(tensor), expected, rtol=1e-6, atol=1e-7, err_msg=str(path))
            count += 1
    assert count == 8, "qkv, out, gate and up, down of two layers stay packed"
    shown[kind] = described(kind, packed)
    exact = len(TOKENS)
    if kind in gguf_folders.KINDS or not has_activations(KINDS[kind][0]):
        got, expected = logits(packed_folder, packed), logits(plain_folder, plain)
    else:
        got, expected, exact = beside_reference(packed_folder, packed, monkeypatch, products=8)
        assert np.abs(expected - logits(plain_folder, plain)).max() > 1e-3 * np.abs(expected).max(), "rounding shows"
    apart_T = np.abs(got - expected).max(-1) / np.abs(expected).max()
    assert exact > 0 and apart_T[:exact].max() <= 1e-3
    assert apart_T.max() <= BORDER, "after a number on a border"
    assert np.abs(expected).max() > 1, "the model says something"


@pytest.mark.parametrize("kind", [pytest.param("gptq-4bit", marks=pytest.mark.slow), "awq", "fp8-block"])
def test_experts_stay_packed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_folder, plain_folder = write_folders(kind, tmp_path, has_experts=True)
    packed, plain = loaded(packed_folder), loaded(plain_folder)
    for name in ("experts_gate_up", "experts_down"):
        tensor = packed["layers_1"]["mlp"][name]
        assert isinstance(tensor, PackedTensor)
        np.testing.assert_allclose(tensor.plain(), plain["layers_1"]["mlp"][name], rtol=1e-6, atol=1e-7)
    got = logits(packed_folder, packed)
    if kind == "fp8-block":
        monkeypatch.setattr(PackedTensor, "rounded", lambda self, x_TI, axis: (rounded(x_TI, self), 1.0))
        expected = logits(packed_folder, packed)
    else:
        expected = logits(plain_folder, plain)
    assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()


def test_mxfp4_experts_stay_packed(shown: dict[str, Shown]) -> None:
    """gpt-oss, against transformers' float32 logits of the decoded weights."""
    folder = FIXTURES / "families" / "gpt-oss-mxfp4"
    params, spec, stored = loaded(folder), read_spec(folder), read_file(folder / "reference.safetensors")
    tensors = [params[f"layers_{i}"]["mlp"][f"experts_{name}"] for i in (0, 1) for name in ("gate_up", "down")]
    for tensor in tensors:
        assert isinstance(tensor, PackedTensor)
        assert 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(tensor)) == 4.25 * np.prod(tensor.shape), "as stored"
    shown[MXFP4] = Shown(
        kind=MXFP4, method="mxfp4", bits=4.25, code="fp4", activations="none", cpu="xla", gpu="xla"
    )
    cases = read_cases(folder / "reference.json")
    found = chunked_logits(
        spec, params, [case.prompt_token_ids for case in cases], [case.token_ids for case in cases]
    )
    for index, logits_TV in enumerate(found):
        expected_TV = stored[f"logits_{index}"].data
        assert np.abs(logits_TV - expected_TV).max() <= 1e-3 * np.abs(expected_TV).max()


@pytest.fixture(scope="module")
def shown() -> dict[str, Shown]:
    """What passed, for the page."""
    return {}


def described(kind: str, params: Any) -> Shown:
    """The down-projection, and who would multiply it in bfloat16."""
    tensor = params["layers_0"]["mlp"]["down"]["weight"]
    bits = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(tensor)) / np.prod(tensor.shape)
    method = "gguf" if kind in gguf_folders.KINDS else KINDS[kind][0]["quant_method"]
    common = {"kind": kind, "method": method, "bits": round(float(bits), 2)}
    if isinstance(tensor, Int8Tensor):
        activations = "token" if tensor.input_scale is None else "static"
        codes_TI = jnp.zeros((1, tensor.shape[1]), jnp.int8)
        named = _named(mosaic_gpu=eight_bit_refusals(codes_TI, tensor.codes_OI))
        return Shown(**common, code="int8", activations=activations, cpu="native, else lanes and xla", gpu=named)
    assert isinstance(tensor, PackedTensor)
    assert native._variant(tensor.weight) in native_packed.VARIANTS
    x_TI = jnp.zeros((1, tensor.shape[1]), jnp.bfloat16)
    return Shown(
        **common, code=tensor.weight.code, activations=tensor.activations, cpu="native, else xla",
        gpu=_named(mosaic_gpu=_mosaic_refusals(tensor, x_TI), triton=_triton_refusals(x_TI, tensor.weight)),
    )


def _mosaic_refusals(tensor: PackedTensor, x_TI: jax.Array) -> list[str]:
    """8-bit floats meet rounded rows in a product of their own."""
    weight = tensor.weight
    if weight.code == "fp8" and tensor.activations != "none":
        return eight_bit_refusals(x_TI, weight.code_OC, weight.scale_OG if weight.scale_OG.shape[1] > 1 else None)
    return sizes.refusals(x_TI, weight)


def _named(**refusals: list[str]) -> str:
    """Who multiplies on GPUs: XLA, and those that have nothing but this machine against them."""
    here = (["needs a GPU, the target is 'cpu'"], hopper.environment_refusals())
    named = [name for name, against in refusals.items() if against in here]
    return f"xla ({', '.join(named)} by name)" if named else "xla"


def test_the_table_is_what_these_tests_showed(shown: dict[str, Shown], request: pytest.FixtureRequest) -> None:
    """docs/quantization.md; `make docs` writes it by running this file."""
    if not shown.keys() >= {*ALL, MXFP4}:
        pytest.skip("not every format was run, or one failed")
    text = with_table(PAGE.read_text(), shown.values())
    if request.config.getoption("--write-docs"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text, "docs/quantization.md is old: run `make docs`"


def test_fp8_online_takes_the_nearest_floats_of_each_output(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, mesh = FIXTURES / "tiny-llama-tied", make_mesh(jax.devices()[:1])
    spec = read_spec(folder)
    plain = load_params(spec, folder, mesh, jnp.float32)
    made = load_params(spec, folder, mesh, jnp.float32, packing=plan_online(spec, "fp8", mesh))
    tensor, weight = (tree["layers_0"]["mlp"]["down"]["weight"] for tree in (made, plain))
    scale = np.abs(weight).max(1, keepdims=True) / 448
    expected = (weight / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_allclose(tensor.plain(), expected, rtol=1e-6)
    got, exact = logits(folder, made), logits(folder, plain)
    assert 0.95 < np.corrcoef(got.ravel(), exact.ravel())[0, 1] < 0.999, "rounding shows, but little"
    ours, reference, same = beside_reference(folder, made, monkeypatch, products=12)
    apart_T = np.abs(ours - reference).max(-1) / np.abs(reference).max()
    assert same > 0 and apart_T[:same].max() <= 1e-3
    rounding_T = np.abs(got - exact).max(-1) / np.abs(reference).max()
    assert apart_T.max() < rounding_T.max(), "after a number on a border all is rounded anew, no worse"


@pytest.mark.parametrize("kind", ["gptq-4bit", "gptq-8bit", "ct-w8a8", "fp8-block", "ct-fp8"])
def test_in_bfloat16_the_fast_product_says_the_same(kind: str, folders: Any) -> None:
    packed_folder, _ = folders(kind)
    exact = logits(packed_folder, loaded(packed_folder))
    got = logits(packed_folder, loaded(packed_folder, jnp.bfloat16), jnp.bfloat16)
    assert np.abs(got - exact).max() <= 0.06 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("kind", "bits"), [("gptq-4bit", 4.75), ("awq", 4.75), ("gptq-8bit", 8.75), ("ct-w8a8", 8.25)]
)
def test_matrices_take_the_bytes_that_are_planned(kind: str, bits: float, folders: Any) -> None:
    """Codes, a float16 scale and a byte of zero a group of 32; a float32 scale an output."""
    folder, _ = folders(kind)
    spec, mesh = read_spec(folder), make_mesh(jax.devices()[:1])
    scheme = find_scheme(folder, read_config(folder))
    packing = plan(spec, mesh, open_checkpoint(spec, folder, scheme=scheme))
    planned, made = abstract_params(spec, jnp.bfloat16, mesh, packing), loaded(folder, jnp.bfloat16)
    assert jax.tree.structure(made) == jax.tree.structure(planned)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(made)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(planned)
    ]
    down = made["layers_0"]["mlp"]["down"]["weight"]
    assert 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(down)) == bits * 64 * 128


def answers(folder: Path, **options: Any) -> list[list[int]]:
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": list(range(3 + i, 9 + 3 * i))} for i in range(4)]
    with LLM(
        str(folder), dtype="float32", max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32, block_size=8,
        kv_cache_memory_bytes="1M", enforce_eager=True, skip_tokenizer_init=True, **options,
    ) as llm:
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, greedy)]


@pytest.mark.parametrize("kind", ["gptq-desc_act", "awq"])
def test_the_engine_answers_as_with_plain_weights(kind: str, folders: Any) -> None:
    packed_folder, plain_folder = folders(kind)
    assert answers(packed_folder) == answers(plain_folder)
    assert answers(packed_folder, quantization=kind.partition("-")[0])


def test_the_flag_must_agree_with_the_checkpoint(folders: Any) -> None:
    packed_folder, plain_folder = folders("awq")
    with pytest.raises(ConfigError, match="quantization gptq: the checkpoint is quantised by awq"):
        answers(packed_folder, quantization="gptq")
    with pytest.raises(ConfigError, match="quantization int8: the checkpoint is quantised by awq"):
        answers(packed_folder, quantization="int8")
    with pytest.raises(ConfigError, match="quantization awq: the checkpoint is not quantised so"):
        answers(plain_folder, quantization="awq")
    with pytest.raises(ConfigError, match="load-format dummy: a checkpoint in awq has no dummy weights"):
        answers(packed_folder, load_format="dummy")


@pytest.mark.parametrize(("kind", "changes", "says"), [
    ("gptq-4bit", {"bits": 5}, "bits 5 of gptq is not supported; supported are 4, 8, 3, 2"),
    ("gptq-4bit", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ("gptq-4bit", {"dynamic": {"-:.*q_proj": {}}}, "q_proj is packed, but dynamic leaves it out"),
    ("gptq-4bit", {"group_size": 48}, "64 inputs are no multiple of the group size 48"),
    ("gptq-4bit", {"bits": 8}, r"q_proj.qzeros is int32 \[2, 8\]; expected int32 or uint32 \[1, 16\]"),
    ("gptq-4bit", {"quant_method": "aqlm"}, "quant_method 'aqlm' is not supported; supported are gptq, awq"),
    ("awq", {"version": "gemv"}, "version 'gemv' of awq is not supported"),
    ("awq", {"group_size": 0}, "group_size is 0"),
    ("ct-w4a16", {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' of compressed-tensors"),
    ("ct-w4a16", {"config_groups": {}}, "config_groups of compressed-tensors is empty"),
    ("fp8-block", {"fmt": "e5m2"}, "fmt 'e5m2' of fp8"),
    ("fp8-block", {"activation_scheme": "stochastic"}, "activation_scheme 'stochastic'"),
    ("fp8-block", {"weight_block_size": [32, 32]}, r"weight_scale_inv is float32 \[.*\]; expected"),
])
def test_what_cannot_be_read_is_refused_by_name(
    kind: str, changes: dict[str, Any], says: str, folders: Any, tmp_path: Path
) -> None:
    packed_folder, _ = folders(kind)
    config = json.loads((packed_folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((packed_folder / "model.safetensors").read_bytes())
    with pytest.raises(JaxserveError, match=says):
        loaded(tmp_path)
