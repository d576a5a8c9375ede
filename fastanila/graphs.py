"""Compiling the pieces of a run, each as one graph, and capturing what they launch as CUDA graphs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import logging
import os
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_numbers = itertools.count()


def compiled(function: Callable) -> Callable:
    """torch.compile(fullgraph=True), with a cache of its own for each call of this function.

    Dynamo keeps its cache, its recompilation limit and what it has learned of changing shapes by code object, which
    all closures of one function share: a program with many energies would run into the limit. A copy of the code
    under a new name has none of that history.
    """
    check_cache()
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, fullgraph=True, backend=_inductor)


def compiles() -> bool:
    """Whether torch.compile compiles. TORCHDYNAMO_DISABLE=1 or TORCH_COMPILE_DISABLE=1 in the environment and
    torch.compiler.set_stance switch it off, and then it runs what it is given as it is."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1" or torch._dynamo.config.disable:
        return False
    stance = getattr(torch._dynamo.eval_frame, "_stance", None)
    return getattr(stance, "stance", "default") != "force_eager"


def _inductor(graph, example_inputs) -> Callable:
    """Inductor, whose compiled graphs tell `watching` what they are called with."""
    with quiet(), warnings.catch_warnings():
        # that float32 products could be TF32; whoever wants them says so, see `training.build.matmul_precision`
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        run = torch._dynamo.lookup_backend("inductor")(graph, example_inputs)
    last = None  # what it returned last, for rehearsals: lives as long as the compiled graph

    def call(*inputs):
        nonlocal last
        watch = getattr(_watched, "watch", None)
        if watch is None:
            return run(*inputs)
        watch.reads.append((run, tuple(map(_read, inputs))))
        if last is None or not watch.rehearsing:
            last = run(*inputs)
        return last

    return call


def _read(x):
    """Where a graph reads its input; of what it takes by value, numbers and 0-dim CPU tensors, the value."""
    if not isinstance(x, Tensor):
        return x
    return x.item() if x.device.type == "cpu" and x.dim() == 0 else x.data_ptr()


_watched = threading.local()

#: The compiled graphs that ran, each with what it read: arguments, parameters, whatever the traced code closes over.
Reads = list[tuple[Callable, tuple]]


class _Watch(NamedTuple):
    reads: Reads
    rehearsing: bool


@contextlib.contextmanager
def watching(*, rehearsing: bool = False) -> Iterator[Reads]:
    """What compiled graphs read meanwhile.

    A CUDA graph replays kernels on addresses and knows nothing of the Python that launched them. A call under this
    context passes Dynamo's guards, so that equal reads prove that a graph captured from the same call is still good.
    ``rehearsing``: that is all that is wanted: a graph that ran under this context before launches nothing, and
    returns what it returned then.
    """
    before = getattr(_watched, "watch", None)
    _watched.watch = watch = _Watch([], rehearsing)
    try:
        yield watch.reads
    finally:
        _watched.watch = before


#: One thread at a time: what another launches on the stream of a capture would become part of its graph.
_capture_stream_held = threading.RLock()


