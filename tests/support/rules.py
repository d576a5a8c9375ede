"""What the device without kernels must refuse, and what `fastanila.graphs.cuda_graph` must leave whole where it does:
cases of tests/test_capture_rules.py, which `fake_device.run` runs in a process under the device."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import warnings
from collections.abc import Callable

import torch

import fake_device
from fastanila.graphs import cuda_graph, on_capture_stream, replayed

MEGABYTE = 1 << 20

# ------------------------------------------------------------------------------------------------ what breaks a capture


def refused(build: Callable[[], Callable[[], object]]) -> Callable[[], dict]:
    """A case: whether a capture of the function that ``build`` makes fails, and what the device reports."""

    def case() -> dict:
        device, function = fake_device.Device(), build()
        device.clear()
        try:
            cuda_graph(function, torch.device("cuda"))
        except RuntimeError as error:
            # not counted: the empty one by which `cuda_graph` puts torch 2.11 right
            graphs = [nodes for nodes in device.graphs if nodes]
            return dict(failed=True, says=str(error), violations=device.violations, graphs=len(graphs))
        return dict(failed=False, says="", violations=device.violations, graphs=len(device.graphs))

    return case


def runtime() -> ctypes.CDLL:
    """libcudart's functions, of the device."""
    return ctypes.CDLL(None)


def synchronises():
    x = torch.ones(8, device="cuda")
    return lambda: x.sum().item()


def synchronises_the_device():
    x = torch.ones(8, device="cuda")
    return lambda: (x + 1, torch.cuda.synchronize())


def copies_from_pageable_memory():
    x, host = torch.ones(8, device="cuda"), torch.ones(8)

    def function():
        x.add_(1)
        # itself, because torch refuses such a copy before CUDA sees it
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        runtime().cudaMemcpyAsync(*map(ctypes.c_void_p, (x.data_ptr(), host.data_ptr(), 32)), 1, stream)

    return function


def allocates_outside_the_pool():
    x, pointer = torch.ones(8, device="cuda"), ctypes.c_void_p()

    def function():
        x.add_(1)
        # itself, because torch's allocator asks for the relaxed mode first
        runtime().cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(512))

    return function


def works_on_the_default_stream():
    x = torch.ones(8, device="cuda")

    def function():
        with torch.cuda.stream(torch.cuda.default_stream()):
            x.add_(1)

    return function


def loads_a_module():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x):
        tl.store(x, 0.0)

    x = torch.ones(8, device="cuda")
    return lambda: kernel[(1,)](x)  # whose first launch loads it


def leaves_another_stream_unjoined():
    x, other = torch.ones(8, device="cuda"), torch.cuda.Stream()

    def function():
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            x.add_(1)

    return function


def asks_whether_an_event_has_happened():
    x = torch.ones(8, device="cuda")

    def function():
        x.add_(1)
        event = torch.cuda.Event()
        event.record()
        event.query()

    return function


def waits_for_an_event_from_outside():
    x, event, other = torch.ones(8, device="cuda"), torch.cuda.Event(), torch.cuda.Stream()
    event.record(other)

    def function():
        torch.cuda.current_stream().wait_event(event)
        x.add_(1)

    return function


def replays_on_memory_given_back() -> dict:
    device, target = fake_device.Device(), torch.zeros(8 * MEGABYTE, device="cuda")
    sources = [torch.ones(8 * MEGABYTE, device="cuda")]
    replay = cuda_graph(lambda: target.copy_(sources[0]), torch.device("cuda"))
    device.clear()
    replay()
    before = device.violations
    sources.clear()
    torch.cuda.empty_cache()
    replay()
    return dict(before=before, after=device.violations)


REFUSED = {
    "a synchronisation": refused(synchronises),
    "a synchronisation of the device": refused(synchronises_the_device),
    "a pageable copy": refused(copies_from_pageable_memory),
    "an allocation outside the pool": refused(allocates_outside_the_pool),
    "work on the default stream": refused(works_on_the_default_stream),
    "a module load": refused(loads_a_module),
    "unjoined work": refused(leaves_another_stream_unjoined),
    "a query of a captured event": refused(asks_whether_an_event_has_happened),
    "a wait for an event from outside": refused(waits_for_an_event_from_outside),
}

# ------------------------------------------------------------------------------------------------ what a capture may do


def permitted() -> dict:
    """What torch may do in a capture: allocate, free, run backward, fork to another stream and join it again."""
    device, other = fake_device.Device(), torch.cuda.Stream()
    x = torch.ones(8, device="cuda", requires_grad=True)
    pinned = torch.ones(8).pin_memory()

    def function():
        (gradient,) = torch.autograd.grad((x * x).sum(), x)
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            y = gradient + 1
        torch.cuda.current_stream().wait_stream(other)
        return y.copy_(pinned, non_blocking=True)

    function()
    device.clear()
    cuda_graph(function, torch.device("cuda"))
    return dict(violations=device.violations, graphs=device.graphs)


