"""Whether a Triton kernel runs here, or the plain definition does; and operators that are registered by it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .schemas import schema

try:
    from .. import kernels
    from ..kernels import metropolis, mixture, mlp, step, step_rows  # noqa: F401 (read as kernels.step and so on)
except ModuleNotFoundError as error:  # no triton on macOS and Windows: the CPU path needs none
    if error.name is None or error.name.split(".")[0] != "triton":
        raise
    kernels = None

TRITON = kernels is not None  #: whether there are kernels at all
#: Triton's interpreter runs kernels on CPU tensors, slowly; with it on, CPU tensors take the kernel too.
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"

_library = torch.library.Library("fastanila", "DEF")


def register(
    name: str, first: tuple[str, ...], arguments: type, returns: str, *,
    kernel: Callable, plain: Callable | None, fake: Callable,
) -> torch._ops.OpOverloadPacket:  # fmt: skip
    """Define torch.ops.fastanila.``name``, and return it.

    first: what it takes ahead of the fields of ``arguments``, a NamedTuple of `schemas`, in the words of torch's
        schemas, as is ``returns``.
    kernel, plain: what runs on CUDA, and on a CPU, which takes the kernel where Triton's interpreter is on. Without
        ``plain`` there is no operator where there is no kernel.
    fake: the result's shapes, for tracing.

    All three take those first ones, and then one ``arguments``.
    """
    count = len(first)

    def registered(function: Callable) -> Callable:
        return lambda *given: function(*given[:count], arguments(*given[count:]))

    _library.define(f"{name}({', '.join(first)}, {schema(arguments)}) -> {returns}")
    for device, has_kernel in (("CUDA", TRITON), ("CPU", INTERPRETED)):
        function = kernel if has_kernel else plain
        if function is not None:
            _library.impl(name, registered(function), device)
    torch.library.register_fake(f"fastanila::{name}", registered(fake), lib=_library)
    return getattr(torch.ops.fastanila, name)


def direct(*tensors: Tensor) -> bool:
    """Whether an operator's implementation may be called without torch's dispatcher, which takes longer than a small
    kernel: nothing traces, transforms or watches the call, and no tensor is of a subclass."""
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
    return isinstance(where, torch.device) or kernels.step_rows.fits(where.shape, norm)


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
    """The tensor, or a copy if it does not begin at a multiple of 16 bytes.

    For such a tensor Triton takes another layout, whose sums round differently: a chain's bits would depend on its
    place in memory.
    """
    return t if t.data_ptr() % 16 == 0 else t.clone()
