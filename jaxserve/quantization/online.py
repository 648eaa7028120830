"""Which parameters of an unquantised checkpoint `--quantization` packs: the matrices of the layers.

Norms, biases, the embedding and the head stay as they are: on SmolLM2 an 8-bit head costs 1 % of perplexity more and
saves a twentieth of a step. Invariant: the packed tree has the paths of the plain one; a
packed matrix is one node with the matrix's own path.
"""

from __future__ import annotations

from typing import Any, Literal

import jax

from jaxserve.core.errors import ConfigError
from jaxserve.core.model_spec import LatentAttention, ModelSpec, MoeMlp
from jaxserve.quantization import int8
from jaxserve.quantization.qtensor import QTensor

Method = Literal["int8"]


def check(spec: ModelSpec, method: Method | None) -> None:
    """Raises ConfigError where the method does not cover most of a model."""
    if method is None:
        return
    for layer in spec.layers:
        if isinstance(layer.mlp, MoeMlp) or isinstance(layer.attention, LatentAttention):
            kind = "experts" if isinstance(layer.mlp, MoeMlp) else "latent attention"
            raise ConfigError(f"quantization {method} is not built yet for {kind} ({spec.family}); leave it away")


def packed(abstract: Any, method: Method | None) -> Any:
    """The parameter tree as it is kept, from the plain one; both abstract."""
    if method is None:
        return abstract
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: int8.abstract(leaf) if _is_matrix(path, leaf) else leaf, abstract
    )


def is_packed(node: Any) -> bool:
    return isinstance(node, QTensor)


def _is_matrix(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> bool:
    return path[0].key.startswith("layers_") and path[-1].key == "weight" and len(leaf.shape) == 2
