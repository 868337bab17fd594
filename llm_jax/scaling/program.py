"""What a compiled program does on one chip: arithmetic, exchanges between chips, memory traffic.

Told from its optimised HLO, with loops multiplied out; see `llm_jax.scaling.hlo`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from llm_jax.scaling.hlo import Array, Computation, Instruction, Module

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute",
)  # fmt: skip
# They hand on what stands in memory already, or stand for what the computations they call do.
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "copy-done", "slice-done",
    "async-done", "async-update", "opt-barrier", "optimization-barrier",
)  # fmt: skip
PALLAS = "tpu_custom_call"
SPREAD = "AsyncCollective"  # begins and ends an exchange that is spread over fusions


@dataclasses.dataclass(frozen=True)
class Collective:
    """All executions of exchanges of one kind over the same mesh axes.

    bytes: that a chip sends over its links. count: of executions.
    """

    kind: str
    axes: tuple[str, ...]
    count: float
    bytes: float


def matrix_flops(module: Module) -> float:
    """Floating-point operations of all matrix products, a multiply-add as two. Kernels written in
    Pallas are opaque and not among them."""
    return sum(
        times * _product_flops(computation, instruction)
        for computation, instruction, times in _executed(module)
        if instruction.opcode in ("dot", "convolution")
    )


def kernel_calls(module: Module) -> dict[str, float]:
    """How often each Pallas kernel runs, by its name up to the number that XLA appends."""
    calls: dict[str, float] = collections.defaultdict(float)
    for _, instruction, times in _executed(module):
        if instruction.opcode == "custom-call" and PALLAS in instruction.attributes:
            calls[re.sub(r"[.\d]+$", "", instruction.name)] += times
    return dict(calls)


def collectives(module: Module, mesh_shape: Mapping[str, int]) -> tuple[Collective, ...]:
    """The exchanges by kind and mesh axes, those that send most first.

    Args:
      mesh_shape: axis → size in the mesh's own order; devices are numbered along it.
    """
    found: dict[tuple[str, tuple[str, ...]], list[float]] = collections.defaultdict(
        lambda: [0.0, 0.0]
    )
    for computation, instruction, times in _exchanges(module):
        kind = instruction.opcode.removesuffix("-start")
        groups = _groups(instruction.attributes, math.prod(mesh_shape.values()))
        size = len(groups[0])
        if size < 2:
            continue
        axes = _axes(groups, mesh_shape)
        given = sum(array.bytes for array in _operand_arrays(computation, instruction))
        sent = {
            "all-gather": given * (size - 1),
            "all-reduce": 2 * given * (size - 1) / size,
            "collective-permute": given,
        }.get(kind, given * (size - 1) / size)
        entry = found[kind, axes]
        entry[0] += times
        entry[1] += times * sent
    return tuple(sorted(
        (Collective(kind, axes, *numbers) for (kind, axes), numbers in found.items()),
        key=lambda collective: -collective.bytes,
    ))  # fmt: skip


def memory_traffic(module: Module) -> float:
    """Bytes read from and written to the chip's main memory.

    Every instruction reads its operands once and writes its results, as far as they are not held
    on the core; of an operand that a fusion only takes slices of, the slices.
    """
    total = 0.0
    for computation, instruction, times in _executed(module):
        if computation.name in module.inner or instruction.opcode in FREE:
            continue
        total += times * _traffic(module, computation, instruction)
    for computation, exchange, times in _exchanges(module):
        if computation.name in module.inner:
            given = _held(list(_operand_arrays(computation, exchange)))
            total += times * (given + _held(exchange.results))
    return total


def _executed(module: Module) -> Iterator[tuple[Computation, Instruction, float]]:
    for name, computation in module.computations.items():
        times = module.executions.get(name, 0.0)
        for instruction in computation.instructions.values():
            yield computation, instruction, times


def _exchanges(module: Module) -> Iterator[tuple[Computation, Instruction, float]]:
    """What is executed of `COLLECTIVES`.

    A TPU's compiler spreads an exchange over fusions, so that it goes on while they compute. It
    stands in each of them, with one channel, and is one.
    """
    spread = set()
    for computation, instruction, times in _executed(module):
        if not times or instruction.opcode.removesuffix("-start") not in COLLECTIVES:
            continue
        channel = _number(instruction.attributes, "channel_id", 0)
        if computation.name in module.inner and channel:
            if channel in spread:
                continue
            spread.add(channel)
        yield computation, instruction, times


def _operand_arrays(computation: Computation, instruction: Instruction) -> Iterator[Array]:
    for name in instruction.operands:
        made = computation.instructions.get(name)
        if made is not None:
            yield from made.results


# --- arithmetic -----------------------------------------------------------------------------------


def _product_flops(computation: Computation, instruction: Instruction) -> float:
    left, right = (computation.instructions[name].results[0] for name in instruction.operands[:2])
    result = instruction.results[0]
    if instruction.opcode == "dot":
        contracted = _numbers(instruction.attributes, "lhs_contracting_dims")
        return 2.0 * math.prod(result.dims) * math.prod(left.dims[d] for d in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction.name
    left_labels, right_labels, result_labels = labels.groups()
    window = _Window.read(instruction.attributes)
    spatial = sorted(label for label in result_labels if label.isdigit())
    pairs = math.prod(
        window.pairs(
            int(label),
            left.dims[left_labels.index(label)],
            right.dims[right_labels.index(label)],
            result.dims[result_labels.index(label)],
        )
        for label in spatial
    )
    rows = result.dims[result_labels.index("b")]
    outputs = result.dims[result_labels.index("f")]
    inputs = right.dims[right_labels.index("i")]  # of one feature group
    return 2.0 * rows * outputs * inputs * pairs / _number(
        instruction.attributes, "batch_group_count", 1
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Window:
    """The window attribute of a convolution: one entry a spatial dimension."""

    stride: tuple[int, ...]
    low: tuple[int, ...]
    left_dilation: tuple[int, ...]
    right_dilation: tuple[int, ...]

    @classmethod
    def read(cls, attributes: str) -> _Window:
        match = re.search(r"window=\{([^}]*)\}", attributes)
        fields = dict(part.split("=") for part in match[1].split()) if match else {}

        def entries(name: str) -> tuple[int, ...]:
            return tuple(
                int(entry.split("_")[0]) for entry in fields.get(name, "").split("x") if entry
            )

        return cls(entries("stride"), entries("pad"), entries("lhs_dilate"), entries("rhs_dilate"))

    def pairs(self, dimension: int, left: int, right: int, result: int) -> int:
        """Pairs of a result and a place of the window that meet an element of the left operand, not
        padding: how XLA lays out some batched products makes most of them padding."""

        def entry(entries: tuple[int, ...], default: int) -> int:
            return entries[dimension] if dimension < len(entries) else default

        results, places = np.arange(result)[:, None], np.arange(right)
        dilation = entry(self.left_dilation, 1)
        at = results * entry(self.stride, 1) + places * entry(self.right_dilation, 1)
        at = at - entry(self.low, 0)
        inside = (at >= 0) & (at <= (left - 1) * dilation) & (at % dilation == 0)
        return int(inside.sum())


# --- exchanges ------------------------------------------------------------------------------------


def _groups(attributes: str, devices: int) -> Sequence[Sequence[int]]:
    """The devices that exchange with one another, as numbers along the mesh."""
    pairs = re.search(r"source_target_pairs=\{\{(.*?)\}\}", attributes)
    if pairs:
        return [tuple(map(int, pair.split(","))) for pair in pairs[1].split("},{")]
    listed = re.search(r"replica_groups=\{\{(.*?)\}\}", attributes)
    if listed:
        return [tuple(map(int, group.split(","))) for group in listed[1].split("},{")]
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if tiled:
        shape, reshape = (tuple(map(int, tiled[i].split(","))) for i in (1, 2))
        order = tuple(map(int, tiled[3].split(","))) if tiled[3] else tuple(range(len(reshape)))
        return np.arange(devices).reshape(reshape).transpose(order).reshape(shape).tolist()
    named = re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", attributes)
    if named:
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        given = re.search(r"device_ids=\(?\[([\d,]+)\]\)?", named[1])
        ids = np.array(list(map(int, given[1].split(",")))) if given else np.arange(devices)
        names = [name for name, _ in axes]
        grouped = [names.index(name) for name in re.findall(r"'(\w+)'", named[2])]
        rest = [index for index in range(len(names)) if index not in grouped]
        grid = ids.reshape([int(size) for _, size in axes]).transpose(rest + grouped)
        return grid.reshape(-1, math.prod(grid.shape[len(rest) :])).tolist()
    return [tuple(range(devices))]


def _axes(groups: Sequence[Sequence[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    places = np.array(np.unravel_index(np.array(groups), tuple(mesh_shape.values())))
    differs = np.any(places != places[..., :1], axis=(1, 2))
    return tuple(axis for axis, differ in zip(mesh_shape, differs, strict=True) if differ)


# --- memory ---------------------------------------------------------------------------------------


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode in ("dynamic-slice", "slice", "slice-start", "gather"):
        return 2 * _held(instruction.results[:1])
    if instruction.opcode == "dynamic-update-slice":
        update = computation.instructions[instruction.operands[1]]
        return 2 * _held(update.results)
    if instruction.opcode == "copy-start":  # to or from the core
        return _held(instruction.results[:2])
    if instruction.opcode == "fusion":
        inside = module.computations[dict(instruction.called())["calls"]]
        return _fusion_traffic(computation, instruction, inside)
    read = sum(_held([array]) for array in _operand_arrays(computation, instruction))
    return read + _held(instruction.results)


def _fusion_traffic(outer: Computation, fusion: Instruction, inside: Computation) -> float:
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for instruction in inside.instructions.values():
        for name in instruction.operands:
            users[name].append(instruction)
    parameters = {
        int(instruction.literal): instruction
        for instruction in inside.instructions.values()
        if instruction.opcode == "parameter"
    }
    total = 0.0
    for number, name in enumerate(fusion.operands):
        made = outer.instructions.get(name)
        if made is None:
            continue
        using = [u for u in users[parameters[number].name] if not _hands_on(u)]
        if all(_takes_part(user, parameters[number].name) for user in using):
            # In place: the slices taken, or the places overwritten, which count with the results.
            total += sum(_held(u.results) for u in using if u.opcode != "dynamic-update-slice")
        else:
            total += _held(made.results)
    return total + _written(inside, fusion)


def _hands_on(user: Instruction) -> bool:
    """Whether it reads nothing: it is a result as it came, or belongs to a spread exchange."""
    return user.opcode in ("tuple", *COLLECTIVES) or SPREAD in user.attributes


def _takes_part(user: Instruction, name: str) -> bool:
    parts = ("dynamic-slice", "slice", "gather", "dynamic-update-slice")
    return user.opcode in parts and user.operands[0] == name


def _written(inside: Computation, fusion: Instruction) -> float:
    root = inside.root
    if SPREAD in root.attributes:
        return 0.0
    roots = [inside.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for made, result in zip(roots, fusion.results, strict=False):
        while made.opcode == "bitcast":
            made = inside.instructions[made.operands[0]]
        if made.opcode in ("parameter", *COLLECTIVES):
            continue
        if made.opcode == "dynamic-update-slice":
            total += _held(inside.instructions[made.operands[1]].results)
        else:
            total += _held([result])
    return total


def _held(arrays: Sequence[Array]) -> float:
    """Bytes of those that stand in the chip's main memory."""
    return sum(array.bytes for array in arrays if array.space == 0)


@functools.cache
def _attribute(name: str) -> re.Pattern[str]:
    return re.compile(rf"\b{name}=\{{?([\d,]*)")


def _numbers(attributes: str, name: str) -> tuple[int, ...]:
    match = _attribute(name).search(attributes)
    return tuple(int(n) for n in match[1].split(",") if n) if match else ()


def _number(attributes: str, name: str, default: int) -> int:
    return next(iter(_numbers(attributes, name)), default)
