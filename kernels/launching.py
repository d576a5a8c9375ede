"""Launching a kernel without Triton's look at every argument, which takes the host longer than many a kernel takes."""

from __future__ import annotations

from typing import Any

import triton
from triton.runtime import driver


class Launcher:
    """Launches one kernel: the first time by Triton, which compiles it, and then what was compiled for such arguments.

    Arguments are alike if the device, the constants, the options and the types are, and of a tensor whether its address
    is a multiple of 16, of an integer whether it fits 32 bits: what Triton compiles a variant for. An integer that it
    would specialise on, which it does not where the kernel says ``do_not_specialize``, counts by its value.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        self.compiled: dict[tuple, tuple[Any, tuple]] = {}
        self.interpreted = not isinstance(kernel, triton.JITFunction)
        if not self.interpreted:
            self.by_type = [p.do_not_specialize or p.annotation_type.startswith("fp") for p in kernel.params]

    def __call__(self, programs: int, arguments: tuple, constants: dict, **options) -> None:
        """arguments: those ahead of the kernel's constants, in order. constants: its constexpr arguments, by name."""
        grid = (programs, 1, 1)
        if self.interpreted:
            self.kernel[grid](*arguments, **constants, **options)
            return
        device = driver.active.get_current_device()
        key = (device, *map(_kind, arguments, self.by_type), *constants.values(), *options.values())
        found = self.compiled.get(key)
        if found is None:
            compiled = self.kernel[grid](*arguments, **constants, **options)
            last = tuple(constants[name] for name in self.kernel.arg_names[len(arguments) :])
            self.compiled[key] = compiled, last
        else:
            compiled, last = found
            compiled[grid](*arguments, *last, stream=driver.active.get_current_stream(device))


def programs(elements: int, each: int) -> int:
    """How many programs of so many elements: triton.cdiv, of which a call from Python takes ten times as long."""
    return -(-elements // each)


def _kind(x, by_type: bool):
    kind = type(x)
    if x is None or kind is float:
        return kind
    if kind is int:
        return -(1 << 31) <= x < 1 << 31 if by_type else (int, x)
    return x.dtype, x.data_ptr() % 16 == 0
