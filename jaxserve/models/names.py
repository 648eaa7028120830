"""Tensor names of a checkpoint as one table a family, and the weight map that follows from it and the spec.

Most families differ from Llama in a few names: `replace(LLAMA, attention_out="dense")`. A block's names are without
their layer prefix; empty names are parts that the family does not have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from jaxserve.core.model_spec import Attention, Experts, GatedMlp, LatentAttention, LayerSpec, ModelSpec, MoeMlp
from jaxserve.models.weight_map import Section, Stacked, View, WeightMap

Sources = dict[str, tuple[Section, ...] | Stacked]


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """Attributes:
    layer: prefix of a block, `{}` being its index.
    qkv, gate_up: of fused tensors, rows in our order; where empty, q, k, v and gate, up are joined.
    view: how every matrix of a block is looked at (GPT-2 stores them transposed).
    """

    layer: str = "layers.{}"
    embedding: str = "embed_tokens"
    positions: str = ""
    final_norm: str = "norm"
    head: str = "lm_head"
    norm: str = "input_layernorm"
    out_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp_out_norm: str = ""
    qkv: str = ""
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    attention_out: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    gate_up: str = ""
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}"
    expert_gate: str = "gate_proj"
    expert_up: str = "up_proj"
    expert_down: str = "down_proj"
    shared: str = "mlp.shared_experts"
    shared_gate: str = "mlp.shared_expert_gate"
    ignorable: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("model.",)
    view: View | None = None


LLAMA = Names(ignorable=(r"(.*\.)?rotary_emb\.inv_freq",))


def weight_map(spec: ModelSpec, names: Names = LLAMA) -> WeightMap:
    """Where every parameter of `spec` is, if tensors have these names."""
    sources: Sources = {
        "embedding/weight": (Section(name=f"{names.embedding}.weight"),),
        "positions/weight": (Section(name=f"{names.positions}.weight"),),
        **_norm("final_norm", names.final_norm),
    }
    for kind in ("weight", "bias"):
        sources[f"head/{kind}"] = (Section(name=f"{names.head}.{kind}"),)
    for index, layer in enumerate(spec.layers):
        there = names.layer.format(index) + "."
        for path, source in _block(layer, names).items():
            sources[f"layers_{index}/{path}"] = _prefixed(source, there)
    tied = (re.escape(f"{names.head}.weight"),) if spec.is_tied else ()
    return WeightMap(sources=sources, ignorable=(*names.ignorable, *tied), prefixes=names.prefixes)


def _block(layer: LayerSpec, names: Names) -> Sources:
    return {
        **_norm("attention_norm", names.norm), **_norm("attention_out_norm", names.out_norm),
        **_norm("mlp_norm", names.mlp_norm), **_norm("mlp_out_norm", names.mlp_out_norm),
        **(
            _latent_attention(layer.attention) if isinstance(layer.attention, LatentAttention)
            else _attention(layer.attention, names)
        ),
        **_mlp(layer.mlp, names),
    }


def _attention(spec: Attention, names: Names) -> Sources:
    q_rows, kv_rows = spec.head_count * spec.head_dim, spec.kv_head_count * spec.head_dim
    sources: Sources = {
        **_norm("attention/q_norm", names.q_norm), **_norm("attention/k_norm", names.k_norm),
        "attention/sinks": (Section(name=names.sinks),),
    }
    for kind, view in (("weight", names.view), ("bias", None)):
        joined = tuple(
            Section(name=f"{name}.{kind}", rows=rows, view=view)
            for name, rows in ((names.q, q_rows), (names.k, kv_rows), (names.v, kv_rows))
        )
        fused = (Section(name=f"{names.qkv}.{kind}", view=view),)
        sources[f"attention/qkv/{kind}"] = fused if names.qkv else joined
        sources[f"attention/out/{kind}"] = (Section(name=f"{names.attention_out}.{kind}", view=view),)
    return sources


def _latent_attention(spec: LatentAttention) -> Sources:
    """Names of DeepSeek-V2; `kv_b_proj` has each head's key rows, then its value rows."""
    sources: Sources = {
        **_norm("attention/query_norm", "self_attn.q_a_layernorm"),
        **_norm("attention/latent_norm", "self_attn.kv_a_layernorm"),
    }
    query = "self_attn.q_proj" if spec.query_rank is None else "self_attn.q_b_proj"
    for path, name in (
        ("query_down", "self_attn.q_a_proj"), ("query", query), ("latent", "self_attn.kv_a_proj_with_mqa"),
        ("out", "self_attn.o_proj"),
    ):
        for kind in ("weight", "bias"):
            sources[f"attention/{path}/{kind}"] = (Section(name=f"{name}.{kind}"),)
    rows = spec.plain_dim + spec.value_dim
    for path, first, last in (("key_up", 0, spec.plain_dim), ("value_up", spec.plain_dim, rows)):
        sources[f"attention/{path}"] = Stacked(tuple(
            (Section(name="self_attn.kv_b_proj.weight", view=rows_of(head * rows + first, head * rows + last)),)
            for head in range(spec.head_count)
        ))
    return sources