def copies_and_fills_are_replayed() -> dict:
    """Copies and fills of a graph are done at each replay, and not at the capture."""
    source, target, filled = (torch.tensor([float(i)] * 4).cuda() for i in (1, 2, 3))

    def function():
        target.copy_(source)
        # torch fills with kernels
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        runtime().cudaMemsetAsync(ctypes.c_void_p(filled.data_ptr()), 0, ctypes.c_size_t(16), stream)

    replay = cuda_graph(function, torch.device("cuda"))
    captured = (*target.tolist(), *filled.tolist())
    source.copy_(torch.tensor([5.0] * 4))
    replay()
    return dict(captured=captured, replayed=(*target.tolist(), *filled.tolist()))


def calls_that_are_replayed() -> dict:
    """Six calls, of which two warm up, of a function that can be captured, and of one that synchronises."""
    device, x, streams = fake_device.Device(), torch.ones(8, device="cuda"), []

    def adds():
        streams.append(torch.cuda.current_stream())
        return x + 1

    def synchronises():
        return x.sum().item()

    found = {}
    for function in (adds, synchronises):
        call = replayed(function, torch.device("cuda"), "it", warm_up=2)
        device.clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            kinds = [type(call()).__name__ for _ in range(6)]
        graphs = len([nodes for nodes in device.graphs if nodes])
        found[function.__name__] = dict(graphs=graphs, replays=len(device.replays), said=len(said), kinds=kinds)
    return found | dict(streams=len(streams), one=len({*streams, torch.cuda.current_stream()}) == 2)


def warms_up_in_another_thread() -> dict:
    """A capture in which another thread warms up, which has to wait for its end."""
    device, x, added = fake_device.Device(), torch.ones(8, device="cuda"), []

    def warm_up():
        added.append(on_capture_stream(lambda: x + 2, torch.device("cuda")))

    def function():
        other.start()
        other.join(0.5)
        return x + 1

    other = threading.Thread(target=warm_up)
    warm_up()  # once ahead, which loads what is needed
    device.clear()
    cuda_graph(function, torch.device("cuda"))
    other.join()
    return dict(nodes=[len(nodes) for nodes in device.graphs], added=len(added))


# ----------------------------------------------------------------------------------------------- after a failed capture


def fails_to_capture() -> None:
    device = torch.device("cuda")
    x = torch.ones(8, device=device)
    try:
        cuda_graph(lambda: x.sum().item(), device)
    except RuntimeError:
        gc.collect()
        return
    raise AssertionError("a function that synchronises was captured")


def draws_after_a_failure() -> dict:
    """torch's own generator after a failed capture, and in a capture after that."""
    device = torch.device("cuda")
    torch.randn(4, device=device)
    fails_to_capture()
    drawn = torch.randn(4, device=device).numel()
    replay = cuda_graph(lambda: torch.randn(8, device=device), device)
    return dict(drawn=drawn, captured=replay().numel(), again=torch.randn(4, device=device).numel())


def replays_after_a_failure() -> dict:
    """A graph from before a failed capture, which draws from torch's generator."""
    device = torch.device("cuda")
    torch.randn(8, device=device)
    replay = cuda_graph(lambda: torch.randn(8, device=device), device)
    fails_to_capture()
    return dict(replayed=replay().numel())


def memory_after_a_failure() -> dict:
    """Reserved megabytes after a failed capture: once freed memory is given back, after a tensor of 64 MB has come and
    gone, and after five such in turn that another stream has used."""
    other = torch.cuda.Stream()

    def reserved() -> int:
        return torch.cuda.memory_reserved() // MEGABYTE

    def comes_and_goes(stream=None) -> None:
        x = torch.zeros(64 * MEGABYTE // 4, device="cuda")
        if stream is not None:
            x.record_stream(stream)

    before = reserved()
    fails_to_capture()
    comes_and_goes()
    torch.cuda.empty_cache()
    given_back = reserved()
    for _ in range(5):
        comes_and_goes(other)
        torch.cuda.synchronize()
    return dict(before=before, given_back=given_back, recorded=reserved())


def captures_after_a_failure() -> dict:
    """A second capture, and the stream that is current after the first one."""
    device, x = fake_device.Device(), torch.ones(8, device="cuda")
    stream = torch.cuda.current_stream()
    fails_to_capture()
    same = torch.cuda.current_stream() == stream
    device.clear()
    replay = cuda_graph(lambda: x + 1, torch.device("cuda"))
    replay()
    return dict(same=same, graphs=len(device.graphs), replays=device.replays, violations=device.violations)


OTHERS = {
    "given back": replays_on_memory_given_back,
    "permitted": permitted,
    "replayed": copies_and_fills_are_replayed,
    "calls": calls_that_are_replayed,
    "threads": warms_up_in_another_thread,
    "draws": draws_after_a_failure,
    "replays": replays_after_a_failure,
    "memory": memory_after_a_failure,
    "captures": captures_after_a_failure,
}

if __name__ == "__main__":
    fake_device.main(REFUSED | OTHERS, sys.argv[1:])
