"""What a compiled program does with large arrays: whole ones rewritten, collectives, calls of the host.

An array that is updated in place costs what is written into it; one that is copied, converted or
concatenated costs all of it. Which is which is the compiler's choice, and read here from its result.
"""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Callable, Iterator

from lucid_jax.tools.program_text import Computation, Frame, Instruction, Program, Shape


@dataclasses.dataclass(frozen=True)
class Event:
    """Something a program does that a decode step had better not.

    Attributes:
        kind: "copy", "convert", "concatenate", ... as the compiler does it; the name of a collective;
            what is called on the host.
        shape: of the array, on one device.
        nbytes: of the array, each time.
        of: the argument it is made from, as `state.layers[0].leaves['key']`; "" if not known.
        stack: the lines of Python that asked for it, the innermost first; () if not known.
        turns: how often; of loops whose turns the program does not say, each as often as was told.
        in_loop: whether it is done in each turn of a loop.
    """

    kind: str
    shape: str
    nbytes: int
    of: str
    stack: tuple[Frame, ...]
    turns: int
    in_loop: bool


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction that is run, which is part of no other."""

    instruction: Instruction
    inside: Computation
    turns: int
    in_loop: bool


_CARRIED = {"bitcast", "tuple", "get-tuple-element", "optimization-barrier"}
_NOT_RUN = _CARRIED | {"parameter", "constant", "after-all", "partition-id", "replica-id"}
_CONTROL = {"while", "conditional", "call"}
_IN_PLACE = {"dynamic-update-slice", "scatter"}
# Their results are not their operands rewritten.
_SOMETHING_ELSE = {
    "dot",
    "convolution",
    "reduce",
    "reduce-window",
    "iota",
    "constant",
    "sort",
    "rng",
}
# Of several in one fusion the first says best what is done.
_TELLING = (
    "concatenate", "pad", "gather", "transpose", "reverse", "convert", "copy", "slice",
    "dynamic-slice", "reshape", "select", "dynamic-update-slice", "scatter",
)  # fmt: skip
_COLLECTIVES = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|ragged-all-to-all|"
    r"collective-broadcast)(-start)?"
)


class Moves:
    """Questions to a program.

    Args:
        program: as `read_program` gives it.
        large: bytes from which on an array counts as large.
        turns: how often to count a loop that does not say how often it turns.
    """

    def __init__(self, program: Program, large: int, turns: int = 1) -> None:
        self._program = program
        self._large = large
        self._turns = turns
        self._callers = {
            name: (computation, instruction)
            for computation in program.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode in _CONTROL
            for name in instruction.called
        }

    def rewritten(self) -> list[Event]:
        """Large arrays that are made by writing another large one anew, whole."""
        return [
            self._event(kind, shape, run, frame)
            for run in self._runs()
            for kind, shape, frame in self._writes(run)
        ]

    def collectives(self) -> list[Event]:
        """What devices send to each other, of any size."""
        found = []
        for run in self._runs():
            for instruction in (run.instruction, *self._parts(run.instruction)):
                match = _COLLECTIVES.fullmatch(instruction.opcode)
                if match:
                    largest = max(instruction.shapes, key=lambda shape: shape.nbytes)
                    found.append(self._event(match[1], largest, run, instruction.frame_id))
        return found

    def host_calls(self) -> list[Event]:
        """Calls of Python, and transfers to or from the host."""
        found = []
        for run in self._runs():
            instruction = run.instruction
            kind = instruction.opcode
            if kind == "custom-call":
                kind = _target_of(instruction)
                called = "callback" in kind
            else:
                called = kind in ("infeed", "outfeed") or (
                    kind in ("send", "recv") and "is_host_transfer=true" in instruction.attributes
                )
            if called:
                shape = max(
                    instruction.shapes, key=lambda s: s.nbytes, default=Shape("token", (), 0)
                )
                found.append(self._event(kind, shape, run, instruction.frame_id))
        return found

    def cycles(self) -> int | None:
        """What a TPU's compiler estimates for all instructions; None if it says nothing."""
        given = [_cycles_of(run.instruction) for run in self._runs()]
        return self._total(_cycles_of) if any(given) else None

    def launches(self) -> int:
        """Kernels that a GPU is asked to run, of instructions that stand for one each."""
        return self._total(lambda instruction: int(instruction.opcode not in _NOT_RUN | _CONTROL
                           and not instruction.opcode.endswith("-done")
                           and _target_of(instruction) != "AllocateBuffer"))  # fmt: skip

    def loops_of_unknown_turns(self) -> int:
        """How many loops do not say how often they turn."""
        whiles = (run for run in self._runs() if run.instruction.opcode == "while")
        return sum(self._known_turns(run.inside, run.instruction) is None for run in whiles)

    def _runs(self) -> Iterator[Run]:
        """Every instruction that runs by itself, those of loops and of all branches included."""
        yield from self._runs_of(self._program.entry, 1, False)

    def _runs_of(self, name: str, turns: int, in_loop: bool) -> Iterator[Run]:
        computation = self._program.computations[name]
        for instruction in computation.instructions.values():
            yield Run(instruction, computation, turns, in_loop)
            inner, looping = turns, in_loop
            if instruction.opcode == "while":
                known = self._known_turns(computation, instruction)
                inner, looping = turns * (self._turns if known is None else known), True
            if _runs_others(instruction):
                for called in instruction.called:
                    yield from self._runs_of(called, inner, looping)

    def _total(self, weigh: Callable[[Instruction], int]) -> int:
        """The sum over all that runs, of branches the heaviest."""

        def of(name: str) -> int:
            computation, total = self._program.computations[name], 0
            for instruction in computation.instructions.values():
                total += weigh(instruction)
                inner = (
                    [of(called) for called in instruction.called]
                    if _runs_others(instruction)
                    else []
                )
                if instruction.opcode == "while":
                    known = self._known_turns(computation, instruction)
                    total += sum(inner) * (self._turns if known is None else known)
                else:
                    total += max(inner, default=0)
            return total

        return of(self._program.entry)

    def _known_turns(self, inside: Computation, loop: Instruction) -> int | None:
        """How often a loop turns, if it counts from 0 to a constant, as scans do."""
        said = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if said:
            return int(said[1])
        condition = self._program.computations[loop.attribute("condition") or ""]
        test = condition.instructions[condition.root]
        if test.opcode != "compare" or test.attribute("direction") != "LT":
            return None
        counter, bound = condition.operands(test)
        if bound.opcode != "constant" or counter.opcode != "get-tuple-element":
            return None
        (carry,) = inside.operands(loop)
        start = inside.operands(carry)[int(counter.attribute("index") or 0)]
        while start.opcode in ("copy", "bitcast"):
            (start,) = inside.operands(start)
        from_zero = start.opcode == "constant" and start.argument == "0"
        return int(bound.argument) if from_zero else None

    def _parts(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions that a fusion is made of."""
        if instruction.opcode == "fusion":
            for name in instruction.called:
                for part in self._program.computations[name].instructions.values():
                    yield part
                    yield from self._parts(part)

    def _writes(self, run: Run) -> Iterator[tuple[str, Shape, int]]:
        """What an instruction rewrites: how, what, and the frame that asks for it, or 0."""
        instruction = run.instruction
        opcode, shapes = instruction.opcode, instruction.shapes
        if self._written_back(run):
            return
        if opcode == "copy-start":  # of what it gives, the first is where to, the second where from
            shapes = shapes[:1]
        elif opcode in _NOT_RUN | _CONTROL | _IN_PLACE or opcode.endswith(("-start", "-done")):
            return
        if opcode == "custom-call" and (
            "output_to_operand_aliasing" in instruction.attributes
            or _target_of(instruction) == "AllocateBuffer"
        ):
            return
        for index, shape in enumerate(shapes):
            if (
                shape.nbytes < self._large or shape.space
            ):  # reading ahead into fast memory is reading
                continue
            if opcode == "fusion":
                body = self._program.computations[instruction.called[0]]
                root = body.instructions[body.root]
                made = body.operands(root)[index] if root.opcode == "tuple" else root
                chain = self._rewriting(body, made)
            else:
                chain = self._rewriting_alone(run.inside, instruction)
            steps = [step for step in chain if step.opcode not in _CARRIED | {"parameter"}]
            if steps and not {step.opcode for step in steps} <= _IN_PLACE:
                told = sorted([*steps, instruction], key=lambda step: _rank(_word(step)))
                frames = (step.frame_id for step in told if step.frame_id)
                yield _word(told[0]), shape, next(frames, 0)

    def _written_back(self, run: Run) -> bool:
        """Whether an array only returns to its memory, from a faster one in which it was updated.

        The compiler takes there for a while what fits. It is a copy all the same where the array as it
        was is needed once more, or has memory that is not given away.
        """
        inside, made = run.inside, run.instruction
        source = next(iter(inside.operands(made)), None)
        if source is None or not _moves(made, source, into_fast=False):
            return False
        if source.opcode in ("copy-done", "copy"):  # nothing was updated
            return False
        origin = self._read_ahead(inside, source)
        if origin is None or origin.name not in inside.instructions:
            return False
        given = origin.opcode == "parameter" and inside.name == self._program.entry
        if given and int(origin.argument) not in self._program.reused:
            return False
        order = list(inside.instructions)  # as they run
        so_far = order[: order.index(made.name)]
        users = inside.users[origin.name]
        return all(user.name in so_far and user.opcode not in _CARRIED for user in users)

    def _read_ahead(
        self, inside: Computation, made: Instruction, element: int | None = None
    ) -> Instruction | None:
        """The array that something in fast memory was in the main one, if it was only updated since.

        Args:
            inside: where it is made.
            made: what makes it.
            element: of a tuple, which one is meant.
        """
        operands, opcode = inside.operands(made), made.opcode
        if opcode in ("copy-start", "copy"):
            return operands[0] if _moves(made, operands[0], into_fast=True) else None
        if opcode == "parameter":
            if inside.name not in self._callers:
                return None
            inside, caller = self._callers[inside.name]
            made = inside.operands(caller)[_operand_for(inside.name, caller, made)]
        elif opcode == "get-tuple-element":
            made, element = operands[0], int(made.attribute("index") or 0)
        elif opcode == "tuple" and element is not None:
            made, element = operands[element], None
        elif opcode == "while":  # its body's result, which leads to what it starts from
            inside = self._program.computations[made.attribute("body") or ""]
            made = inside.instructions[inside.root]
        elif opcode == "fusion":
            body = self._program.computations[made.called[0]]
            root = body.instructions[body.root]
            if root.opcode == "tuple" and element is not None:
                root = body.operands(root)[element]
            steps = self._rewriting(body, root)
            given = [step for step in steps if step.opcode == "parameter"]
            if len(given) != 1 or {x.opcode for x in steps} - _CARRIED - _IN_PLACE - {"parameter"}:
                return None
            made, element = inside.instructions[made.operands[int(given[0].argument)]], None
        elif opcode in _IN_PLACE | {"bitcast", "optimization-barrier", "copy-done"}:
            made = operands[0]
        else:
            return None
        return self._read_ahead(inside, made, element)

    def _rewriting(self, body: Computation, made: Instruction) -> list[Instruction]:
        """Within a fusion, the steps from its large parameters to a result, and those parameters.

        Nothing if a result is made of no large one.
        """
        steps: list[Instruction] = []
        todo = [made]
        while todo:
            step = todo.pop()
            if step.opcode not in _SOMETHING_ELSE and step not in steps:
                steps.append(step)
                todo += self._taken(body, step)
        return steps if any(step.opcode == "parameter" for step in steps) else []

    def _rewriting_alone(self, inside: Computation, made: Instruction) -> list[Instruction]:
        """The same of an instruction that is in no fusion, whose operands are arrays in memory."""
        taken = made.opcode not in _SOMETHING_ELSE and self._taken(inside, made)
        return [made] if taken else []

    def _taken(self, inside: Computation, step: Instruction) -> list[Instruction]:
        """The large operands that a step makes its result of."""
        operands = inside.operands(step)
        # What is put into an array is not rewritten, nor is what says where.
        operands = operands[:1] if step.opcode in _IN_PLACE | {"gather"} else operands
        return [x for x in operands if 8 * _size(x) >= self._large]

    def _event(self, kind: str, shape: Shape, run: Run, frame: int) -> Event:
        frame = frame or self._nearest_frame(run.inside, run.instruction)
        return Event(
            kind=kind,
            shape=str(shape),
            nbytes=shape.nbytes,
            of=self._argument(run.inside, run.instruction),
            stack=self._program.stacks.get(frame, ()),
            turns=run.turns,
            in_loop=run.in_loop,
        )

    def _nearest_frame(self, inside: Computation, instruction: Instruction) -> int:
        """Where the nearest instruction comes from that says so: first of those that take the result.

        Copies that the compiler adds say nothing; it adds them for what comes next.
        """
        for neighbours in (lambda x: inside.users.get(x.name, []), inside.operands):
            todo, seen = deque(neighbours(instruction)), set()
            while todo:
                near = todo.popleft()
                if near.name in seen:
                    continue
                seen.add(near.name)
                parts = (part for part in self._parts(near) if part.frame_id)
                telling = min(parts, key=lambda part: _rank(_word(part)), default=near)
                if near.frame_id or telling.frame_id:
                    return near.frame_id or telling.frame_id
                todo.extend(neighbours(near))
        return 0

    def _argument(self, inside: Computation, made: Instruction, *elements: int) -> str:
        """The argument of the program that something is, or was before it was moved.

        Args:
            inside: where it is made.
            made: what makes it.
            *elements: of tuples, which element is meant, the outermost last.
        """
        operands, opcode = inside.operands(made), made.opcode.removesuffix("-done")
        if opcode == "parameter" and inside.name in self._callers:
            caller_inside, caller = self._callers[inside.name]
            number = _operand_for(inside.name, caller, made)
            return self._argument(caller_inside, caller_inside.operands(caller)[number], *elements)
        if opcode == "parameter":
            named = re.search(r'op_name="((?:[^"\\]|\\.)*)"', made.attributes)
            return named[1].replace("\\'", "'") if named else ""
        if opcode == "get-tuple-element":
            elements = (*elements, int(made.attribute("index") or 0))
        elif opcode == "tuple" and elements:
            *elements_left, element = elements
            return self._argument(inside, operands[element], *elements_left)
        elif opcode in ("conditional", "call"):
            bodies = (self._program.computations[name] for name in made.called)
            roots = ((body, body.instructions[body.root]) for body in bodies)
            return next(filter(None, (self._argument(*root, *elements) for root in roots)), "")
        elif opcode == "fusion":
            body = self._program.computations[made.called[0]]
            root = body.instructions[body.root]
            if root.opcode == "tuple" and elements:
                root = body.operands(root)[elements[-1]]
            elements = ()
            reached = [x for x in self._rewriting(body, root) if x.opcode == "parameter"]
            operands = [inside.instructions[made.operands[int(x.argument)]] for x in reached]
        elif opcode in _SOMETHING_ELSE or opcode == "custom-call":
            return ""
        elif opcode in _IN_PLACE | {"gather"}:
            operands = operands[:1]
        # A loop gives what it was given; of what is joined, the largest counts.
        largest = max(operands, key=_size, default=None)
        return "" if largest is None else self._argument(inside, largest, *elements)


def _moves(made: Instruction, source: Instruction, into_fast: bool) -> bool:
    """Whether a copy only takes an array from the main memory to a fast one, or back."""
    if made.opcode not in ("copy-start", "copy") or len(source.shapes) != 1:
        return False
    to, origin = made.shapes[0], source.shapes[0]
    alike = dataclasses.replace(to, space=origin.space) == origin
    return alike and (to.space > 0, origin.space > 0) == (into_fast, not into_fast)


def _size(instruction: Instruction) -> int:
    return max((shape.nbytes for shape in instruction.shapes), default=0)


def _operand_for(name: str, caller: Instruction, parameter: Instruction) -> int:
    """Which operand of its caller a parameter of a computation is."""
    if caller.opcode == "conditional":
        return 1 + caller.called.index(name)
    return int(parameter.argument) if caller.opcode == "call" else 0


def _runs_others(instruction: Instruction) -> bool:
    return instruction.opcode in _CONTROL or instruction.opcode.endswith("-start")


def _word(instruction: Instruction) -> str:
    """What an instruction does, as it says itself or as JAX called it, whichever tells more."""
    asked = re.search(r'op_name="[^"]*?([\w-]+)"', instruction.attributes)
    own = instruction.opcode.removesuffix("-start")
    return min(own, asked[1].replace("_", "-") if asked else own, key=_rank)


def _rank(word: str) -> int:
    return _TELLING.index(word) if word in _TELLING else len(_TELLING)


def _target_of(instruction: Instruction) -> str:
    """What a custom call calls."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def _cycles_of(instruction: Instruction) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return int(found[1]) if found else 0
