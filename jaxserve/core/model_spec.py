"""A model as data: frozen, hashable, complete. Knows no file format, no jax and no weights.

Variants are sum types, not flags: what a layer computes is which class its fields hold. `models.decoder` reads it,
`models.families.*` write it from a `config.json`, memory planning counts with it.
Invariant: two models of equal spec compile to equal programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxserve.core.rope import LongRope, Rope

DType = Literal["float32", "bfloat16", "float16"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RmsNorm:
    """x / rms(x) * (weight + offset); the offset is 1 where checkpoints store weights around zero (Gemma)."""

    epsilon: float
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerNorm:
    """(x - mean(x)) / deviation(x) * weight + bias."""

    epsilon: float
    has_bias: bool = True


Norm = RmsNorm | LayerNorm


@dataclass(frozen=True, slots=True)
class Global:
    """Causal attention over everything before."""


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """Causal attention over the newest `size` positions, the query's own included."""

    size: int


Span = Global | SlidingWindow


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadNorm:
    """Queries and keys normalised before they turn: each head for itself, or all heads of a token together.

    Attributes:
      query_count, kv_count: heads that "all heads" are, where other devices have some of them.
    """

    norm: Norm
    over: Literal["head", "all heads"]
    query_count: int | None = None
    kv_count: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Grouped-query attention."""

    head_count: int                  # N
    kv_head_count: int               # K
    head_dim: int                    # H
    rope: Rope | None                # None: positions are learned, or this layer knows none (NoPE)
    span: Span = Global()
    scale: float                     # of the scores, usually H ** -0.5
    soft_cap: float | None = None    # scores become cap * tanh(score / cap)
    has_sinks: bool = False          # a learned logit a head that counts in the softmax and has no value
    head_norm: HeadNorm | None = None
    qkv_clip: float | None = None    # q, k (after their norm) and v are clipped to [-clip, clip]
    has_qkv_bias: bool = False
    has_out_bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Multi-head latent attention of DeepSeek-V2 (arXiv 2405.04434): what is cached is one latent vector a token and
    one rotated key that all heads share; keys and values of the heads are read out of it by absorbed products.
    """

    head_count: int                  # N
    query_rank: int | None           # of the compressed query; None: projected at once
    latent_dim: int                  # kv_lora_rank
    plain_dim: int                   # of a head's query and key that do not turn
    rope_dim: int                    # of those that turn
    value_dim: int                   # of a head's value
    rope: Rope
    span: Span = Global()
    scale: float
    norm: Norm                       # of the latent, and of the compressed query
    has_bias: bool = False           # of the down projections and the output


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedMlp:
    """down(act(gate(x)) * up(x))."""

    width: int                       # F
    activation: Activation = "silu"
    has_bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainMlp:
    """down(act(up(x)))."""

    width: int
    activation: Activation
    has_bias: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    """Which experts a token goes to, and with what weights.

    Attributes:
      score: what router logits become before the best are taken.
      normalise: weights of the chosen experts are divided by their sum.
      scale: weights are multiplied by it in the end.
      has_bias: the logits have a bias.
      has_correction: a learned bias a score that counts in the choice and not in the weight (DeepSeek-V3).
      group_count, group_top: experts lie in groups; only those of the best groups can be chosen.
      group_score: what a group is judged by, the best of its scores or the sum of the best two.
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = False
    scale: float = 1.0
    has_bias: bool = False
    has_correction: bool = False
    group_count: int = 1
    group_top: int = 1
    group_score: Literal["best", "best two"] = "best"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClampedSwiglu:
    """gpt-oss: gate * sigmoid(alpha * gate) * (up + 1), gate clipped from above, up from both sides."""

    alpha: float
    limit: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """Gated MLPs, all of one width.

    Attributes:
      count_here: of `count` those that one device has, where whole experts are shared out; None: all of them.
    """

    count: int                       # E
    width: int                       # F of one expert
    activation: Activation | ClampedSwiglu = "silu"
    has_bias: bool = False
    count_here: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeMlp:
    """A mixture of experts: each token goes to a few of them; a shared MLP, if any, is added for every token."""

    experts: Experts
    router: Router
    chosen: int                      # X: experts a token
    shared: GatedMlp | None = None
    has_shared_gate: bool = False    # the shared MLP's output is weighted by sigmoid(gate · x)


Mlp = GatedMlp | PlainMlp | MoeMlp


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One block: attention and an MLP, each added to the residual stream.

    Attributes:
      order: "sequential": the MLP sees the stream after attention; "parallel": both see the stream before it.
      norm, mlp_norm: of what attention and MLP see. A parallel block without `mlp_norm` shares `norm`.
      out_norm, mlp_out_norm: of what they give, before it is added.
      residual_scale: of what is added.
    """

    attention: Attention | LatentAttention
    mlp: Mlp
    order: Literal["sequential", "parallel"] = "sequential"
    norm: Norm | None
    mlp_norm: Norm | None
    out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None
    residual_scale: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedPositions:
    """An embedding of positions, added to that of tokens; the row of position p is p + offset."""

    count: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class KvGroup:
    """Layers whose cache has equal geometry and window: one page table, one prefix rule.

    A latent cache (MLA) is one kv head whose values are a part of its keys, so it stores no values. A recurrent state
    would be a further kind beside these: one record a sequence instead of pages.
    """

    layers: tuple[int, ...]
    kv_head_count: int
    head_dim: int
    has_values: bool
    window: int | None

    def page_bytes(self, page_size: int, itemsize: int, scale_bytes: int = 0) -> int:
        """Bytes of one page over all layers of the group, keys and values; of codes with a scale a slot and head."""
        planes = 2 if self.has_values else 1
        return planes * len(self.layers) * self.kv_head_count * page_size * (self.head_dim * itemsize + scale_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A decoder-only language model."""

    family: str                      # the config.json class name, e.g. "LlamaForCausalLM"
    width: int                       # D
    vocab_size: int                  # V, rows of the embedding
    layers: tuple[LayerSpec, ...]
    final_norm: Norm
    is_tied: bool                    # logits use the embedding's weights
    has_head_bias: bool = False
    embedding_scale: float = 1.0
    positions: LearnedPositions | None = None
    logit_scale: float = 1.0
    logit_cap: float | None = None   # logits become cap * tanh(logit / cap)
    context_length: int              # what the model was made for: max_position_embeddings
    dtype: DType                     # of the checkpoint, as config.json states it

    @property
    def rope_switch(self) -> int | None:
        """Length up to which a sequence's keys turn one way (LongRope's short factors) and past which another."""
        scalings = (layer.attention.rope.scaling for layer in self.layers if layer.attention.rope is not None)
        return min((s.original_context_length for s in scalings if isinstance(s, LongRope)), default=None)

    @property
    def kv_groups(self) -> tuple[KvGroup, ...]:
        """Layers gathered by geometry and window, in order of first appearance."""
        found: dict[tuple[int, int, bool, int | None], list[int]] = {}
        for index, layer in enumerate(self.layers):
            a = layer.attention
            window = a.span.size if isinstance(a.span, SlidingWindow) else None
            if isinstance(a, LatentAttention):
                geometry = (1, a.latent_dim + a.rope_dim, False, window)
            else:
                geometry = (a.kv_head_count, a.head_dim, True, window)
            found.setdefault(geometry, []).append(index)
        return tuple(
            KvGroup(layers=tuple(members), kv_head_count=kv, head_dim=dim, has_values=has_values, window=window)
            for (kv, dim, has_values, window), members in found.items()
        )
