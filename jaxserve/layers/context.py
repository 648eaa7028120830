"""What every layer of one step shares: positions, rows, page tables and the attention work, as one pytree.

Built inside the compiled forward from the packed step input; layers only read it. Padding tokens have row R (one
past the last row), so that every scatter by row or page drops them.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.struct
from jax import Array

from kernels_pallas.quantized import Pages
from kernels_pallas.work import AttentionWork


class LayerKv(NamedTuple):
    """Keys and values of one layer, paged; a latent cache has no values of its own."""

    k_PKSH: Pages
    v_PKSH: Pages | None


@flax.struct.dataclass
class StepContext:
    """Attributes:
    position_T: position of each token in its sequence, 0 for padding.
    row_T: device row of each token, R for padding.
    is_long_T: whether the token's sequence is longer than the model's original context; None where no layer asks.
    page_RM: for each KV group, the page table of all rows.
    work: attention work items, planned on the host, shared by all layers.
    """

    position_T: Array
    row_T: Array
    page_RM: tuple[Array, ...]
    work: AttentionWork
    is_long_T: Array | None = None
