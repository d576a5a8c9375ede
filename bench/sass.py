"""What the kernels cost in instructions, without a GPU: `python -m bench.sass [--json] [--arch ...] [--kernel ...]`.

Compiles every kernel of KERNELS for each dtype and architecture as its operator launches it, disassembles it, and
counts the instructions that one thread executes where a block is full: every instruction but NOP, prologue included,
over the elements that the thread makes. A kernel that loops over its elements is counted by its loops. A whole-chain
kernel is counted by one transition: "inst/thread" is what a thread executes, and "inst/el" that of all threads over the
elements of their chains.

The ceiling is what an H200 could reach by arithmetic alone, to be held against its memory's roof: 132 SMs at 1.98 GHz;
per SM and clock 128 instructions issued, 128 float32 products, 64 of the other float32 and integer operations, 32 of
IMAD.WIDE and IMAD.HI, 16 special functions; 4.3 TB/s of memory traffic. It knows no latency, occupancy or dual issue.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import triton
from triton.compiler import CompiledKernel

from fastanila.kernels import metropolis, mixture, mlp, step, step_rows

from . import disassembly, markdown, offline
from .disassembly import CLASSES, Instruction

Compile = Callable[..., CompiledKernel]

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

SMS, CLOCK, BANDWIDTH = 132, 1.98e9, 4.3e12  # H200
#: Classes of instructions that share a pipe, and how many threads' instructions it takes an SM and clock.
PIPES: dict[str, tuple[int, dict[str, int]]] = {
    "issue": (128, {name: 1 for name in CLASSES}),
    "fma": (128, {"FFMA/FMUL/FADD": 1, "IMAD": 1, "IMAD.WIDE/HI": 1}),
    "imad": (64, {"IMAD": 1, "IMAD.WIDE/HI": 2}),
    "alu": (64, {"LOP3": 1, "IADD/SHF/ISETP": 1, "FSETP/FSEL/FMNMX": 1, "convert": 1}),
    "mufu": (16, {"MUFU": 1}),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An entry of KERNELS: a kernel in one configuration."""

    name: str  #: of the Triton function
    compile: Compile  #: (architecture, dtype)
    elements: float  #: that a thread makes on the path counted; below 1 where threads share an element's work
    reads: Sequence[int | None] = (None, None)  #: bytes an element of each tensor read; None is the dtype's
    writes: Sequence[int | None] = (None,)
    dtypes: Sequence[str] = ("fp32", "bf16", "fp16")
    #: "kernel": from start to end; "loops": all loops, once; "transition": the longest loop, once
    counted: str = "kernel"


def _step(reads: Sequence[int | None] = (None, None), **variant) -> Kernel:
    block, warps = step.CONFIGURATION
    compile = partial(offline.compile_step, **variant)
    return Kernel("anisotropic_step_kernel", compile, elements=block / (32 * warps), reads=reads)


def _tiled(name: str, module: ModuleType, compile: Compile, norm: str, channels: int, size: int, **tensors) -> Kernel:
    """A kernel in the tiles of its module, of chains of (channels, size): it makes one at once, or loops over it."""
    tile = module.tile_of(channels, size, norm)
    return Kernel(
        name,
        partial(compile, norm=norm, channels=channels, size=size),
        elements=tile.rows * channels * min(size, tile.cols) / (32 * tile.num_warps),
        counted="kernel" if size <= tile.cols else "loops",
        **tensors,
    )


def _rows(norm: str, channels: int, size: int, **variant) -> Kernel:
    return _tiled("rows_kernel", step_rows, partial(offline.compile_rows, **variant), norm, channels, size)


def _metropolis(norm: str, channels: int, size: int) -> Kernel:
    tensors = dict(reads=(None,) * 4, writes=(None,) * 3)
    return _tiled("metropolis_kernel", metropolis, offline.compile_metropolis, norm, channels, size, **tensors)


def _whole_chain(name: str, compile: Compile, elements: float) -> Kernel:
    def of_fp32(architecture: str, dtype: str) -> CompiledKernel:
        return compile(architecture)

    return Kernel(name, of_fp32, elements, dtypes=("fp32",), counted="transition")


