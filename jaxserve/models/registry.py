"""The table of model families, and the way from a folder's config.json to a ModelSpec. A family adds one line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxserve.core.errors import UnsupportedModelError
from jaxserve.core.model_spec import ModelSpec
from jaxserve.models.families import llama, qwen2
from jaxserve.models.hf import HfConfig, read_config
from jaxserve.models.weight_map import WeightMap


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How one config.json class becomes a spec, and where its weights are."""

    spec: Callable[[HfConfig], ModelSpec]
    weights: Callable[[ModelSpec], WeightMap]


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(spec=llama.spec, weights=llama.weights),
    "Qwen2ForCausalLM": Family(spec=qwen2.spec, weights=qwen2.weights),
}


def read_spec(folder: Path, overrides: Mapping[str, object] | None = None) -> ModelSpec:
    """The model of a folder, `--hf-overrides` applied first. Raises ModelError where it cannot be computed exactly."""
    return spec_from_config(read_config(folder, overrides))


def spec_from_config(content: Mapping[str, object]) -> ModelSpec:
    """The model that the content of a config.json describes."""
    config = HfConfig(content)
    spec = family(config.architecture).spec(config)
    config.finish()
    for index, layer in enumerate(spec.layers):
        a = layer.attention
        if a.head_count % a.kv_head_count or a.head_dim % 2:
            raise UnsupportedModelError(
                f"config.json: layer {index} has {a.head_count} query heads, {a.kv_head_count} key-value heads of size "
                f"{a.head_dim}; the first must be a multiple of the second, the size even"
            )
    return spec


def family(architecture: str) -> Family:
    """The family of a config.json class name."""
    if architecture not in FAMILIES:
        near = difflib.get_close_matches(architecture, FAMILIES, 1)
        raise UnsupportedModelError(
            f"architecture {architecture!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
            + (f" (the nearest is {near[0]})" if near else "")
        )
    return FAMILIES[architecture]
