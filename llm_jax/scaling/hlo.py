"""Reads a compiled program: the text of XLA's optimised HLO, as instructions in computations.

What a program costs is told by its text alone: XLA's own analysis counts the body of a loop once,
however often it runs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8, "f4e2m1fn": 4,
}  # fmt: skip

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(")
_CALLED = re.compile(
    r"\b(calls|condition|body|to_apply|branch_computations|true_computation|false_computation)="
    r"(?:%?([\w.-]+)|\{([^}]*)\})"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """dims: the shape. space: 0 for the chip's main memory; others are on the core, or the host."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> float:
        return math.prod(self.dims) * BITS.get(self.dtype, 0) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """results: the arrays it makes, one or those of a tuple. operands: names. attributes: the text
    behind the operands."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    def called(self) -> Iterator[tuple[str, str]]:
        """(how, computation) of each computation that this one refers to."""
        for match in _CALLED.finditer(self.attributes):
            for name in (match[2] or match[3]).split(","):
                yield match[1], name.strip().lstrip("%")


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)


@dataclasses.dataclass(frozen=True)
class Module:
    """entry: the computation that runs once. computations: all of them by name."""

    entry: str
    computations: Mapping[str, Computation]

    @functools.cached_property
    def executions(self) -> dict[str, float]:
        """How often each computation runs: loops are multiplied out, of a branch each side counts.

        Computations inside fusions, reductions and the like run with their caller.
        """
        # Callers stand behind what they call in the text, so the reverse order meets them first.
        times: dict[str, float] = collections.defaultdict(float, {self.entry: 1.0})
        for name in reversed(list(self.computations)):
            for instruction in self.computations[name].instructions.values():
                trips = self.trips(name, instruction) if instruction.opcode == "while" else 1
                for _, called in instruction.called():
                    times[called] += times[name] * trips
        return dict(times)

    @functools.cached_property
    def inner(self) -> set[str]:
        """Computations inside an instruction: what they make never stands in memory as such."""
        return {
            called
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode not in ("while", "conditional", "call", "async-start")
            for _, called in instruction.called()
        }

    def trips(self, computation: str, loop: Instruction) -> int:
        """How often a loop's body runs: as XLA notes, or by its condition, a counter below a
        constant. 1 where neither says so, as of a loop until convergence.
        """
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if noted:
            return int(noted[1])
        called = dict(loop.called())
        condition = self.computations[called["condition"]]
        compare = condition.root
        while compare.opcode in ("copy", "bitcast", "convert"):
            compare = condition.instructions[compare.operands[0]]
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return 1
        counter, limit = (condition.instructions[name] for name in compare.operands)
        if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
            return 1
        index = int(re.search(r"index=(\d+)", counter.attributes)[1])  # type: ignore[index]
        span = int(limit.literal) - self._start(computation, loop, index)
        return max(1, math.ceil(span / _stride(self.computations[called["body"]], index)))

    def _start(self, computation: str, loop: Instruction, index: int) -> int:
        """The counter's first value; 0 where it is not plain to see."""
        instructions = self.computations[computation].instructions
        made = instructions.get(loop.operands[0])
        if made is None or made.opcode != "tuple":
            return 0
        first = instructions.get(made.operands[index])
        while first is not None and first.opcode in ("copy", "bitcast"):
            first = instructions.get(first.operands[0])
        if first is None or first.opcode != "constant" or not first.literal.isdigit():
            return 0
        return int(first.literal)


def _stride(body: Computation, index: int) -> int:
    """What a turn of a loop adds to its counter: more than 1 where XLA has unrolled it."""
    if body.root.opcode != "tuple":
        return 1
    made, stride = body.instructions[body.root.operands[index]], 0
    while made.opcode in ("add", "copy", "bitcast"):
        operands = [body.instructions[name] for name in made.operands]
        constants = [o for o in operands if o.opcode == "constant"]
        stride += sum(int(constant.literal) for constant in constants)
        made = next(o for o in operands if o.opcode != "constant")
    return stride or 1


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`.

    Raises:
      ValueError: no entry computation in the text.
    """
    computations: dict[str, Computation] = {}
    entry, name = None, ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            header = _HEADER.match(line)
            if header:
                name, instructions = header[2], {}
                entry = name if header[1] else entry
        elif line.rstrip() == "}" and name:  # a kernel's metadata may have lines of its own
            computations[name], name = Computation(name, instructions), ""
        elif name:
            instruction = _instruction(line)
            if instruction is not None:
                instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text holds no entry computation")
    return Module(entry, computations)


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    rest = re.sub(r"/\*[^*]*\*/", "", line[head.end() :])
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode_end = rest.index("(", shape_end)
    close = _closing(rest, opcode_end)
    arguments = rest[opcode_end + 1 : close]
    return Instruction(
        name=head[2],
        opcode=rest[shape_end:opcode_end].strip(),
        results=tuple(_arrays(rest[:shape_end])),
        operands=tuple(re.findall(r"%([\w.-]+)", arguments)),
        literal=arguments,
        attributes=rest[close + 1 :],
        is_root=bool(head[1]),
    )


def _arrays(text: str) -> Iterator[Array]:
    for match in _ARRAY.finditer(text):
        if match[1] in BITS:
            dims = tuple(int(d.lstrip("<=")) for d in match[2].split(",") if d)
            space = re.search(r"S\((\d+)\)", match[3] or "")
            yield Array(match[1], dims, int(space[1]) if space else 0)


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")
