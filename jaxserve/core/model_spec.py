"""A model as data: frozen, hashable, complete. Knows no file format, no jax and no weights.

Variants are sum types, not flags: what a layer computes is which class its fields hold. `models.decoder` reads it,
`models.families.*` write it from a `config.json`, memory planning counts with it.
Invariant: two models of equal spec compile to equal programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DefaultRope:
    """Rotary embedding of Su et al. 2021 in the half-split ("neox") layout: frequencies theta^(-2i/dim)."""

    theta: float
    dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRope:
    """Positions divided by `factor` (position interpolation)."""

    theta: float
    dim: int
    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Rope:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a ramp between."""

    theta: float
    dim: int
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int


Rope = DefaultRope | LinearRope | Llama3Rope


@dataclass(frozen=True, slots=True)
class Global:
    """Causal attention over everything before."""


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """Causal attention over the newest `size` positions, the query's own included."""

    size: int


Span = Global | SlidingWindow


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Grouped-query attention."""

    head_count: int                  # N
    kv_head_count: int               # K
    head_dim: int                    # H
    rope: Rope
    span: Span = Global()
    scale: float                     # of the scores, usually H ** -0.5
    has_qkv_bias: bool = False
    has_out_bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseMlp:
    """Gated MLP: down(act(gate(x)) * up(x))."""

    width: int                       # F
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    has_bias: bool = False


Mlp = DenseMlp


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    attention: Attention
    mlp: Mlp
    norm_epsilon: float


@dataclass(frozen=True, kw_only=True, slots=True)
class KvGroup:
    """Layers whose keys and values have equal geometry and window: one page table, one prefix rule."""

    layers: tuple[int, ...]
    kv_head_count: int
    head_dim: int
    window: int | None

    def page_bytes(self, page_size: int, itemsize: int) -> int:
        """Bytes of one page over all layers of the group, keys and values."""
        return 2 * len(self.layers) * self.kv_head_count * self.head_dim * page_size * itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A decoder-only language model."""

    family: str                      # the config.json class name, e.g. "LlamaForCausalLM"
    width: int                       # D
    vocab_size: int                  # V, rows of the embedding
    layers: tuple[LayerSpec, ...]
    norm_epsilon: float              # of the final norm
    is_tied: bool                    # logits use the embedding's weights
    context_length: int              # what the model was made for: max_position_embeddings
    dtype: DType                     # of the checkpoint, as config.json states it

    @property
    def kv_groups(self) -> tuple[KvGroup, ...]:
        """Layers gathered by geometry and window, in order of first appearance."""
        found: dict[tuple[int, int, int | None], list[int]] = {}
        for index, layer in enumerate(self.layers):
            a = layer.attention
            window = a.span.size if isinstance(a.span, SlidingWindow) else None
            found.setdefault((a.kv_head_count, a.head_dim, window), []).append(index)
        return tuple(
            KvGroup(layers=tuple(members), kv_head_count=kv, head_dim=dim, window=window)
            for (kv, dim, window), members in found.items()
        )