def cuda_graph(function: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """What ``function`` launches on the device, captured once: each call of the result replays it, on the current
    stream, and returns the same tensors, which the next call overwrites.

    The function reads and writes tensors that live as long as the result, and has run before, so that everything
    is compiled and every library has its workspace; it does not run now.

    Raises:
        RuntimeError: it synchronises with the host or does anything else that a capture forbids. torch is then as it
            was before: random numbers, freed memory and later captures work.
        torch.OutOfMemoryError: the device's memory does not hold what it needs.
    """
    with _capture_stream_held, torch.cuda.device(device):
        index = torch.cuda.current_device()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # the outer context, because torch 2.11 leaves the capture's stream current when a capture fails
        with torch.cuda.stream(torch.cuda.current_stream()):
            try:
                with torch.cuda.graph(graph, pool, capture_stream(index), capture_error_mode="thread_local"):
                    result = function()
            except RuntimeError as error:
                _end_capture(index, pool)
                # of what broke the capture; its end then says no more than that it is broken
                cause = error.__context__ or error
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
                raise RuntimeError(str(cause)) from error

    def replay() -> T:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay


def captured(
    function: Callable[[], T], device: torch.device, name: str, *, record: Callable[..., Callable[[], T]] = cuda_graph
) -> Callable[[], T] | None:
    """The replay that ``record`` makes of the function; None, with a warning that ``name`` runs uncaptured, where it
    cannot be captured. No memory for a capture is an error: torch.OutOfMemoryError.

    Run it `on_capture_stream` before.
    """
    try:
        return record(function, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        warnings.warn(f"{name} runs uncaptured: {first_line(error)}", stacklevel=3)
        return None


def replayed(function: Callable[[], T], device: torch.device, name: str, *, warm_up: float) -> Callable[[], T]:
    """The function, whose first ``warm_up`` calls run it as it is. Then it is `captured`, and other calls replay it;
    what cannot be captured goes on as it is."""
    calls, replay = itertools.count(), None

    def run() -> T:
        nonlocal replay
        if next(calls) < warm_up:
            return on_capture_stream(function, device)
        if replay is None:
            replay = captured(function, device, name) or function
        return replay()

    return run


def on_capture_stream(function: Callable[[], T], device: torch.device) -> T:
    """The function's result, which the current stream may use. Ahead of a capture it must run on the capture's stream:
    autograd goes on to use the stream of the first backward, and each stream has a cuBLAS workspace of its own."""
    if device.type != "cuda":
        return function()
    side, current = capture_stream(device), torch.cuda.current_stream(device)
    with _capture_stream_held:
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = function()
        current.wait_stream(side)
    return result


def _end_capture(device: int, pool: tuple[int, int]) -> None:
    """What torch 2.11 leaves out when the end of a capture raises: else its allocator goes on to record into the pool,
    so that no freed memory is given back, and random numbers on the device raise for good."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # not recording: torch did it, or the capture ended in order and the function failed by itself
        return
    torch._C._cuda_releasePool(device, pool)
    # A capture that ends takes the generator out of its capturing state. To give it another state would not do: graphs
    # captured earlier go on with the old one.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the graph is empty
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=capture_stream(device), capture_error_mode="thread_local"):
            pass


def capture_stream(device: torch.device | int) -> torch.cuda.Stream:
    """One a device: torch's own default is a single stream, of the device that captured first."""
    with torch.cuda.device(device):
        return _stream(torch.cuda.current_device())


@functools.cache  # one a device, for as long as the process lives: the graphs captured on it refer to it
def _stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def first_line(error: Exception) -> str:
    """What an error says, for a message of one line: its first, and where that ends in a colon, what the next says."""
    said = ""
    for line in str(error).splitlines():
        said = f"{said} {line.strip()}".strip()
        if said and not said.endswith(":"):
            break
    return said or type(error).__name__


_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def check_cache() -> None:
    """Raise OSError, naming the folder and what to set, if torch's compiler cannot write to its cache."""
    folder = os.environ.get(_VARIABLE)
    try:
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        where = "no folder for temporary files" if folder is None else f"{_VARIABLE}={folder}"
        reason = f"torch's compiler cannot write its cache ({where}: {error.strerror or error})"
        raise OSError(
            f"{reason}; set {_VARIABLE} to a folder that can be written, or use --no-fused (compile=False)"
        ) from None


def prepare(*, compiling: bool) -> None:
    """Import the compiler, which torch's optimizers do whether or not anything is compiled, and which then makes its
    cache's folder. Raises OSError as `check_cache` does if something is to be compiled; otherwise it needs no cache."""
    if not compiling and "torch._dynamo" in sys.modules:
        return
    try:
        check_cache()
    except OSError:
        if compiling:
            raise
        with tempfile.TemporaryDirectory() as folder, _variable(folder):
            importlib.import_module("torch._dynamo")


@contextlib.contextmanager
def _variable(value: str) -> Iterator[None]:
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = value
    try:
        yield
    finally:
        del os.environ[_VARIABLE]
        if before is not None:
            os.environ[_VARIABLE] = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's line that there is no CUDA runtime beside the CUDA toolkit: it says so on importing a module that
    the compiler needs on every machine, also for a CPU, and nothing follows from it."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.addFilter(_says_something)
    try:
        yield
    finally:
        logger.removeFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("No CUDA runtime is found")
