"""gpt-oss 20B and 120B: sinks in the softmax, every other layer slides, biases, a mixture of clamped SwiGLUs.

Experts are stored as one tensor a layer, [E, in, out], gate and up in alternate columns; or as MXFP4 blocks, which
`weights.packed` shows in that same form.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from jaxserve.core.errors import UnsupportedModelError
from jaxserve.core.model_spec import ClampedSwiglu, Experts, ModelSpec, MoeMlp, Router
from jaxserve.models.hf import HfConfig
from jaxserve.models.names import LLAMA, weight_map
from jaxserve.models.outline import model, outline
from jaxserve.models.weight_map import Section, Stacked, WeightMap


def spec(config: HfConfig) -> ModelSpec:
    """The chosen experts are weighted by the softmax of their own logits."""
    frame = outline(config, head_dim=64, kv_head_count=8, epsilon=1e-5)
    quantised = config.take("quantization_config", dict, {})
    if quantised and quantised.get("quant_method") != "mxfp4":
        raise UnsupportedModelError(f"config.json: gpt-oss weights as {quantised.get('quant_method')!r} are not read")
    rope = config.rope(frame.head_dim, theta=150000.0)
    has_bias = config.take("attention_bias", bool, True)
    config.expect("hidden_act", "silu")
    config.take("initial_context_length", int, None)     # the rope's original length once more
    mlp = MoeMlp(
        experts=Experts(
            count=config.size_of(("num_local_experts", "num_experts"), 128),
            width=config.size("intermediate_size"), has_bias=True,
            activation=ClampedSwiglu(
                alpha=config.take("swiglu_alpha", float, 1.702), limit=config.take("swiglu_limit", float, 7.0)
            ),
        ),
        router=Router(normalise=True, has_bias=True),
        chosen=config.size_of(("num_experts_per_tok", "experts_per_token"), 4),
    )
    layers = [
        frame.pre_norm(
            frame.attention(rope=rope, span=span, has_sinks=True, has_qkv_bias=has_bias, has_out_bias=has_bias), mlp
        )
        for span in config.spans(
            frame.layer_count, lambda i: "sliding_attention" if (i + 1) % 2 else "full_attention", window=128
        )
    ]
    return model(config, frame, layers, context=131072)


def weights(spec: ModelSpec) -> WeightMap:
    found = weight_map(spec, replace(LLAMA, router="mlp.router"))
    for index, layer in enumerate(spec.layers):
        assert isinstance(layer.mlp, MoeMlp)
        found.sources.update(_experts(f"layers_{index}/mlp/", f"layers.{index}.mlp.experts.", layer.mlp.experts))
    return found


def _experts(here: str, there: str, experts: Experts) -> dict[str, tuple[Section, ...] | Stacked]:
    gate_up, down = f"{there}gate_up_proj", f"{there}down_proj"

    def halves(name: str, expert: int) -> tuple[Section, ...]:
        return tuple(
            Section(name=name, rows=experts.width, view=partial(_columns, expert=expert, first=first))
            for first in (0, 1)
        )

    return {
        f"{here}experts_gate_up": Stacked(tuple(halves(gate_up, e) for e in range(experts.count))),
        f"{here}experts_gate_up_bias": Stacked(tuple(halves(f"{gate_up}_bias", e) for e in range(experts.count))),
        f"{here}experts_down": Stacked(tuple(
            (Section(name=down, view=partial(_matrix, expert=e)),) for e in range(experts.count)
        )),
        f"{here}experts_down_bias": (Section(name=f"{down}_bias"),),
    }


def _columns(stored: Any, *, expert: int, first: int) -> Any:
    """Every other output of one expert, as rows."""
    return stored[expert].T[first::2]


def _matrix(stored: Any, *, expert: int) -> Any:
    return stored[expert].T
