"""Packed modules of a checkpoint shown as the matrices they stand for, and which parameters stay packed.

A format's several tensors (`q_proj.qweight`, `q_proj.scales`) become one, `q_proj.weight`, that looks like a float32
matrix. A parameter whose parts are all packed alike is kept so; one that is cut, viewed or mixed otherwise (an expert,
a head of latent attention, devices that would share a group) is decoded while it is loaded.
Knows no format: `quantization.formats` does. Invariant: every tensor of a packed module is part of its matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.core.errors import WeightsError
from jaxserve.core.model_spec import ModelSpec
from jaxserve.models.decoder import abstract_params, logical_axes
from jaxserve.quantization import joined, online, packed
from jaxserve.quantization.codes import (
    Codes,
    FloatCodes,
    Form,
    GroupCodes,
    Host,
    IntCodes,
    ShortFloatCodes,
    TableCodes,
)
from jaxserve.quantization.formats.scheme import Scheme, Stored
from jaxserve.quantization.packing import Joined, Packed, Packing, path_of
from jaxserve.sharding.rules import parts
from jaxserve.sharding.split import Runs
from jaxserve.weights.files import StoredTensor
from jaxserve.weights.rules import Assembly, Block
from jaxserve.weights.shards import layouts

# Of a cache in 8 bits, one for all tokens, by three generations of tools. Not needed: `--kv-cache-dtype` measures a
# scale for every token and head.
KV_SCALES = (".k_scale", ".v_scale", ".kv_scale", ".k_proj.output_scale", ".v_proj.output_scale")


class PackedMatrix:
    """Looks like a float32 array [O, I], and has the codes that it is made of."""

    dtype = np.dtype(np.float32)
    ndim = 2

    def __init__(self, scheme: Scheme, module: str, stored: Stored) -> None:
        self._scheme, self._module, self._stored = scheme, module, stored
        self.shape = scheme.shape(module, stored)
        self.form = scheme.form(module, stored)

    def codes(self) -> Codes:
        """As the format reads them."""
        return self._scheme.codes(self._module, self._stored)

    def __getitem__(self, index: Any) -> Host:
        return self.codes().dequantised()[index]

    def reshape(self, shape: tuple[int, ...]) -> Host:
        return self.codes().dequantised().reshape(shape)

    @property
    def T(self) -> Host:  # noqa: N802 (as numpy calls it)
        return self.codes().dequantised().T


class StackedMatrix(PackedMatrix):
    """A matrix out of a stack, whose tensors all have its outputs first: rows of it are a matrix of their own."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            rows = {suffix: data[index] for suffix, data in self._stored.items()}
            return StackedMatrix(self._scheme, self._module, rows)
        return super().__getitem__(index)


class PackedStack:
    """Looks like a float32 array [E, I, O], of which `[e].T` is a packed matrix."""

    dtype = np.dtype(np.float32)
    ndim = 3

    def __init__(self, scheme: Scheme, module: str, stored: Stored) -> None:
        self._scheme, self._module, self._stored = scheme, module, stored
        counts = {len(data) for data in stored.values()}
        if len(counts) != 1 or 0 in counts:
            raise WeightsError(f"{module}: its tensors are stacks of {sorted(counts)} matrices")
        outs, ins = self[0].T.shape
        self.shape = (counts.pop(), ins, outs)

    def __getitem__(self, index: int) -> _Turned:
        of_one = {suffix: data[index] for suffix, data in self._stored.items()}
        return _Turned(T=StackedMatrix(self._scheme, self._module, of_one))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turned:
    """A matrix [I, O] that is stored as [O, I]."""

    T: StackedMatrix


def with_packed(stored: Mapping[str, StoredTensor], scheme: Scheme | None) -> dict[str, StoredTensor]:
    """The tensors with every packed module's replaced by the matrix that they are."""
    if scheme is None:
        return dict(stored)
    ends = [scheme.joint + mark for mark in scheme.marks]
    names = dict.fromkeys(name.removesuffix(end) for name in stored for end in ends if name.endswith(end))
    if not names and scheme.needs_packed:
        raise WeightsError(
            f"config.json says that the weights are in {scheme.method}, but no tensor ends in "
            f"{' or '.join(ends)}"
        )
    found = {name: tensor for name, tensor in stored.items() if not name.endswith(KV_SCALES)}
    for module in names:
        parts = {
            suffix: found.pop(name) for suffix in scheme.suffixes
            if (name := f"{module}{scheme.joint}{suffix}") in found
        }
        stored_parts = {suffix: part.data for suffix, part in parts.items()}
        data: Any = (PackedStack if scheme.is_of_stacks else PackedMatrix)(scheme, module, stored_parts)
        name = module if scheme.is_of_stacks else f"{module}.weight"
        found[name] = StoredTensor(name=name, file=next(iter(parts.values())).file, data=data)
    return found


