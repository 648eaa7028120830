"""SqueezeLLM checkpoints in its authors' layout: a table of centroids an output, and outliers kept beside it.

Their tool needs CUDA, so this writes what it writes: one torch.save'd state dict "sq-NAME-wB-sS.pt", and
quant_config.json = {"wbits": B}. Centroids come from plain k-means over each row (theirs weighs elements by their
Fisher information: better weights, same format). With outliers, the largest elements of a matrix are taken out before
the tables are made; their places take the code of the centroid nearest to 0, which the stored value makes up for.
Source: Kim et al. 2023; the layout as described by the tool's packing (qweight, lookup_table, rows, cols, vals).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TURNS = 12          # of k-means: centroids of a few hundred elements hardly move afterwards


def by_k_means(model: Path, folder: Path, plain: Path, *, bits: int, share_of_outliers: float = 0.0) -> None:
    """Every projection; the twin is tables and outliers put together in float32 by torch."""
    import torch
    from quantizing_tools import copy_beside, write_plain
    from safetensors.torch import load_file

    stored: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for key, weight in load_file(model / "model.safetensors").items():
        if not key.endswith("proj.weight"):
            stored[key] = weight
            continue
        parts, values[key] = quantised(weight.float(), bits, share_of_outliers)
        stored |= {f"{key.removesuffix('weight')}{name}": part for name, part in parts.items()}
    folder.mkdir(exist_ok=True)
    copy_beside(model, folder)
    (folder / "config.json").write_text((model / "config.json").read_text())
    (folder / "quant_config.json").write_text(json.dumps({"wbits": bits}) + "\n")
    torch.save(stored, folder / f"sq-{model.name.lower()}-w{bits}-s{100 * share_of_outliers:g}.pt")
    write_plain(model, plain, values)


def quantised(weight_OI: Any, bits: int, share_of_outliers: float) -> tuple[dict[str, Any], Any]:
    """The stored tensors of one matrix, and the matrix that they stand for, float32."""
    import torch

    is_kept = torch.zeros_like(weight_OI, dtype=torch.bool)
    if count := round(share_of_outliers * weight_OI.numel()):
        is_kept.view(-1)[weight_OI.abs().view(-1).topk(count).indices] = True
    dense_OI = weight_OI.masked_fill(is_kept, 0.0)
    table_OT = centroids(dense_OI, 1 << bits)
    code_OI = nearest(dense_OI, table_OT)
    value_OI = table_OT.gather(1, code_OI)
    parts = {"qweight": words(code_OI.T, bits), "lookup_table": table_OT}
    if count:
        row_N, column_N = is_kept.nonzero(as_tuple=True)
        rest_N = weight_OI[row_N, column_N] - value_OI[row_N, column_N]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), is_kept.sum(1).cumsum(0)])
        parts |= {"rows": starts.int(), "cols": column_N.int(), "vals": rest_N}
        value_OI[row_N, column_N] += rest_N
    return parts, value_OI


def centroids(weight_OI: Any, count: int) -> Any:
    """k-means of each row, from its quantiles on; float32 [O, count]."""
    import torch

    table_OT = torch.quantile(weight_OI, (torch.arange(count) + 0.5) / count, dim=1).T.contiguous()
    for _ in range(TURNS):
        code_OI = nearest(weight_OI, table_OT)
        total_OT = torch.zeros_like(table_OT).scatter_add_(1, code_OI, weight_OI)
        members_OT = torch.zeros_like(table_OT).scatter_add_(1, code_OI, torch.ones_like(weight_OI))
        table_OT = torch.where(members_OT > 0, total_OT / members_OT.clamp(min=1), table_OT)
    return table_OT


def nearest(weight_OI: Any, table_OT: Any) -> Any:
    """The number of each element's centroid."""
    import torch

    ordered_OT, place_OT = table_OT.sort(dim=1)
    edge_OT = (ordered_OT[:, 1:] + ordered_OT[:, :-1]) / 2
    return place_OT.gather(1, torch.searchsorted(edge_OT.contiguous(), weight_OI.contiguous()))


def words(code_IO: Any, bits: int) -> Any:
    """int32 [I · bits / 32, O]: a column of codes as one string of bits, lowest first."""
    import torch

    ins, outs = code_IO.shape
    line = (code_IO[:, None, :] >> torch.arange(bits)[None, :, None]) & 1
    word = (line.reshape(ins * bits // 32, 32, outs) << torch.arange(32)[None, :, None]).sum(1)
    return torch.where(word >= 2**31, word - 2**32, word).int()
