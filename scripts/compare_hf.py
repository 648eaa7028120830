"""Compares a model folder with transformers, layer by layer, in float32: the largest difference of the residual stream
after the embedding and after every block, and of the logits. The first layer that differs is where to look.

    python scripts/compare_hf.py tests/fixtures/families/gemma2
    python scripts/compare_hf.py ~/models/Qwen3-0.6B --text "Once upon a time"

Needs `pip install torch` beside jaxserve. Ours is computed whole and without a cache.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.core.model_spec import ModelSpec, SlidingWindow, Span
from jaxserve.layers.context import StepContext
from jaxserve.models.decoder import Block, Decoder
from jaxserve.models.registry import read_spec
from jaxserve.sharding.mesh import make_mesh
from jaxserve.weights.loader import load_params

TOLERANCE = 1e-4     # of the largest value


def attend(
    q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array | None, layer_kv: Any, context: StepContext, group: int, *,
    scale: float, span: Span, soft_cap: float | None, sink_N: jax.Array | None, value_dim: int | None = None,
) -> tuple[jax.Array, Any]:
    """Attention of one whole sequence, every score written out."""
    T, N, _ = q_TNH.shape
    v_TKH = k_TKH[..., :value_dim] if v_TKH is None else v_TKH
    k_TNH, v_TNH = (jnp.repeat(x, N // k_TKH.shape[1], axis=1) for x in (k_TKH, v_TKH))
    score_NTC = jnp.einsum("TNH,CNH->NTC", q_TNH, k_TNH, precision="highest") * scale
    if soft_cap is not None:
        score_NTC = soft_cap * jnp.tanh(score_NTC / soft_cap)
    age_TC = context.position_T[:, None] - context.position_T
    is_seen_TC = (age_TC >= 0) & (age_TC < (span.size if isinstance(span, SlidingWindow) else T))
    score_NTC = jnp.where(is_seen_TC, score_NTC, -jnp.inf)
    if sink_N is not None:
        sink_NTC = jnp.broadcast_to(sink_N.astype(jnp.float32)[:, None, None], (N, T, 1))
        score_NTC = jnp.concatenate([score_NTC, sink_NTC], axis=-1)
    weight_NTC = jax.nn.softmax(score_NTC, axis=-1)[..., :T]
    return jnp.einsum("NTC,CNH->TNH", weight_NTC, v_TNH, precision="highest"), layer_kv


def ours(spec: ModelSpec, folder: Path, ids: list[int]) -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """The stream before the first block and after each one, and the logits."""
    params = load_params(spec, folder, make_mesh(jax.devices()[:1]), jnp.float32)
    model = Decoder(spec=spec, dtype=jnp.float32, attend=attend)
    T = len(ids)
    is_long_T = None if spec.rope_switch is None else jnp.full(T, spec.rope_switch < T)
    context = StepContext(position_T=jnp.arange(T), row_T=None, page_RM=(), work=None, is_long_T=is_long_T)
    streams: list[Any] = []
    plain = Block.__call__

    def watched(self: Block, x_TD: jax.Array, *rest: Any) -> Any:
        x_TD, layer_kv = plain(self, x_TD, *rest)
        streams.append(x_TD)
        return x_TD, layer_kv

    Block.__call__ = watched  # type: ignore[method-assign]
    with jax.disable_jit():
        variables = {"params": params}
        hidden_TD, _ = model.apply(variables, jnp.asarray(ids), (None,) * len(spec.layers), context, method="hidden")
        logits_TV = model.apply(variables, hidden_TD, method="logits")
    return [np.asarray(x) for x in streams], np.asarray(logits_TV)


def theirs(folder: Path, ids: list[int]) -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """The same of transformers; its last hidden state is after the final norm and left out."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        result = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return [x[0].numpy() for x in result.hidden_states[1:-1]], result.logits[0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", help="what to compute (default: a fixture's recorded prompt, else 45 random ids)")
    arguments = parser.parse_args()
    folder = arguments.folder.expanduser()
    spec = read_spec(folder)
    ids = prompt_of(folder, spec.vocab_size, arguments.text)
    (our_layers, our_logits), (their_layers, their_logits) = ours(spec, folder, ids), theirs(folder, ids)
    print(f"{spec.family}, {len(spec.layers)} layers, {len(ids)} tokens; differences as parts of the largest value")
    worst = 0.0
    pairs = [(f"after layer {i}", *pair) for i, pair in enumerate(zip(our_layers, their_layers, strict=False))]
    for name, a, b in [*pairs, ("logits", our_logits, their_logits)]:
        difference = float(np.abs(a - b).max() / np.abs(b).max())
        worst = max(worst, difference)
        print(f"  {name:16} {difference:9.1e}{'   <-- differs' if difference > TOLERANCE else ''}")
    raise SystemExit(int(worst > TOLERANCE))


def prompt_of(folder: Path, vocab_size: int, text: str | None) -> list[int]:
    if text is not None:
        from transformers import AutoTokenizer

        return list(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    recorded = folder / "reference.json"
    if recorded.is_file():
        return list(json.loads(recorded.read_text())["cases"][-1]["prompt_token_ids"])
    return np.random.default_rng(0).integers(0, vocab_size, 45).tolist()


if __name__ == "__main__":
    main()
