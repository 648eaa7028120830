"""DeepSeek-V2 and V3, R1, Kimi-K2: latent attention, and mixtures with shared experts behind a few dense layers."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.core.errors import UnsupportedModelError
from jaxserve.core.model_spec import Experts, GatedMlp, LatentAttention, ModelSpec, MoeMlp, RmsNorm, Router
from jaxserve.models.hf import HfConfig
from jaxserve.models.hf_rope import mscale_of
from jaxserve.models.names import LLAMA, weight_map
from jaxserve.models.outline import model, outline
from jaxserve.models.weight_map import WeightMap


def v2(config: HfConfig) -> ModelSpec:
    """Softmax routing; `group_limited_greedy` chooses among the experts of the best groups."""
    method = config.take("topk_method", str, "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise UnsupportedModelError(f"config.json: topk_method {method!r}; implemented: greedy, group_limited_greedy")
    if config.take("norm_topk_prob", bool, False):
        raise UnsupportedModelError("config.json: norm_topk_prob = true: DeepSeek-V2's references disagree about it")
    groups, top = config.take("n_group", int, 1), config.take("topk_group", int, 1)
    router = Router(
        scale=config.take("routed_scaling_factor", float, 1.0),
        group_count=groups if method == "group_limited_greedy" else 1, group_top=top,
    )
    config.expect("scoring_func", "softmax")
    return _spec(config, router, dense=0, pairs_default=True)


def v3(config: HfConfig) -> ModelSpec:
    """Sigmoid routing with a correction that counts in the choice only."""
    config.expect("topk_method", "noaux_tc")
    return _spec(config, sigmoid_router(config, groups=8, scale=2.5), dense=3, pairs_default=True)


def _spec(config: HfConfig, router: Router, *, dense: int, pairs_default: bool) -> ModelSpec:
    config.take("head_dim", int, None)          # says what turns, which qk_rope_head_dim says too
    config.take("qk_head_dim", int, None)
    frame = outline(config)
    plain, turning = config.size("qk_nope_head_dim", 128), config.size("qk_rope_head_dim", 64)
    is_interleaved = config.take("rope_interleave", bool, pairs_default)
    rope = config.rope(turning, pairs="neighbours" if is_interleaved else "halves")
    attention = LatentAttention(
        head_count=frame.head_count, query_rank=config.take("q_lora_rank", int, None),
        latent_dim=config.size("kv_lora_rank", 512), plain_dim=plain, rope_dim=turning,
        value_dim=config.size("v_head_dim", 128), rope=rope, norm=RmsNorm(epsilon=1e-6),
        scale=(plain + turning) ** -0.5 * _score_growth(config), has_bias=config.take("attention_bias", bool, False),
    )
    layers = [frame.pre_norm(attention, mlp) for mlp in mlps(config, frame.layer_count, router, dense=dense)]
    return model(config, frame, layers)


def _score_growth(config: HfConfig) -> float:
    """What a stretched rope multiplies scores by: mscale(factor, mscale_all_dim) squared."""
    fields = config.rope_fields()
    if fields.get("rope_type", fields.get("type", "default")) == "default" or not fields.get("mscale_all_dim"):
        return 1.0
    return mscale_of(fields["factor"], fields["mscale_all_dim"]) ** 2


def sigmoid_router(config: HfConfig, *, groups: int, scale: float) -> Router:
    """DeepSeek-V3's; the arguments are what absent attributes mean."""
    config.expect("scoring_func", "sigmoid")
    return Router(
        score="sigmoid", has_correction=True, normalise=config.take("norm_topk_prob", bool, True),
        scale=config.take("routed_scaling_factor", float, scale), group_score="best two",
        group_count=config.size("n_group", groups), group_top=config.size("topk_group", max(1, groups // 2)),
    )


def mlps(config: HfConfig, layer_count: int, router: Router, *, dense: int) -> list[GatedMlp | MoeMlp]:
    """Dense in the first layers, then mixtures with shared experts, which make one wider MLP."""
    first, activation = config.take("first_k_dense_replace", int, dense), config.activation()
    width, shared = config.size("moe_intermediate_size"), config.take("n_shared_experts", int, 0)
    config.expect("moe_layer_freq", 1)
    moe = MoeMlp(
        experts=Experts(
            count=config.size_of(("n_routed_experts", "num_local_experts", "num_experts")), width=width,
            activation=activation,
        ),
        router=router, chosen=config.size("num_experts_per_tok"),
        shared=GatedMlp(width=width * shared, activation=activation) if shared else None,
    )
    plain = GatedMlp(width=config.size("intermediate_size"), activation=activation)
    return [plain if index < first else moe for index in range(layer_count)]


def weights(spec: ModelSpec) -> WeightMap:
    """Layers past the last are for predicting several tokens at once (MTP) and stay unread."""
    mtp = rf"layers\.({'|'.join(str(len(spec.layers) + i) for i in range(4))})\..*"
    return weight_map(spec, replace(LLAMA, ignorable=(*LLAMA.ignorable, mtp)))
