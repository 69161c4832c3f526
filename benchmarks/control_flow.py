"""Instructions of a GPU kernel, and its main path: one time round the loop that does the work."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

VECTOR = 16  # bytes: the widest access that every target has


class Instruction(NamedTuple):
    address: int
    predicate: str  # "@!P0", or empty
    opcode: str  # "LDG.E.EF.128"
    operands: str  # "R8, desc[UR10][R8.64]"; of a branch, the address it goes to comes last

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def bytes(self) -> int:
        """What a thread moves, if this is a load or a store."""
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", self.opcode)
        return int(bits.group(1)) // 8 if bits else 4


class Code(tuple[Instruction, ...]):
    """Instructions in a row."""

    def count(self, *names: str) -> int:
        return sum(i.name in names for i in self)

    @property
    def loads(self) -> list[int]:
        """The bytes of each load from global memory."""
        return [i.bytes for i in self if i.name in ("LDG", "LDGSTS")]

    @property
    def stores(self) -> list[int]:
        """The bytes of each store to global memory; atomics are none."""
        return [i.bytes for i in self if i.name == "STG"]

    @property
    def calls(self) -> int:
        """Calls that return; one with a condition is how some far jumps are written."""
        return sum(i.name == "CALL" and not i.predicate for i in self)

    @property
    def atomics(self) -> int:
        return self.count("ATOM", "ATOMG", "RED", "REDG")

    @property
    def arithmetic(self) -> bool:
        """Whether anything is computed of elements. Integers are not: they are addresses, flags."""
        return any(re.match("F(ADD|MUL|FMA|SETP|MNMX)|MUFU", i.opcode) for i in self)


def wide(accesses: Iterable[int]) -> list[int]:
    """Those of 16 bytes or more."""
    return [size for size in accesses if size >= VECTOR]


def main_path(code: Code) -> Code:
    """One time round the loop that moves most data, or through a kernel where no loop moves any.

    Of a branch the longer way is taken, and the one that moves data before any other; but never a
    way that is rarely gone (`_detours`). What is left is what a row of a group costs, or a row with
    edits, while the group or set stays the same.
    """
    graph = _Graph(code)
    everything = graph.reached(0, set(range(len(graph.blocks))))
    head, body = max(graph.loops, key=lambda loop: graph.moved(loop[1]), default=(0, everything))
    if graph.moved(body)[0] == 0 and graph.moved(everything) > graph.moved(body):
        head, body = 0, everything
    ends = {block for block in body if head in graph.successors[block]} or {
        block for block in body if graph.blocks[block].count("EXIT")
    }
    straight = body - _detours(graph, head, body, ends)

    # Narrow accesses count only where there are no wide ones: tables are no reason for a way.
    unit = 0 if graph.moved(body)[0] else 1

    def extended(path: tuple[int, int, tuple[int, ...]], block: int):
        return (
            path[0] + graph.data[block][unit],
            path[1] + len(graph.blocks[block]),
            (*path[2], block),
        )

    best = {head: extended((0, 0, ()), head)}
    waiting = [head]
    while waiting:
        block = waiting.pop(0)
        for successor in graph.successors[block]:
            if successor not in straight or graph.returns(block, successor):
                continue
            found = extended(best[block], successor)
            if successor not in best or found[:2] > best[successor][:2]:
                best[successor] = found
                waiting.append(successor)
    *_, path = max(best[block] for block in ends if block in best)
    return Code(i for block in path for i in graph.blocks[block])


def _detours(graph: _Graph, head: int, body: set[int], ends: set[int]) -> set[int]:
    """What is mostly jumped over: a flush of counters, a search, the slow way of a division.

    It has an atomic, a call or a loop in it and computes nothing of the elements; or it is for
    NaNs.
    """
    inner = body - graph.own(body)
    found: set[int] = set()
    for block in sorted(body - {head}):
        if block in found or len(graph.predecessors[block]) != 1:
            continue
        (before,) = graph.predecessors[block]
        if len(graph.successors[before]) == 1:
            continue
        region = body - graph.reached(head, body - {block})  # only reached by way of `block`
        code = Code(i for member in region for i in graph.blocks[member])
        rare = not code.arithmetic and (code.atomics or code.calls or region & inner)
        if not (rare or graph.asks_for_nan(before)) or wide(code.loads + code.stores):
            continue
        if ends & graph.reached(head, body - found - region):
            found |= region
    return found


class _Graph:
    """Blocks of instructions without a jump in or out, and where each may go on."""

    def __init__(self, code: Code) -> None:
        index = {instruction.address: at for at, instruction in enumerate(code)}
        targets: dict[int, int] = {}  # index of a branch -> index of the instruction it goes to
        called: set[int] = set()
        starts = {0}
        for at, instruction in enumerate(code):
            if instruction.name in ("BRA", "JMP", "CALL"):
                target = index[int(instruction.operands.split()[-1], 16)]
                starts.add(target)
                if instruction.name == "CALL" and not instruction.predicate:
                    called.add(target)
                    continue
                targets[at] = target
            elif instruction.name not in ("EXIT", "RET", "BRX"):
                continue
            starts.add(at + 1)
        bounds = sorted(starts | {len(code)})
        self.blocks = [
            Code(code[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)
        ]
        self.successors: list[set[int]] = [set() for _ in self.blocks]
        number = {start: block for block, start in enumerate(bounds)}
        for block, end in enumerate(bounds[1:]):
            last = code[end - 1]
            if end - 1 in targets:
                self.successors[block].add(number[targets[end - 1]])
            # A branch may have its condition before the address: `BRA.U UP0, 0x90`.
            conditional = last.predicate or "," in last.operands
            ends = end - 1 in targets or last.name in ("EXIT", "RET", "BRX")
            if end < len(code) and (conditional or not ends):
                self.successors[block].add(number[end])
        self._add_indirect({number[start] for start in called})
        self.data = [
            (sum(wide(moved)), sum(moved))
            for moved in (block.loads + block.stores for block in self.blocks)
        ]

    def _add_indirect(self, called: set[int]) -> None:
        """An indirect branch goes to what comes after it and is reached in no other way."""
        reached = set.union(called, {0}, *self.successors)
        switch = None
        for block, code in enumerate(self.blocks):
            if switch is not None and block not in reached:
                self.successors[switch].add(block)
            if code[-1].name == "BRX":
                switch = block

    @cached_property
    def predecessors(self) -> list[set[int]]:
        came_from: list[set[int]] = [set() for _ in self.blocks]
        for block in self.reached(0, set(range(len(self.blocks)))):
            for successor in self.successors[block]:
                came_from[successor].add(block)
        return came_from

    @cached_property
    def loops(self) -> list[tuple[int, set[int]]]:
        """The block that each loop is entered at, and all its blocks."""
        found: dict[int, set[int]] = {}
        for head in range(len(self.blocks)):
            for last in self.predecessors[head]:
                body, waiting = {head}, [last]
                while waiting:
                    block = waiting.pop()
                    if block not in body:
                        body.add(block)
                        waiting += self.predecessors[block]
                # What is reached around its head is no loop, and the way there an ordinary jump.
                if head == 0 or 0 not in body:
                    found.setdefault(head, set()).update(body)
        return list(found.items())

    def returns(self, block: int, successor: int) -> bool:
        """Whether this way closes a loop."""
        return any(successor == head and block in body for head, body in self.loops)

    def own(self, blocks: set[int]) -> set[int]:
        """Without the loops within."""
        return blocks.difference(*(body for _, body in self.loops if body < blocks))

    def moved(self, blocks: set[int]) -> tuple[int, int]:
        """Bytes in wide accesses, and in all, of a thread in these blocks but no loop within."""
        data = [self.data[block] for block in self.own(blocks)]
        return sum(in_vectors for in_vectors, _ in data), sum(total for _, total in data)

    def reached(self, start: int, within: set[int]) -> set[int]:
        found: set[int] = set()
        waiting = [start]
        while waiting:
            block = waiting.pop()
            if block in within and block not in found:
                found.add(block)
                waiting += self.successors[block]
        return found

    def asks_for_nan(self, block: int) -> bool:
        """Whether a block ends in a branch on a value being NaN."""
        *before, last = self.blocks[block]
        if (condition := re.search(r"P\d", last.predicate)) is None:
            return False
        for instruction in reversed(before):
            if instruction.operands.startswith(condition.group() + ","):
                return instruction.opcode.startswith("FSETP.NAN")
        return False