def _mixture(dim: int, adjusted: bool = False, components: int = 8) -> Kernel:
    sizes = dict(dim=dim, components=components, adjusted=adjusted)
    chains = mixture.mixture_constants(**sizes)["ROWS"]
    return _whole_chain("mixture_kernel", partial(offline.compile_mixture_trajectory, **sizes), chains * dim / 32)


def _mlp(dim: int, width: int, chains: int, features: int = 0, adjusted: bool = False) -> Kernel:
    sizes = dict(dim=dim, width=width, depth=2, features=features, chains=chains)
    constants, warps = mlp.mlp_constants(*sizes.values(), offline.SHARED_MEMORY["sm_90"])
    compile = partial(offline.compile_mlp_trajectory, **sizes, adjusted=adjusted)
    return _whole_chain("mlp_kernel", compile, constants["ROWS"] * dim / (32 * warps))


#: Every kernel that an operator launches, by the configurations that matter. b = inf takes the kernel of a finite b.
KERNELS: dict[str, Kernel] = {
    "step": _step(),
    "step-bounds": _step(bounds=True),
    "step-gamma": _step(reads=(None, None, 4), gamma=True),
    "step-mask": _step(reads=(None, None, 1), mask=True),
    "step-numbers": _step(pointers=False),
    "step-straddling": _step(lane=1),
    "rows-chain-3072": _rows("chain", 1, 3072),
    "rows-chain-65536": _rows("chain", 1, 65536),
    "rows-chain-2": _rows("chain", 1, 2),
    "rows-channel-3x1024": _rows("channel", 3, 1024),
    "rows-element-3072-statistics": _rows("element", 1, 3072, statistics=True),
    "rows-element-2-statistics": _rows("element", 1, 2, statistics=True),
    "metropolis-element-3072": _metropolis("element", 1, 3072),
    "metropolis-chain-3072": _metropolis("chain", 1, 3072),
    "metropolis-chain-65536": _metropolis("chain", 1, 65536),
    "metropolis-channel-3x1024": _metropolis("channel", 3, 1024),
    "metropolis-element-2": _metropolis("element", 1, 2),
    "mixture-8-2d": _mixture(dim=2),
    "mixture-8-8d": _mixture(dim=8),
    "mlp-64-2d-1024": _mlp(dim=2, width=64, chains=1024),
    "mlp-64-8d-64": _mlp(dim=8, width=64, chains=64),
    "mlp-64-2d-16384": _mlp(dim=2, width=64, chains=16384),
    "mlp-128-2d-1024": _mlp(dim=2, width=128, chains=1024),
    "mlp-64-features-64-2d-512": _mlp(dim=2, width=64, features=64, chains=512),
    "mixture-8-2d-adjusted": _mixture(dim=2, adjusted=True),
    "mlp-64-2d-1024-adjusted": _mlp(dim=2, width=64, chains=1024, adjusted=True),
    "mlp-64-features-64-2d-512-adjusted": _mlp(dim=2, width=64, features=64, chains=512, adjusted=True),  # the default
}


@dataclasses.dataclass(frozen=True)
class Count:
    """One kernel, dtype and architecture: what `--json` prints."""

    kernel: str
    dtype: str
    arch: str
    triton: str
    unit: str  #: what ``instructions_per_element`` is counted over: "element", or "element and transition"
    instructions: int  #: executed by one thread on the path counted
    instructions_per_element: float  #: by all threads that work on it
    classes: dict[str, float]  #: the same by class
    registers: int
    spill_bytes: int  #: local memory of a thread
    shared_bytes: int
    barriers: int  #: on the path counted
    access_bits: int  #: width of the narrowest access that moves the tensors' data; 0 if loops make it unknowable
    #: moved to and from device memory: what a second pass reads comes from L2, and a whole chain's state stays on chip
    bytes_per_element: float
    ceiling_gel_s: float  #: 1e9 elements/s that an H200 could reach by arithmetic
    bound_by: str  #: the pipe that sets the ceiling
    roof_gel_s: float | None  #: 1e9 elements/s that its memory allows


