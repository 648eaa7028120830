"""What a GPU program launches, and the bytes that each launch reads and writes, counted from its optimised HLO.

A fusion reads of a parameter what its result needs: a slice, the rows that a gather takes; a scatter or an update in
place writes what is new. Caches do not shorten the count, and what a kernel in assembly reads of a page pool depends on
contexts, so pools count nothing. Knows text, no device and no time.
Invariant: every launch of the program is there once, those of loops and branches too, with the path that leads there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
ARRAY = re.compile(r"\b(pred|bf16|f\d+\w*|[su]\d+)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
FREE = {     # no launch
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id", "replica-id",
    "optimization-barrier",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """Attributes:
    type: as HLO spells it.  rest: attributes.  scope: of the source, as `jax.named_scope` built it.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def scope(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def bytes(self) -> int:
        return sum(map(array_bytes, arrays(self.type)))


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """Attributes:
    kind: "product", "kernel" (in assembly), "collective", or the opcode.  read, written: bytes.
    path: from the entry to where a launch of a loop or a branch lies: opcode, which of the computations that it calls
      (of a conditional 0 is what happens if true), its scope and its name.
    """

    name: str
    kind: str
    scope: str
    read: int
    written: int
    path: tuple[str, ...]


def launches(text: str, pool: str = "") -> list[Launch]:
    """Of a compiled module.

    Args:
      pool: sizes of a page pool, "[P,K,S,H]".
    """
    module, entry = parsed(text)
    return list(_launches(module, entry, pool, ()))


def parsed(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Instructions by name, by computation; and the entry's name."""
    module: dict[str, dict[str, Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if begins := COMPUTATION.match(line):
            name = begins[2]
            module[name], entry = {}, name if begins[1] else entry
        elif found := INSTRUCTION.match(line):
            inside, rest = _parenthesis(found[5])
            operands = tuple(re.findall(r"%([\w.-]+)", inside))
            module[name][found[2]] = Instruction(found[2], found[4], found[3], operands, rest, bool(found[1]))
    return module, entry


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """Types and sizes in an HLO type."""
    return [(kind, tuple(map(int, filter(None, sizes.split(","))))) for kind, sizes in ARRAY.findall(type_)]


def array_bytes(array: tuple[str, tuple[int, ...]]) -> int:
    """Of one array."""
    kind, sizes = array
    bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
    return math.prod(sizes) * bits // 8


def _launches(
    module: dict[str, dict[str, Instruction]], name: str, pool: str, path: tuple[str, ...]
) -> Iterator[Launch]:
    computation = module[name]
    for one in computation.values():
        if one.opcode in FREE:
            continue
        called = CALLED.findall(one.rest)
        if one.opcode in ("while", "call", "conditional"):
            of_branches = re.findall(r"%([\w.-]+)", " ".join(BRANCHES.findall(one.rest)))
            for place, inner in enumerate(called + of_branches):
                yield from _launches(module, inner, pool, (*path, f"{one.opcode} {place} {one.scope} {inner}"))
            continue
        pages = [operand for operand in one.operands if pool and pool in computation[operand].type]
        if one.opcode == "fusion":
            read, written, kind = _fused(module[called[0]], one)
        else:
            read = sum(computation[operand].bytes for operand in one.operands if operand not in pages)
            written, kind = one.bytes, "kernel" if one.opcode == "custom-call" else one.opcode
        yield Launch(one.name, kind, one.scope, read, written, path)


def _fused(inside: dict[str, Instruction], one: Instruction) -> tuple[int, int, str]:
    """Bytes read and written by a fusion, and what it is."""
    demand, written = dict.fromkeys(inside, 0.0), one.bytes
    for each in reversed(inside.values()):      # users come after what they use
        if each.is_root:
            demand[each.name] = 1.0
        share = min(1.0, demand[each.name])
        for place, operand in enumerate(each.operands):
            demand[operand] += _needed(each, place, inside[operand]) * share
        if each.opcode in ("scatter", "dynamic-update-slice") and _is_result(inside, each):
            update = inside[each.operands[2 if each.opcode == "scatter" else 1]]
            written -= each.bytes - update.bytes
    read = sum(each.bytes * min(1.0, demand[each.name]) for each in inside.values() if each.opcode == "parameter")
    kind = "product" if any(each.opcode == "dot" for each in inside.values()) else "fusion"
    return round(read), written, kind


def _needed(user: Instruction, place: int, operand: Instruction) -> float:
    """The part of an operand that a whole result needs."""
    if user.opcode in ("slice", "dynamic-slice") or (user.opcode == "gather" and place == 0):
        return min(1.0, _count(user) / max(1, _count(operand)))
    if user.opcode in ("scatter", "dynamic-update-slice") and place == 0:
        return 0.0
    return 1.0


def _count(one: Instruction) -> int:
    return sum(math.prod(sizes) for _, sizes in arrays(one.type))


def _is_result(inside: dict[str, Instruction], one: Instruction) -> bool:
    """Whether an instruction, perhaps behind a bitcast, is what a fusion gives."""
    users = [user for user in inside.values() if one.name in user.operands]
    return one.is_root or any(
        user.opcode in ("bitcast", "tuple") and (user.is_root or _is_result(inside, user)) for user in users
    )


@functools.cache
def _parenthesis(text: str) -> tuple[str, str]:
    """What is within the parenthesis that `text` begins in, and what follows."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:place], text[place + 1 :]
    return text, ""