def plan(spec: ModelSpec, mesh: Mesh, assemblies: list[Assembly]) -> Packing:
    """The parameters that stay packed on the mesh's devices."""
    found: dict[str, Packed | Joined] = {}
    for assembly, layout, axes in zip(assemblies, layouts(spec, mesh), logical_axes(spec), strict=True):
        if not assembly.path.startswith("layers_"):
            continue
        form, count = _common_form(assembly.blocks), parts(mesh, axes[-1])
        has_all_rows = all(parts(mesh, axis) == 1 for axis in axes[:-1])
        if form is not None and packed.fits(
            form, layout[-1], count, is_stack=len(layout) == 3, has_all_rows=has_all_rows
        ):
            found[assembly.path] = Packed(form=form, columns=layout[-1], device_count=count)
        elif form is None and len(layout) == 2 and (of_parts := _parts(assembly, layout, axes, mesh)):
            found[assembly.path] = Joined(parts=of_parts, columns=layout[-1], device_count=count)
    return found


def plan_online(spec: ModelSpec, method: online.Method, mesh: Mesh) -> Packing:
    """The parameters of an unquantised checkpoint that `--quantization` packs. Raises ConfigError."""
    online.check(spec, method)
    form, leaves = online.FORMS[method], jax.tree_util.tree_leaves_with_path(abstract_params(spec, np.float32))
    return {
        name: Packed(form=form, columns=layout[-1], device_count=parts(mesh, axes[-1]))
        for (path, leaf), layout, axes in zip(leaves, layouts(spec, mesh), logical_axes(spec), strict=True)
        if online.is_matrix(name := path_of(path), len(leaf.shape))
        and packed.fits(form, layout[-1], parts(mesh, axes[-1]), is_stack=len(leaf.shape) == 3)
    }


def decoded_count(assemblies: list[Assembly], packing: Packing) -> int:
    """How many parameters are packed in the checkpoint, but not on the devices."""
    return sum(
        any(isinstance(block.tensor.data, PackedMatrix | PackedStack) for block in assembly.blocks)
        and assembly.path not in packing
        for assembly in assemblies
    )


def _common_form(blocks: Sequence[Block]) -> Form | None:
    """The form of these blocks of a parameter, where they can stand on each other as they are."""
    first: PackedMatrix | None = None
    sparse_count = 0
    for block in blocks:
        data = _matrix(block)
        if data is None:
            return None
        if first is not None and replace(data.form, sparse_count=0) != replace(first.form, sparse_count=0):
            return None
        if first is not None and data.form.has_order and not np.array_equal(_order(first), _order(data)):
            return None
        first, sparse_count = first or data, sparse_count + data.form.sparse_count
    return None if first is None else replace(first.form, sparse_count=sparse_count)


def _runs_of_blocks(assembly: Assembly) -> list[list[Block]]:
    """Neighbours that have a common form; every block is in one run."""
    found: list[list[Block]] = []
    for block in assembly.blocks:
        if found and _common_form([*found[-1], block]) is not None:
            found[-1].append(block)
        else:
            found.append([block])
    return found


def _parts(
    assembly: Assembly, layout: tuple[Runs, ...], axes: tuple[str | None, ...], mesh: Mesh
) -> tuple[joined.Part, ...] | None:
    """The parts of a matrix whose blocks have several forms, where devices can keep all of them."""
    runs = _runs_of_blocks(assembly)
    forms = [form for blocks in runs if (form := _common_form(blocks)) is not None]
    rows, columns = (parts(mesh, axis) for axis in axes)
    if len(forms) < len(runs) or any(
        form.code == "w8a8" or not packed.fits(form, layout[-1], columns, has_all_rows=rows == 1) for form in forms
    ):
        return None
    sizes = [sum(block.shape[0] for block in blocks) for blocks in runs]
    return joined.split(forms, sizes, layout[0], rows)


def _matrix(block: Block) -> PackedMatrix | None:
    """The packed matrix that a block is as it is."""
    data: Any = block.tensor.data
    if isinstance(data, PackedStack) and block.view is not None:
        data = block.view(data)     # type: ignore[arg-type]
    elif block.view is not None:
        return None
    return data if isinstance(data, PackedMatrix) and block.shape[-2:] == data.shape else None


