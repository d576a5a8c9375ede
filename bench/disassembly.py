"""Reading what nvdisasm prints: instructions, the path that counts, and what is on it. Text in, numbers out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

_LABEL = re.compile(r"^\s*(\.L_\w+|\.text\.\w+)\s*:")
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@(!?U?P[T0-9]+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L_\w+)\)")

#: Classes of instructions, each with the opcodes (up to the first point) that belong to it, in the table's order.
CLASSES: dict[str, frozenset[str]] = {
    "IMAD": frozenset({"IMAD", "IMUL", "IDP"}),  # IMAD.WIDE and IMAD.HI are the next class
    "IMAD.WIDE/HI": frozenset(),
    "LOP3": frozenset({"LOP3", "PLOP3", "LOP", "LOP32I"}),
    "IADD/SHF/ISETP": frozenset(
        "IADD3 IADD VIADD IADD32I LEA SHF SHL SHR ISETP IMNMX VIMNMX VIADDMNMX IABS SEL PRMT MOV MOV32I CS2R P2R R2P "
        "BMSK SGXT FLO POPC VOTE VOTEU".split()
    ),
    "FSETP/FSEL/FMNMX": frozenset("FSETP FSEL FMNMX FMNMX3 FSET FCHK".split()),
    "convert": frozenset("I2F I2FP F2I F2F F2FP I2I F2IP FRND".split()),
    "MUFU": frozenset({"MUFU"}),
    "FFMA/FMUL/FADD": frozenset(
        "FFMA FMUL FADD FFMA2 FMUL2 FADD2 FFMA32I FADD32I FMUL32I HFMA2 HADD2 HMUL2 HSET2 HMNMX2 "
        "DFMA DADD DMUL HMMA IMMA HGMMA UTCHMMA".split()
    ),
    "memory": frozenset(
        "LDG STG LDS STS LDL STL LD ST LDSM STSM LDC LDCU ULDC ATOM ATOMS ATOMG RED LDGSTS LDGDEPBAR SHFL CCTL MEMBAR "
        "UTMALDG UTMASTG SYNCS FENCE UBLKCP MATCH LDTM STTM".split()
    ),
    "control": frozenset(
        "BRA BRX JMP EXIT RET CALL BAR BSSY BSYNC BREAK WARPSYNC DEPBAR YIELD S2R S2UR NANOSLEEP ERRBAR BMOV KILL "
        "UCGABAR_ARV UCGABAR_WAIT ELECT ACQBULK PREEXIT".split()
    ),
    "uniform": frozenset(
        {"R2UR", "REDUX", "CREDUX"}
    ),  # and opcodes that begin with U: once a warp, on a pipe of its own
    "other": frozenset(),  # what the classes above do not know
}


class Instruction(NamedTuple):
    address: int
    predicate: str  #: "P0", "!P0", "" if it always runs
    opcode: str  #: with its modifiers: "LDG.E.128"
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


class Program(NamedTuple):
    instructions: list[Instruction]  #: in order of address
    targets: dict[int, int]  #: index of a branch -> index of the instruction that it jumps to


def parse(sass: str) -> Program:
    """The one kernel in ``nvdisasm -c`` output. Raises ValueError if there is no instruction, or a label is missing."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _LINE.search(line):
            address, predicate, opcode, operands = found.groups()
            instructions.append(Instruction(int(address, 16), predicate or "", opcode, operands.strip()))
    if not instructions:
        raise ValueError("no instruction found: expected the output of nvdisasm -c")
    targets = {}
    for i, instruction in enumerate(instructions):
        if instruction.name in ("BRA", "JMP") and (target := _TARGET.search(instruction.operands)):
            if target[1] not in labels:
                raise ValueError(f"{instruction.opcode} at {instruction.address:#x} jumps to an unknown {target[1]}")
            targets[i] = labels[target[1]]
    return Program(instructions, targets)


_STORES = frozenset({"STG", "ST", "UTMASTG"})
_ACCESSES = _STORES | {"LDG", "LD", "LDS", "STS", "LDL", "STL", "LDSM", "STSM"}


def is_conditional(branch: Instruction) -> bool:
    ahead = branch.operands.split("`")[0]  # BRA.U UP0, `(.L_x_1) carries its predicate among the operands
    return branch.predicate not in ("", "PT") or bool(re.search(r"!?U?P\d", ahead))