def _mlp(spec: object, names: Names, path: str = "mlp") -> Sources:
    """Of a dense MLP or a mixture."""
    if isinstance(spec, MoeMlp):
        return _mixture(spec, names)
    sources: Sources = {}
    for kind, view in (("weight", names.view), ("bias", None)):
        if isinstance(spec, GatedMlp):
            halves = tuple(
                Section(name=f"{name}.{kind}", rows=spec.width, view=view) for name in (names.gate, names.up)
            )
            fused = (Section(name=f"{names.gate_up}.{kind}", view=view),)
            sources[f"{path}/gate_up/{kind}"] = fused if names.gate_up else halves
        sources[f"{path}/up/{kind}"] = (Section(name=f"{names.up}.{kind}", view=view),)
        sources[f"{path}/down/{kind}"] = (Section(name=f"{names.down}.{kind}", view=view),)
    return sources


def _mixture(spec: MoeMlp, names: Names) -> Sources:
    """A tensor an expert, as most hub checkpoints have them."""
    experts: Experts = spec.experts
    of = [names.expert.format(index) for index in range(experts.count)]
    sources: Sources = {
        "mlp/router": (Section(name=f"{names.router}.weight"),),
        "mlp/router_bias": (Section(name=f"{names.router}.bias"),),
        "mlp/router_correction": (Section(name=f"{names.router}.e_score_correction_bias"),),
        "mlp/shared_gate/weight": (Section(name=f"{names.shared_gate}.weight"),),
        "mlp/experts_gate_up": Stacked(tuple(
            (
                Section(name=f"{expert}.{names.expert_gate}.weight", rows=experts.width),
                Section(name=f"{expert}.{names.expert_up}.weight", rows=experts.width),
            )
            for expert in of
        )),
        "mlp/experts_down": Stacked(tuple((Section(name=f"{expert}.{names.expert_down}.weight"),) for expert in of)),
    }
    if spec.shared is not None:
        shared = replace(
            names, gate=f"{names.shared}.gate_proj", up=f"{names.shared}.up_proj", down=f"{names.shared}.down_proj",
            gate_up="",
        )
        sources |= _mlp(spec.shared, shared, "mlp/shared")
    return sources


def _norm(path: str, name: str) -> Sources:
    return {f"{path}/{kind}": (Section(name=f"{name}.{kind}"),) for kind in ("weight", "bias")}


def _prefixed(source: tuple[Section, ...] | Stacked, prefix: str) -> tuple[Section, ...] | Stacked:
    def add(sections: tuple[Section, ...]) -> tuple[Section, ...]:
        return tuple(replace(section, name=prefix + section.name) for section in sections)

    return Stacked(tuple(add(part) for part in source.parts)) if isinstance(source, Stacked) else add(source)


def rows_of(first: int, last: int) -> View:
    """Rows [first, last) of a stored tensor."""
    return lambda stored: stored[first:last]


def transposed(stored: object) -> object:
    """A matrix stored [in, out]; vectors stay."""
    return stored.T  # type: ignore[attr-defined]
