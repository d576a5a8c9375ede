"""Whether a Triton kernel runs here, or the plain definition does."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

try:
    from ..kernels import step_rows
except ModuleNotFoundError as error:  # no triton on macOS and Windows: the CPU path needs none
    if error.name is None or error.name.split(".")[0] != "triton":
        raise
    step_rows = None

TRITON = step_rows is not None  #: whether there are kernels at all
#: Triton's interpreter runs kernels on CPU tensors, slowly; with it on, CPU tensors take the kernel too.
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


def direct(*tensors: Tensor) -> bool:
    """Whether an operator's implementation may be called past torch's dispatcher, which takes longer than a small
    kernel: nothing traces, transforms or watches the call, and these are tensors of no special kind."""
    if torch.compiler.is_compiling():
        return False
    return (
        all(type(t) is Tensor for t in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def launching_on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes the device current, on which Triton launches; where it is, as nearly always, that is nothing."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


_HERE = contextlib.nullcontext()


def fused(where: Tensor | torch.device, norm: str = "element") -> bool:
    """Whether `anisotropic_step` runs a Triton kernel, rather than the plain definition, for states like this one.

    where: the chains, (B, ...); or a device, for chains of at most 2,048 channels. A function of the device, the
    shape, the norm, the process (triton or its interpreter) and `plain`, never of values.
    """
    device = where.device if isinstance(where, Tensor) else where
    if not TRITON or _plain or not (device.type == "cuda" or INTERPRETED):
        return False
    return isinstance(where, torch.device) or step_rows.fits(where.shape, norm)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Every operator runs its plain definition on every device: for comparing with the kernels.

    Process-wide: it is in force in all threads, until the last thread that entered has left, so that another thread
    meanwhile gets the same numbers to rounding, slower on CUDA. Not by thread, because Dynamo on torch 2.11 cannot
    trace a ContextVar, and takes what it once read of a thread-local for a constant.
    """
    _enter_plain(1)
    try:
        yield
    finally:
        _enter_plain(-1)


def _enter_plain(change: int) -> None:
    global _plain, _plains
    with _plain_lock:
        _plains += change
        _plain = _plains > 0


_plain = False  #: what compiled code has a guard on

_plains = 0  #: how many are within

_plain_lock = threading.Lock()


def aligned(t: Tensor) -> Tensor:
    """The tensor, or a copy of one that does not begin at a multiple of 16 bytes: for such the compiler takes another
    layout, whose sums have other roundings, and a chain's bits must not depend on its place in memory."""
    return t if t.data_ptr() % 16 == 0 else t.clone()