class Loop(NamedTuple):
    first: int  #: index of its first instruction
    last: int  #: index of the branch back

    def holds(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


def loops(program: Program) -> list[Loop]:
    """Every loop by its branch back, the longest first; a branch to itself, which ends a kernel's code, is none."""
    back = [Loop(target, i) for i, target in program.targets.items() if target < i]
    return sorted(back, key=lambda loop: loop.first - loop.last)


def hot_path(program: Program) -> list[Instruction]:
    """What one thread executes from the kernel's start to its end, NOP left out; branches back are not taken.

    Where a branch may go either way, the way that stores something is taken before one that does not, then the one of
    fewer accesses to memory, then the shorter: the full block of a kernel and not its ragged tail, the common case of
    a function and not its slow path. A loop is thus passed through once, or not at all where it may be skipped.
    """
    return _best_path(program, 0, len(program.instructions) - 1, lambda way: (way.silent, way.accesses, way.length))


def round_of(program: Program, loop: Loop) -> list[Instruction]:
    """What one thread executes in one round of the loop: as `hot_path`, but what only some rounds store is left out."""
    return _best_path(program, *loop, lambda way: (way.silent == 2, way.accesses, way.length))


def _best_path(program: Program, first: int, last: int, cost: Callable[[_Way], tuple]) -> list[Instruction]:
    code = program.instructions
    ways = {last + 1: _END}
    for i in range(last, first - 1, -1):  # backwards, so that every way on from here is known
        onward = [ways[j] for j in _successors(program, i, first, last)]
        ways[i] = _ahead_of(code[i], i, min(onward, key=cost)) if onward else _NOWHERE
    path, at = [], first
    while at is not None and at <= last:
        path.append(code[at])
        at = ways[at].onward
    return [instruction for instruction in path if instruction.name != "NOP"]


class _Way(NamedTuple):
    """The best way on from an instruction."""

    silent: int  #: 0 if it stores to global memory, 1 if not, 2 if there is none
    accesses: int
    length: int
    at: int | None  #: where it begins
    onward: int | None  #: index of its second instruction


_END = _Way(1, 0, 0, None, None)
_NOWHERE = _Way(2, 0, 0, None, None)


def _ahead_of(instruction: Instruction, at: int, way: _Way) -> _Way:
    silent = 0 if way.silent == 1 and instruction.name in _STORES else way.silent
    accesses = way.accesses + (instruction.name in _ACCESSES)
    return _Way(silent, accesses, way.length + (instruction.name != "NOP"), at, way.at)


def _successors(program: Program, i: int, first: int, last: int) -> list[int]:
    """Where the instruction may lead without going back; last + 1 is the end. Whoever leaves a loop ends no round."""
    here, end = program.instructions[i], last + 1
    whole = end == len(program.instructions)
    if here.name in ("EXIT", "RET") and here.predicate in ("", "PT"):
        return [end] if whole else []
    if i not in program.targets:
        return [i + 1]
    target, onward = program.targets[i], []
    if i < target <= last:
        onward = [target]
    elif target == first and not whole:
        onward = [end]  # the next round begins
    return [i + 1, *onward] if is_conditional(here) else onward


def by_class(path: Iterable[Instruction]) -> Counter[str]:
    """How many instructions of each class of CLASSES."""
    return Counter(_class_of(instruction) for instruction in path)


def _class_of(instruction: Instruction) -> str:
    name = instruction.name
    if name in ("IMAD", "UIMAD") and re.search(r"\.(WIDE|HI)", instruction.opcode):
        return "IMAD.WIDE/HI" if name == "IMAD" else "uniform"
    for label, names in CLASSES.items():
        if name in names:
            return label
    return "uniform" if name.startswith("U") else "other"


def width(instruction: Instruction) -> int:
    """Bits that a load or store moves for one thread."""
    for modifier in instruction.opcode.split(".")[1:]:
        if modifier in ("8", "U8", "S8", "16", "U16", "S16", "64", "128", "256"):
            return int(modifier.lstrip("US"))
    return 32


def access_bits(path: Sequence[Instruction], name: str, bytes_moved: int) -> int:
    """The narrowest access of opcode ``name`` ("LDG", "STG") that is needed to move so many bytes, widest ones first.

    The widest first, because a kernel also loads numbers, such as its seed. 0 if the path moves fewer bytes than that.
    """
    left = 8 * bytes_moved
    for bits in sorted((width(i) for i in path if i.name == name), reverse=True):
        left -= bits
        if left <= 0:
            return bits
    return 0
