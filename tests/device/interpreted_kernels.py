"""Triton's kernels, interpreted, in place of those that want a GPU: no option of the server reaches the interpreter."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from kernels_pallas import contract

OPS = ("paged_decode", "paged_prefill", "kv_write")


def interpret(replace: Callable[[Any, str, Any], None] = setattr) -> dict[str, int]:
    """Replaces the kernels' functions by `replace`, and what refuses them; gives how often each is traced."""
    traced: dict[str, int] = {}
    replace(contract, "triton_refusals", lambda *_, **__: [])
    for op in OPS:
        module = importlib.import_module(f"kernels_pallas.{op}.triton")
        kernel = functools.partial(getattr(module, op), is_interpreted=True)

        def count(*arrays: Any, kernel: Any = kernel, op: str = op, **options: Any) -> Any:
            traced[op] = traced.get(op, 0) + 1
            return kernel(*arrays, **options)

        replace(module, op, count)
    return traced
