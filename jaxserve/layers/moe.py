"""A mixture of experts: the router's choice, the experts' products, and the way back.

Every assignment of a token to an expert is a row; rows are sorted by expert, multiplied group by group, and gathered
back. No capacity, nothing is dropped: what a token gets depends on that token only.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxserve.core.model_spec import ClampedSwiglu, Experts, MoeMlp, Router
from jaxserve.layers.linear import Linear, matmul
from jaxserve.layers.mlp import ACTIVATIONS, DenseMlp
from jaxserve.quantization.packed import PackedTensor
from jaxserve.sharding import collectives
from kernels_pallas.grouped_matmul import grouped_matmul


class MixtureOfExperts(nn.Module):
    """Rows of `experts_gate_up` [E, 2F, D] are gate, then up. `implementation` is of the grouped products.

    Of experts that are split or shared out over devices, each device adds up what it has; one sum joins them.
    """

    spec: MoeMlp
    width: int
    dtype: DTypeLike
    implementation: str = "xla"

    def setup(self) -> None:
        spec, dtype, E = self.spec, self.dtype, self.spec.experts.count
        F, D = spec.experts.width, self.width
        self.router_ED = self._param("router", (E, D), (None, "width"))
        E_here = spec.experts.count_here or E
        self.gate_up_EOD = self._stack("experts_gate_up", (E_here, 2 * F, D), ("experts", "expert_gate_up", "width"))
        self.down_EDF = self._stack("experts_down", (E_here, D, F), ("experts", "width", "expert_mlp"))
        if spec.router.has_bias:
            self.router_bias_E = self._param("router_bias", (E,), (None,))
        if spec.router.has_correction:
            # Scores differ in the third digit: a bfloat16 correction would change who is chosen.
            self.correction_E = self._param("router_correction", (E,), (None,), jnp.float32)
        if spec.experts.has_bias:
            self.gate_up_bias_EO = self._param("experts_gate_up_bias", (E_here, 2 * F), ("experts", "expert_gate_up"))
            self.down_bias_ED = self._param("experts_down_bias", (E_here, D), ("experts", "width"))
        if spec.shared is not None:
            self.shared = DenseMlp(spec.shared, D, dtype)
            if spec.has_shared_gate:
                self.shared_gate = Linear(D, 1, (None, "width"), dtype)

    def __call__(self, x_TD: Array) -> Array:
        spec = self.spec
        with jax.named_scope("moe.router"):
            logits_TE = matmul(x_TD, self.router_ED)
            if spec.router.has_bias:
                logits_TE = logits_TE + self.router_bias_E.astype(jnp.float32)
            correction_E = self.correction_E if spec.router.has_correction else None
            expert_TX, weight_TX = route(logits_TE, spec.router, spec.chosen, correction_E)
        with jax.named_scope("moe.experts"):
            out_TD = self._experts(x_TD, expert_TX, weight_TX)
            out_TD = collectives.total(collectives.total(out_TD, "expert_mlp", self.dtype), "experts", self.dtype)
        if spec.shared is not None:
            with jax.named_scope("moe.shared"):
                shared_TD = self.shared(x_TD).astype(jnp.float32)
                if spec.has_shared_gate:
                    shared_TD = shared_TD * jax.nn.sigmoid(self.shared_gate(x_TD).astype(jnp.float32))
                out_TD = out_TD + shared_TD
        return out_TD.astype(self.dtype)

    def _experts(self, x_TD: Array, expert_TX: Array, weight_TX: Array) -> Array:
        """Float32 sums over the chosen experts."""
        spec, (T, X) = self.spec.experts, expert_TX.shape
        E = spec.count_here or spec.count
        expert_A = expert_TX.reshape(T * X)
        if spec.count_here is not None:
            expert_A = expert_A - collectives.part("experts") * E
            is_here_A = (expert_A >= 0) & (expert_A < E)
            expert_A = jnp.where(is_here_A, expert_A, E)    # those of other devices come last and meet no weight
        order_A = jnp.argsort(expert_A, stable=True).astype(jnp.int32)
        count_E = jnp.zeros(E, jnp.int32).at[expert_A].add(1, mode="drop")
        sorted_A = expert_A[order_A]
        multiply = functools.partial(self._multiply, count_E=count_E)
        gate_up_AO = multiply(x_TD[order_A // X], self.gate_up_EOD, axis="width")
        if spec.has_bias:
            gate_up_AO = gate_up_AO + self.gate_up_bias_EO[sorted_A].astype(jnp.float32)
        hidden_AF = gated(gate_up_AO, spec).astype(self.dtype)
        out_AD = multiply(hidden_AF, self.down_EDF, axis="expert_mlp")
        if spec.has_bias:
            bias_AD = self.down_bias_ED[sorted_A].astype(jnp.float32)
            if collectives.part_count("expert_mlp") > 1:    # once, not by every part
                bias_AD = jnp.where(collectives.part("expert_mlp") == 0, bias_AD, 0)
            out_AD = out_AD + bias_AD
        place_A = jnp.zeros(T * X, jnp.int32).at[order_A].set(jnp.arange(T * X, dtype=jnp.int32))
        out_AD = out_AD[place_A]
        if spec.count_here is not None:
            out_AD = jnp.where(is_here_A[:, None], out_AD, 0)
        out_TXD = out_AD.reshape(T, X, -1)
        return jnp.sum(out_TXD * weight_TX[:, :, None], axis=1)

    def _multiply(self, x_AI: Array, weight_EOI: Array | PackedTensor, count_E: Array, axis: str) -> Array:
        if not isinstance(weight_EOI, PackedTensor):
            return grouped_matmul(x_AI, weight_EOI, count_E, implementation=self.implementation)
        rounded_AI, scale = weight_EOI.rounded(x_AI, axis)
        return grouped_matmul(rounded_AI, weight_EOI.weight, count_E, implementation="xla") * scale

    def _stack(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array | PackedTensor:
        """Matrices as they were loaded, which may be packed."""
        return self._param(name, shape, axes) if self.is_initializing() else self.get_variable("params", name)

    def _param(
        self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: DTypeLike | None = None
    ) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
        return self.param(name, init, shape, dtype or self.dtype)


def gated(gate_up_AO: Array, spec: Experts) -> Array:
    """What an expert makes of its fused gate and up."""
    gate_AF, up_AF = jnp.split(gate_up_AO, 2, axis=-1)
    act = spec.activation
    if not isinstance(act, ClampedSwiglu):
        return ACTIVATIONS[act](gate_AF) * up_AF
    gate_AF, up_AF = jnp.minimum(gate_AF, act.limit), jnp.clip(up_AF, -act.limit, act.limit)
    return gate_AF * jax.nn.sigmoid(act.alpha * gate_AF) * (up_AF + 1)


def route(logits_TE: Array, router: Router, chosen: int, correction_E: Array | None) -> tuple[Array, Array]:
    """Experts [T, X] int32 of each token, best first, and their weights [T, X] float32."""
    score_TE = jax.nn.softmax(logits_TE, -1) if router.score == "softmax" else jax.nn.sigmoid(logits_TE)
    choice_TE = score_TE if correction_E is None else score_TE + correction_E
    if router.group_count > 1:
        choice_TE = jnp.where(_is_in_best_groups(choice_TE, router), choice_TE, -jnp.inf)
    _, expert_TX = jax.lax.top_k(choice_TE, chosen)
    weight_TX = jnp.take_along_axis(score_TE, expert_TX, axis=-1)
    if router.normalise:
        weight_TX = weight_TX / (weight_TX.sum(-1, keepdims=True) + 1e-20)
    return expert_TX.astype(jnp.int32), weight_TX * router.scale


def _is_in_best_groups(choice_TE: Array, router: Router) -> Array:
    T, E = choice_TE.shape
    in_group_TZE = choice_TE.reshape(T, router.group_count, -1)
    best = 1 if router.group_score == "best" else 2
    judged_TZ = jax.lax.top_k(in_group_TZE, best)[0].sum(-1)
    _, group_TX = jax.lax.top_k(judged_TZ, router.group_top)
    is_best_TZ = jnp.zeros(judged_TZ.shape, bool).at[jnp.arange(T)[:, None], group_TX].set(True)
    return jnp.repeat(is_best_TZ, E // router.group_count, axis=1)
