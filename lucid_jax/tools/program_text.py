"""Reading the text of a compiled program (optimized HLO): its computations, shapes and source lines."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of an instruction's result, of one device."""

    dtype: str  # as XLA calls it: bf16, s32, pred
    dims: tuple[int, ...]
    space: int  # memory space; 0 is the main one, others are smaller and faster
    layout: str = ""  # how it lies there: the order of its axes, and tiles

    @property
    def nbytes(self) -> int:
        """Without what a layout pads."""
        bits = re.search(r"\d+", self.dtype)
        width = int(bits[0]) if bits else 8 if self.dtype == "pred" else 0  # tokens have none
        return math.prod(self.dims) * width // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Frame:
    """A line of Python that led to an instruction."""

    file: str
    line: int
    function: str


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    result: str  # shapes as they are written
    operands: tuple[str, ...]
    argument: str  # what stands in the parentheses
    attributes: str

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Of the result: one, or those of a tuple."""
        return tuple(_shapes(self.result))

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs or is made of."""
        names = [name for _, name in _CALLED.findall(self.attributes)]
        for several in _SEVERAL_CALLED.findall(self.attributes):
            names += [name.strip().lstrip("%") for name in several.split(",")]
        return tuple(names)

    def attribute(self, name: str) -> str | None:
        """The value of an attribute such as `body=%b`, `index=1` or `direction=LT`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @cached_property
    def frame_id(self) -> int:
        """Where it comes from; 0 if that is not said."""
        found = _FRAME_ID.search(self.attributes)
        return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; the last is not always the result."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Of each instruction, those that take its result."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                found.setdefault(operand, []).append(instruction)
        return found

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results one takes."""
        known = self.instructions
        return [known[name] for name in instruction.operands if name in known]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: what runs, and what its text says besides.

    Attributes:
        computations: by name.
        entry: the name of the one that is run.
        reused: numbers of the parameters whose memory a result is written to.
        stacks: of each frame id, the lines of Python, the innermost first.
    """

    computations: dict[str, Computation]
    entry: str
    reused: frozenset[int]
    stacks: dict[int, tuple[Frame, ...]]


def read_program(text: str) -> Program:
    """Reads what `compiled.as_text()` gives.

    Raises:
        ValueError: if there is no program in it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> program = read_program(jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text())
        >>> [shape.dims for shape in program.computations[program.entry].instructions["x.1"].shapes]
        [(3,)]
    """
    computations, entry, lines = {}, "", text.splitlines()
    for name, body, is_entry in _bodies(lines):
        instructions, root = {}, ""
        for line in body:
            made = _instruction(line)
            if made is not None:
                instructions[made.name] = made
                root = made.name if line.lstrip().startswith("ROOT ") or not root else root
        computations[name] = Computation(name, instructions, root)
        entry = name if is_entry else entry
    if not entry:
        raise ValueError("expected the text of a compiled program, with an ENTRY computation")
    aliases = re.search(r"input_output_alias=\{(.*?)\}, \w+=", lines[0])
    reused = re.findall(r"\((\d+), \{", aliases[1]) if aliases else []
    return Program(computations, entry, frozenset(map(int, reused)), _stacks(lines))


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_SEVERAL_CALLED = re.compile(r"\b(?:branch_computations|called_computations)=\{([^{}]*)\}")
_FRAME_ID = re.compile(r"stack_frame_id=(\d+)")


def _bodies(lines: list[str]) -> Iterator[tuple[str, list[str], bool]]:
    """Name, lines and whether it is the entry, of each computation."""
    header: re.Match[str] | None = None
    body: list[str] = []
    for line in lines:
        if header is None:
            header, body = _HEADER.match(line), []
        elif line.startswith("}"):
            yield header[2], body, bool(header[1])
            header = None
        else:
            body.append(line)


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        order = layout.replace(space[0], "") if space else layout
        yield Shape(dtype, sizes, int(space[1]) if space else 0, order)


def _closing(text: str, opening: int) -> int:
    """The index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.finditer(r"[()]", text[opening:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return opening + match.start()
    return len(text)


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if found is None:
        return None
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    closing = _closing(rest, opening)
    argument = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    opcode = rest[:opening]
    return Instruction(found[1], opcode, result, operands, argument, rest[closing + 1 :])


def _stacks(lines: list[str]) -> dict[int, tuple[Frame, ...]]:
    """The lines that led to each frame, from the four tables before the computations."""
    tables: dict[str, dict[int, str]] = {}
    rows: dict[int, str] = {}
    for line in lines:
        number, _, value = line.partition(" ")
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            rows = tables.setdefault(line, {})
        elif number.isdigit():
            rows[int(number)] = value
        elif _HEADER.match(line):
            break
    files, functions = (
        {key: value.strip('"') for key, value in tables.get(name, {}).items()}
        for name in ("FileNames", "FunctionNames")
    )
    places = {}
    for key, row in tables.get("FileLocations", {}).items():
        at = _numbers(row)
        function = functions.get(at["function_name_id"], "")
        places[key] = Frame(files[at["file_name_id"]], at["line"], function)
    stacks: dict[int, tuple[Frame, ...]] = {}
    for key, row in sorted(tables.get("StackFrames", {}).items()):  # a parent comes before
        at = _numbers(row)
        # Its number is printed one too high: that of an outermost frame, which has none, is 1.
        parent = stacks.get(at["parent_frame_id"] - 1, ())
        stacks[key] = (places[at["file_location_id"]], *parent)
    return stacks


def _numbers(row: str) -> dict[str, int]:
    return {key: int(number) for key, number in re.findall(r"(\w+)=(\d+)", row)}
