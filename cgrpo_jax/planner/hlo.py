"""Parses the HLO text of a compiled program (`compiled.as_text()`), and finds the trip counts of its loops.

Imports no jax, so that a text kept by `--hlo` can be read anywhere.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f4e2m1fn": 4, "f8e4m3": 8, "f8e4m3fn": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2": 8,
    "f8e5m2fnuz": 8, "f8e8m0fnu": 8, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,<=]*)\]")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\{\s*$")
_BEGIN = re.compile(r"^\s+(ROOT\s+)?%([\w.\-]+) = ")
_SAME = (
    "copy",
    "bitcast",
    "convert",
    "reshape",
    "opt-barrier",
    "optimization-barrier",
)  # keep the value of a scalar


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    inside: str  # the text between the parentheses
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inside)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    def called(self) -> str | None:
        """The computation that a fusion or a call runs."""
        return self.attribute(r"(?:calls|to_apply)=%([\w.\-]+)")


@dataclasses.dataclass
class Computation:
    name: str
    of_name: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.of_name.values())


@dataclasses.dataclass
class Module:
    computations: dict[str, Computation]
    entry: str
    partitions: int  # devices that run the program together
    known: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)  # the cache of `Scalars`


def parameters(module: Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of each argument of a program on one device, without arguments that jit dropped."""
    for made in module.computations[module.entry]:
        if made.op == "parameter":
            yield from arrays(made.type)


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of each array in a type, which may be a tuple of tuples."""
    found = []
    for dtype, dimensions in _ARRAY.findall(type_):
        if dtype in BITS:
            sizes = [int(size.replace("<=", "")) for size in dimensions.split(",") if size]
            found.append((dtype, tuple(sizes)))
    return found


def bytes_of(type_: str) -> float:
    """Bytes of all arrays in a type, without padding of layouts."""
    return sum((math.prod(sizes) * BITS[dtype] / 8 for dtype, sizes in arrays(type_)), 0.0)


def _closing(text: str, first: int) -> int:
    """Index behind the bracket that closes the one at `first`."""
    depth = 0
    for index in range(first, len(text)):
        if text[index] in "([{":
            depth += 1
        elif text[index] in ")]}":
            depth -= 1
            if not depth:
                return index + 1
    return len(text)


def _instruction(line: str, begin: re.Match) -> Instruction:
    start = begin.end()
    behind_type = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    open_ = line.index("(", behind_type)
    close = _closing(line, open_)
    op = line[behind_type:open_].strip()
    return Instruction(begin[2], line[start:behind_type], op, line[open_ + 1 : close - 1], line[close:], bool(begin[1]))


def parse(text: str) -> Module:
    """Parses a module. An instruction may span several lines, as those with the metadata of kernels do."""
    computations, entry = dict[str, Computation](), ""
    current: Computation | None = None
    pieces: list[str] = []

    def finish() -> None:
        begin = _BEGIN.match(pieces[0]) if pieces else None
        if begin and current is not None:
            made = _instruction(" ".join(pieces), begin)
            current.of_name[made.name] = made
            current.root = made.name if made.root else current.root
        pieces.clear()

    for line in text.splitlines():
        header = _HEADER.match(line) if current is None and not line.startswith(" ") else None
        if header:
            current = Computation(header[2])
            computations[current.name] = current
            entry = current.name if header[1] else entry
        elif current is not None and line.rstrip() == "}":
            finish()
            current = None
        elif _BEGIN.match(line):
            finish()
            pieces.append(line)
        elif pieces:
            pieces.append(line.strip())
    partitions = re.search(r"num_partitions=(\d+)", text[:10_000])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


class Linear(NamedTuple):
    """The value `offset`, or `offset` plus item `item` of the state of the loop."""

    item: int | None
    offset: int


class Comparison(NamedTuple):
    left: Any
    right: Any
    direction: str


STATE = "the state of the loop"
Known = Linear | Comparison | str | None  # the value of a scalar; None: unknown


def _combined(left: Known, right: Known, sign: int) -> Known:
    if not isinstance(left, Linear) or not isinstance(right, Linear) or (right.item is not None and sign < 0):
        return None
    if left.item is not None and right.item is not None:
        return None
    item = right.item if left.item is None else left.item
    return Linear(item, left.offset + sign * right.offset)


class Scalars:
    """Evaluates scalars of a module symbolically, from constants and the state of a loop."""

    def __init__(self, module: Module):
        self.module = module

    def value(self, inside: Computation, name: str, arguments: Sequence[Known]) -> Known:
        """The value of an instruction, given the parameters of its computation."""
        key = (inside.name, name, tuple(arguments))  # cached, or the work would double with each call in a chain
        if key not in self.module.known:
            self.module.known[key] = self._value(inside, name, arguments)
        return self.module.known[key]

    def _value(self, inside: Computation, name: str, arguments: Sequence[Known]) -> Known:
        made = inside.of_name.get(name)
        if made is None:
            return None
        if made.op == "constant":
            return Linear(None, int(made.inside)) if re.fullmatch(r"-?\d+", made.inside.strip()) else None
        if made.op == "parameter":
            place = int(made.inside)
            return arguments[place] if place < len(arguments) else None
        if made.op == "get-tuple-element":
            return self.item(inside, made.operands[0], int(made.attribute(r"index=(\d+)") or 0), arguments)
        if made.op in _SAME:
            return self.value(inside, made.operands[0], arguments)
        if made.op in ("add", "subtract", "compare"):
            left, right = (self.value(inside, operand, arguments) for operand in made.operands)
            if made.op == "compare":
                return Comparison(left, right, made.attribute(r"direction=(\w+)") or "")
            return _combined(left, right, 1 if made.op == "add" else -1)
        if made.op in ("fusion", "call"):
            callee, own = self._entered(inside, made, arguments)
            return self.value(callee, callee.root, own) if callee else None
        return None

    def _entered(
        self, inside: Computation, made: Instruction, arguments: Sequence[Known]
    ) -> tuple[Computation | None, list[Known]]:
        callee = self.module.computations.get(made.called() or "")
        return callee, [self.value(inside, operand, arguments) for operand in made.operands] if callee else []

    def item(self, inside: Computation, name: str, index: int, arguments: Sequence[Known]) -> Known:
        """The value of an item of the tuple that an instruction returns."""
        made = inside.of_name.get(name)
        if made is None:
            return None
        if made.op == "tuple":
            return self.value(inside, made.operands[index], arguments)
        if made.op in _SAME:
            return self.item(inside, made.operands[0], index, arguments)
        if made.op == "fusion":
            callee, own = self._entered(inside, made, arguments)
            return self.item(callee, callee.root, index, own) if callee else None
        return Linear(index, 0) if self.value(inside, name, arguments) == STATE else None


_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE", "EQ": "EQ"}


def trip_count(module: Module, inside: Computation, loop: Instruction, state: Sequence[int | None] = ()) -> int | None:
    """How often the body of a `while` runs; None where that depends on data.

    Args:
      state: of the enclosing loop: its constant items, see `constants`.
    """
    told = loop.attribute(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')
    if told:
        return int(told)
    scalars, body = Scalars(module), _part(module, loop, "body")
    condition = _part(module, loop, "condition")
    test = scalars.value(condition, condition.root, [STATE])
    if not isinstance(test, Comparison) or not isinstance(test.left, Linear) or not isinstance(test.right, Linear):
        return None
    left, right, direction = test
    if left.item is None:
        left, right, direction = right, left, _MIRRORED.get(direction, "")
    if left.item is None:
        return None
    begin = initial(module, inside, loop, left.item, state)
    limit = right.offset
    if right.item is not None:
        bound = initial(module, inside, loop, right.item, state)
        if bound is None or scalars.item(body, body.root, right.item, [STATE]) != Linear(right.item, 0):
            return None
        limit += bound
    after = scalars.item(body, body.root, left.item, [STATE])
    if begin is None or not isinstance(after, Linear) or after.item != left.item or not after.offset:
        return None
    return _turns(begin + left.offset, limit, after.offset, direction)


def _turns(begin: int, limit: int, step: int, direction: str) -> int | None:
    if direction in ("LT", "GT", "NE"):
        return max(0, -(-(limit - begin) // step))
    if direction in ("LE", "GE"):
        return max(0, (limit - begin) // step + 1)
    return None


def _part(module: Module, loop: Instruction, which: str) -> Computation:
    return module.computations[loop.attribute(rf"{which}=%([\w.\-]+)") or ""]


def initial(
    module: Module, inside: Computation, loop: Instruction, index: int, state: Sequence[int | None] = ()
) -> int | None:
    """The value of an item of a loop's state before the first turn; None if unknown."""
    found = Scalars(module).item(inside, loop.operands[0], index, [STATE])
    if not isinstance(found, Linear):
        return None
    if found.item is None:
        return found.offset
    around = state[found.item] if found.item < len(state) else None
    return None if around is None else around + found.offset


def constants(
    module: Module, inside: Computation, loop: Instruction, state: Sequence[int | None] = ()
) -> list[int | None]:
    """The items of a loop's state that are known integers and never change; None for all others."""
    body, scalars = _part(module, loop, "body"), Scalars(module)
    count = len(body.of_name[body.root].operands) if body.of_name[body.root].op == "tuple" else 0
    kept = []
    for index in range(count):
        stays = scalars.item(body, body.root, index, [STATE]) == Linear(index, 0)
        kept.append(initial(module, inside, loop, index, state) if stays else None)
    return kept
