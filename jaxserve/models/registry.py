"""The table of model families, and the way from a folder's config.json to a ModelSpec. A family adds one line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxserve.core.errors import UnsupportedModelError
from jaxserve.core.model_spec import Attention, ModelSpec
from jaxserve.models.families import (
    cohere,
    deepseek,
    exaone4,
    gemma,
    glm,
    gpt_oss,
    granite,
    llama,
    mixtral,
    older,
    olmo,
    phi,
    qwen,
    qwen_moe,
    smollm3,
    starcoder2,
)
from jaxserve.models.hf import HfConfig, read_config
from jaxserve.models.weight_map import WeightMap


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How one config.json class becomes a spec, and where its weights are."""

    spec: Callable[[HfConfig], ModelSpec]
    weights: Callable[[ModelSpec], WeightMap]


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(spec=llama.spec, weights=llama.weights),
    "MistralForCausalLM": Family(spec=llama.mistral, weights=llama.weights),
    "Qwen2ForCausalLM": Family(spec=qwen.qwen2, weights=qwen.weights),
    "Qwen3ForCausalLM": Family(spec=qwen.qwen3, weights=qwen.weights),
    "Phi3ForCausalLM": Family(spec=phi.phi3, weights=phi.phi3_weights),
    "SmolLM3ForCausalLM": Family(spec=smollm3.spec, weights=smollm3.weights),
    "GraniteForCausalLM": Family(spec=granite.spec, weights=granite.weights),
    "Olmo2ForCausalLM": Family(spec=olmo.spec, weights=olmo.weights),
    "Olmo3ForCausalLM": Family(spec=olmo.spec, weights=olmo.weights),
    "Glm4ForCausalLM": Family(spec=glm.glm4, weights=glm.glm4_weights),
    "Starcoder2ForCausalLM": Family(spec=starcoder2.spec, weights=starcoder2.weights),
    "Exaone4ForCausalLM": Family(spec=exaone4.spec, weights=exaone4.weights),
    "GemmaForCausalLM": Family(spec=gemma.gemma, weights=gemma.weights),
    "Gemma2ForCausalLM": Family(spec=gemma.gemma2, weights=gemma.weights),
    "Gemma3ForCausalLM": Family(spec=gemma.gemma3, weights=gemma.weights),
    "Gemma3ForConditionalGeneration": Family(spec=gemma.gemma3_text_part, weights=gemma.weights),
    "Cohere2ForCausalLM": Family(spec=cohere.spec, weights=cohere.weights),
    "MixtralForCausalLM": Family(spec=mixtral.spec, weights=mixtral.weights),
    "Qwen2MoeForCausalLM": Family(spec=qwen_moe.qwen2, weights=qwen_moe.weights),
    "Qwen3MoeForCausalLM": Family(spec=qwen_moe.qwen3, weights=qwen_moe.weights),
    "OlmoeForCausalLM": Family(spec=olmo.olmoe, weights=olmo.olmoe_weights),
    "GptOssForCausalLM": Family(spec=gpt_oss.spec, weights=gpt_oss.weights),
    "DeepseekV2ForCausalLM": Family(spec=deepseek.v2, weights=deepseek.weights),
    "DeepseekV3ForCausalLM": Family(spec=deepseek.v3, weights=deepseek.weights),
    "Glm4MoeForCausalLM": Family(spec=glm.glm4_moe, weights=glm.glm4_moe_weights),
    "GPT2LMHeadModel": Family(spec=older.gpt2, weights=older.gpt2_weights),
    "OPTForCausalLM": Family(spec=older.opt, weights=older.opt_weights),
    "GPTNeoXForCausalLM": Family(spec=older.gpt_neox, weights=older.gpt_neox_weights),
    "PhiForCausalLM": Family(spec=phi.phi, weights=phi.phi_weights),
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
        if isinstance(a, Attention) and (a.head_count % a.kv_head_count or a.head_dim % 2):
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
