"""The checks and the choice that all ops share: what a caller must give, and who may serve it.

Knows static shapes and dtypes only, so everything here happens while tracing and costs nothing later.
Invariant: nothing falls back in silence; a request that nobody serves is refused with the reasons of every candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas import hopper, quantized
from kernels_pallas.quantized import Pages, QuantizedPages
from kernels_pallas.work import AttentionWork, work_layout

TRITON_HEAD_DIM_MAX = 256
TRITON_VALUES_MAX = 512      # of a latent cache
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


class ContractError(ValueError):
    """The arguments break the op's contract, whatever the implementation; the message lists every violation."""


class NoImplementationError(NotImplementedError):
    """No implementation (or not the one asked for) serves the request; the message has the reasons of each."""


def require(op: str, violations: list[str]) -> None:
    """Raises ContractError unless `violations` is empty."""
    if violations:
        raise ContractError(f"{op}: " + "; ".join(violations))


def choose(op: str, asked: str | None, refusals: Mapping[str, Callable[[], list[str]]]) -> str:
    """The implementation that serves: the one asked for, else the first of `refusals` without a reason against it."""
    if asked is not None and asked not in refusals:
        raise NoImplementationError(f"{op}: unknown implementation {asked!r}; there are {', '.join(refusals)}")
    reasons = {name: refusals[name]() for name in ([asked] if asked else refusals)}
    for name, against in reasons.items():
        if not against:
            return name
    raise NoImplementationError(
        f"{op}: no implementation serves this request. " + " ".join(f"{n}: {'; '.join(r)}." for n, r in reasons.items())
    )


def native_refusals(
    values: Array, pages: Pages, soft_cap: float | None, tokens: int = 1, *, is_latent: bool = False
) -> list[str]:
    """Why the kernels compiled for this host's CPU cannot work with these arrays here."""
    from kernels_pallas.native import api as native  # late: it asks for this host

    if hopper.target_kind() != "cpu":
        return [f"needs a CPU, the target is {hopper.target_kind()!r}"]
    found = native.attention_refusals(values, pages, soft_cap=soft_cap)
    if tokens != 1:
        found.append(f"one token an entry, got {tokens}")
    if is_latent:
        found.append("keys that are values too (a latent cache) are not implemented")
    return found


def triton_refusals(
    values: Array, pages: Pages, codes: tuple[str, ...] = (), *, value_dim: int | None = None
) -> list[str]:
    """Why the Pallas:Triton forms cannot work with these arrays here.

    Args:
      codes: of quantised pages that a kernel takes.
      value_dim: of a latent cache, whose keys are values too.
    """
    found = [] if hopper.target_kind() != "cpu" else ["needs a GPU, the target is 'cpu'"]
    head_dim = values.shape[-1]
    if value_dim is not None:
        if any(n & (n - 1) or 0 < n < 16 for n in (value_dim, head_dim - value_dim)) or value_dim > TRITON_VALUES_MAX:
            found.append(
                f"a latent cache of {value_dim} values and {head_dim - value_dim} numbers more: both must be powers of "
                f"two from 16 on (or no more), values at most {TRITON_VALUES_MAX}"
            )
    elif head_dim & (head_dim - 1) or not 16 <= head_dim <= TRITON_HEAD_DIM_MAX:
        found.append(f"head dimension {head_dim} is no power of two from 16 to {TRITON_HEAD_DIM_MAX}")
    if values.dtype not in (jnp.bfloat16, jnp.float16):
        found.append(f"values must be bfloat16 or float16 (tensor cores), got {values.dtype}")
    if isinstance(pages, QuantizedPages):
        if pages.code_PKSH.dtype.name not in codes:
            served = f"only {', '.join(codes)}" if codes else "none"
            found.append(f"of quantised pages {served}, not {pages.code_PKSH.dtype}")
        if 2**31 < pages.code_PKSH.size <= 2**32:     # jax 0.11: signed offsets of 32 bits up to 2^32 bytes
            found.append(f"{pages.code_PKSH.size} codes of a layer lie between 2^31 and 2^32, whose offsets would overflow")
    elif pages.dtype != values.dtype:
        found.append(f"pages of {pages.dtype} beside values of {values.dtype}: must be alike")
    return found


def attention_violations(
    q_TNH: Array,
    k_PKSH: Pages,
    v_PKSH: Pages | None,
    page_RM: Array,
    work: AttentionWork,
    *,
    window: int | None,
    soft_cap: float | None,
    sink_N: Array | None,
    value_dim: int | None,
) -> list[str]:
    """What is wrong with the arguments of an attention op."""
    if q_TNH.ndim != 3 or k_PKSH.ndim != 4 or page_RM.ndim != 2:
        shapes = f"{q_TNH.shape}, {k_PKSH.shape}, {page_RM.shape}"
        return [f"q must be [T, N, H], pages [P, K, S, H], the page table [R, M]; got {shapes}"]
    T, N, H = q_TNH.shape
    _, K, _, page_H = k_PKSH.shape
    found = []
    if v_PKSH is None and (value_dim is None or not 1 <= value_dim <= page_H):
        found.append(f"without v pages value_dim must be 1 .. {page_H}, what of a key is its value; got {value_dim}")
    if v_PKSH is not None and value_dim is not None:
        found.append(f"value_dim {value_dim} is for keys that are values too: v pages must be None")
    if v_PKSH is not None and _described(v_PKSH) != _described(k_PKSH):
        found.append(f"k and v pages must be alike, got {_described(k_PKSH)} and {_described(v_PKSH)}")
    if isinstance(k_PKSH, QuantizedPages):
        found += quantized.violations(k_PKSH)
    if page_H != H:
        found.append(f"the head dimension of q is {H}, of the pages {page_H}")
    if N % K:
        found.append(f"{N} query heads are no multiple of {K} kv heads")
    if page_RM.dtype != jnp.int32:
        found.append(f"the page table must be int32, got {page_RM.dtype}")
    layout = work_layout(T, page_RM.shape[0])
    for name, shape in layout.items():
        given = getattr(work, name).shape
        if given != shape:
            found.append(f"work.{name} must be {shape} for T={T}, R={page_RM.shape[0]}, got {given}")
    if window is not None and window < 1:
        found.append(f"window must be None or >= 1, got {window}")
    if soft_cap is not None and not soft_cap > 0:
        found.append(f"soft_cap must be None or > 0, got {soft_cap}")
    if sink_N is not None and sink_N.shape != (N,):
        found.append(f"sinks must be one a query head, ({N},), got {sink_N.shape}")
    return found


def _described(pages: Pages) -> str:
    return " beside ".join(f"{part.dtype}{part.shape}" for part in jax.tree.leaves(pages))


def dtype_refusals(values: Array, pages_PKSH: Pages) -> list[str]:
    """Why the plain jnp and XLA forms cannot work with these dtypes."""
    if values.dtype not in FLOATS:
        return [f"values must be float32, bfloat16 or float16, got {values.dtype}"]
    if isinstance(pages_PKSH, QuantizedPages):
        return []
    if pages_PKSH.dtype == values.dtype or (pages_PKSH.dtype == jnp.uint16 and values.dtype.itemsize == 2):
        return []
    return [
        f"pages of {pages_PKSH.dtype} beside values of {values.dtype} are not implemented; eight bits need scales: "
        "QuantizedPages"
    ]
