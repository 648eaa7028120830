"""What nearly every config.json says in the same words: sizes, and the frame around the layers.

A family takes an outline, makes its layers, and closes the frame. Knows no family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.core.model_spec import Attention, GatedMlp, LayerSpec, ModelSpec, Norm, RmsNorm
from jaxserve.models.hf import HfConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """Sizes of a model, in our words."""

    width: int
    head_count: int
    kv_head_count: int
    head_dim: int
    layer_count: int
    norm: Norm

    def attention(self, **fields: Any) -> Attention:
        """Attention of these sizes, scaled by H ** -0.5 unless `fields` say otherwise."""
        sizes: dict[str, Any] = {
            "head_count": self.head_count, "kv_head_count": self.kv_head_count, "head_dim": self.head_dim,
            "scale": self.head_dim**-0.5,
        }
        return Attention(**sizes | fields)

    def pre_norm(self, attention: Any, mlp: Any, **fields: Any) -> LayerSpec:
        """A block with a norm before attention and one before the MLP."""
        return LayerSpec(**{"attention": attention, "mlp": mlp, "norm": self.norm, "mlp_norm": self.norm} | fields)


def outline(
    config: HfConfig, *, head_dim: int | None = None, kv_head_count: int | None = None,
    head_count: int | None = None, epsilon: float = 1e-6, norm: Norm | None = None,
) -> Outline:
    """Reads the sizes.

    Args:
      head_dim, kv_head_count, epsilon: what absent attributes mean; None is width over heads, and one each.
      head_count: the same, for a family whose configs leave it out; None makes it required.
      norm: where it is not an RMSNorm with `rms_norm_eps`.
    """
    width = config.size("hidden_size")
    head_count = config.size("num_attention_heads", *(() if head_count is None else (head_count,)))
    return Outline(
        width=width,
        head_count=head_count,
        kv_head_count=config.size("num_key_value_heads", kv_head_count or head_count),
        head_dim=config.size("head_dim", head_dim or max(1, width // head_count)),
        layer_count=config.size("num_hidden_layers"),
        norm=norm or RmsNorm(epsilon=config.take("rms_norm_eps", float, epsilon)),
    )


def gated_mlp(config: HfConfig, *, width: str = "intermediate_size", has_bias: bool = False) -> GatedMlp:
    """The MLP of nearly all: SwiGLU unless `hidden_act` says otherwise."""
    return GatedMlp(width=config.size(width), activation=config.activation(), has_bias=has_bias)


def model(
    config: HfConfig, frame: Outline, layers: Sequence[LayerSpec], *, is_tied: bool = False, context: int = 2048,
    vocab: int | None = None, **fields: Any,
) -> ModelSpec:
    """The frame around the layers.

    Args:
      is_tied, context, vocab: what absent `tie_word_embeddings`, `max_position_embeddings` and `vocab_size` mean.
    """
    return ModelSpec(**{
        "family": config.architecture, "width": frame.width,
        "vocab_size": config.size("vocab_size", *(() if vocab is None else (vocab,))),
        "layers": tuple(layers), "final_norm": frame.norm,
        "is_tied": config.take("tie_word_embeddings", bool, is_tied),
        "context_length": config.context_length(context), "dtype": config.dtype(),
    } | fields)