def count(name: str, dtype: str, architecture: str) -> Count:
    """Compile and count one entry of KERNELS."""
    entry = KERNELS[name]
    compiled = entry.compile(architecture, dtype)
    if compiled.metadata.name != entry.name:
        raise ValueError(f"KERNELS[{name!r}] compiles {compiled.metadata.name}, expected {entry.name}")
    used = offline.resources(compiled)
    path = counted_path(disassembly.parse(offline.disassemble(compiled)), entry.counted)
    classes = disassembly.by_class(path)
    reads, writes = (sum(b or BYTES[dtype] for b in tensors) for tensors in (entry.reads, entry.writes))
    ceiling, bound_by = arithmetic_ceiling({k: v / entry.elements for k, v in classes.items()})
    moved = 0 if entry.counted == "transition" else reads + writes
    return Count(
        kernel=name,
        dtype=dtype,
        arch=architecture,
        triton=triton.__version__,
        unit="element and transition" if entry.counted == "transition" else "element",
        instructions=len(path),
        instructions_per_element=round(len(path) / entry.elements, 2),
        classes={k: round(classes[k] / entry.elements, 2) for k in CLASSES},
        registers=used.registers,
        spill_bytes=used.local_bytes,
        shared_bytes=used.shared_bytes,
        barriers=sum(i.name == "BAR" for i in path),
        access_bits=narrowest(path, entry.elements * reads, entry.elements * writes) if moved else 0,
        bytes_per_element=moved,
        ceiling_gel_s=round(ceiling / 1e9, 1),
        bound_by=bound_by,
        roof_gel_s=round(BANDWIDTH / moved / 1e9, 1) if moved else None,
    )


def counted_path(program: disassembly.Program, counted: str) -> list[Instruction]:
    """The instructions that a count is of: see `Kernel.counted`. Raises ValueError where there is no loop to count."""
    if counted == "kernel":
        return disassembly.hot_path(program)
    found = disassembly.loops(program)
    if not found:
        raise ValueError(f"no loop in the kernel, expected one to count its {counted}")
    outermost = [loop for loop in found if not any(other.holds(loop) for other in found)]
    if counted == "transition":
        outermost = outermost[:1]
    return [i for loop in outermost for i in disassembly.round_of(program, loop)]


def narrowest(path: Sequence[Instruction], read: int, written: int) -> int:
    loads = disassembly.access_bits(path, "LDG", read)
    return min(loads, disassembly.access_bits(path, "STG", written))


def arithmetic_ceiling(classes: dict[str, float]) -> tuple[float, str]:
    """(elements/s of an H200, the pipe that sets it) from the instructions of each class an element takes."""
    clocks = {
        pipe: sum(weight * classes.get(name, 0.0) for name, weight in names.items()) / lanes
        for pipe, (lanes, names) in PIPES.items()
    }
    slowest = max(clocks, key=clocks.__getitem__)
    return SMS * CLOCK / clocks[slowest], slowest


def table(counts: Sequence[Count]) -> str:
    """The counts as Markdown."""
    about = (
        f"triton {triton.__version__}; ceiling by arithmetic and roof by memory of an H200 (see the head of "
        "bench/sass.py for the model)"
    )
    rows = []
    for c in counts:
        cells = [c.kernel, c.dtype, c.arch, c.instructions, f"{c.instructions_per_element:,.1f}"]
        cells += [f"{c.classes[name]:,.1f}" for name in CLASSES]
        cells += [c.registers, c.spill_bytes, c.shared_bytes, c.barriers, c.access_bits or "-"]
        cells += [f"{c.bytes_per_element:g}", f"{c.ceiling_gel_s:,.4g} ({c.bound_by})"]
        rows.append([*cells, "on chip" if c.roof_gel_s is None else f"{c.roof_gel_s:,.0f}"])
    columns = [
        "kernel", "dtype", "arch", "inst/thread", "inst/el", *CLASSES, "registers", "spill B", "shared B", "barriers",
        "access bits", "B/el", "ceiling Gel/s", "roof Gel/s",
    ]  # fmt: skip
    return f"{about}\n\n" + markdown.table(columns, "l" * len(columns), rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sass", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a list of objects, one a kernel, dtype and architecture")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--write", action="store_true", help="put the table into bench/RESULTS.md")
    chosen = parser.parse_args(argv)
    counts = [
        count(kernel, dtype, architecture)
        for kernel in chosen.kernel
        for dtype in KERNELS[kernel].dtypes
        for architecture in chosen.arch
    ]
    print(json.dumps([dataclasses.asdict(c) for c in counts], indent=1) if chosen.json else table(counts))
    if chosen.write:
        markdown.write(table(counts), "sass")
    return 0


if __name__ == "__main__":
    sys.exit(main())