def _order(data: PackedMatrix) -> Host:
    codes = data.codes()
    assert isinstance(codes, GroupCodes) and codes.group_I is not None
    return codes.group_I


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedCodes:
    """What a matrix of several forms is made of."""

    parts: tuple[joined.Part, ...]
    codes: tuple[Codes, ...]


def joined_codes(assembly: Assembly, of_parts: tuple[joined.Part, ...]) -> JoinedCodes:
    """The codes of each part."""
    found = [_stacked(blocks) for blocks in _runs_of_blocks(assembly)]
    return JoinedCodes(parts=of_parts, codes=tuple(codes for codes in found if codes is not None))


def stacked_codes(assembly: Assembly) -> Codes | None:
    """The codes of a packed parameter whose blocks have a common form, one block under the other."""
    return _stacked(assembly.blocks)


def _stacked(of_blocks: Sequence[Block]) -> Codes | None:
    matrices = [_matrix(block) for block in of_blocks]
    if matrices[0] is None:
        return None
    blocks = [matrix.codes() for matrix in matrices if matrix is not None]
    if len(blocks) == 1:
        return blocks[0]
    return _STACK[type(blocks[0])](blocks)


def _stack_groups(blocks: list[GroupCodes]) -> GroupCodes:
    first = blocks[0]
    return GroupCodes(
        code_OI=_rows(blocks, "code_OI"), bits=first.bits, scale_OG=_rows(blocks, "scale_OG"),
        zero_OG=None if first.zero_OG is None else _rows(blocks, "zero_OG"),
        offset_OG=None if first.offset_OG is None else _rows(blocks, "offset_OG"), group_I=first.group_I,
    )


def _stack_tables(blocks: list[TableCodes]) -> TableCodes:
    outs = [len(block.code_OI) for block in blocks]
    tables = [block.table_ET for block in blocks]
    if all(np.array_equal(table, tables[0]) for table in tables) and len(tables[0]) == 1:
        table_ET = tables[0]
    else:       # one a row; a part that shares one gets it once a row
        table_ET = np.concatenate([
            np.broadcast_to(table, (count, table.shape[1])) for table, count in zip(tables, outs, strict=True)
        ])
    starts = np.cumsum([0, *outs[:-1]])
    some = [(block, start) for block, start in zip(blocks, starts, strict=True) if block.value_N is not None]
    sparse = {} if not some else {
        "row_N": np.concatenate([block.row_N + start for block, start in some]),     # type: ignore[operator]
        "column_N": np.concatenate([block.column_N for block, _ in some]),     # type: ignore[arg-type]
        "value_N": np.concatenate([block.value_N for block, _ in some]),     # type: ignore[arg-type]
    }
    scales = [
        np.broadcast_to(block.scale_OG, (count, block.scale_OG.shape[1]))
        for block, count in zip(blocks, outs, strict=True)
    ]
    return TableCodes(
        code_OI=_rows(blocks, "code_OI"), table_ET=table_ET, scale_OG=np.concatenate(scales), **sparse,
    )


def _stack_integers(blocks: list[IntCodes]) -> IntCodes:
    return IntCodes(
        code_OI=_rows(blocks, "code_OI"), scale_O=_rows(blocks, "scale_O"), activations=blocks[0].activations,
        input_scale=_input_scale(blocks),
    )


def _stack_floats(blocks: list[FloatCodes]) -> FloatCodes:
    """Blocks of rows need not end where matrices do: scales are written out for every row, columns stay in blocks."""
    width = blocks[0].block[1]
    scales = [
        block.scale_AB[np.arange(len(block.bits_OI)) // block.block[0]] for block in blocks
    ]
    return FloatCodes(
        bits_OI=_rows(blocks, "bits_OI"), scale_AB=np.concatenate(scales), block=(1, width),
        activations=blocks[0].activations, input_scale=_input_scale(blocks),
    )


def _stack_short_floats(blocks: list[ShortFloatCodes]) -> ShortFloatCodes:
    return ShortFloatCodes(code_OI=_rows(blocks, "code_OI"), scale_OG=_rows(blocks, "scale_OG"))


def _input_scale(blocks: list[Any]) -> float | None:
    """One for all: joined matrices see the same rows, and the largest loses none of them."""
    scales = [block.input_scale for block in blocks if block.input_scale is not None]
    return max(scales, default=None)


def _rows(blocks: list[Any], name: str) -> Host:
    return np.concatenate([getattr(block, name) for block in blocks])


_STACK: dict[type, Any] = {
    GroupCodes: _stack_groups, TableCodes: _stack_tables, IntCodes: _stack_integers, FloatCodes: _stack_floats,
    ShortFloatCodes: _stack_short_floats,
}
