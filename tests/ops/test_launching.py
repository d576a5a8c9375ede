"""Launching again what Triton compiled: which launches are alike. No kernel runs: a stand-in notes what is called."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

launching = pytest.importorskip("fastanila.kernels.launching", reason="triton is not installed")


class Kernel:
    """A JIT function's face: each launch through it compiles, and returns what then launches by itself."""

    arg_names = ("z_ptr", "n", "seed", "threshold", "BLOCK", "HAS_MASK")

    def __init__(self):
        def parameter(free, annotation=""):
            return SimpleNamespace(do_not_specialize=free, annotation_type=annotation)

        self.params = [parameter(False), parameter(True), parameter(True), parameter(False)]
        self.compiled, self.again = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            assert tuple(constants) == ("HAS_MASK", "BLOCK", "num_warps")
            self.compiled.append((grid, arguments))
            return Compiled(self)

        return launch


@dataclasses.dataclass
class Compiled:
    kernel: Kernel

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.kernel.again.append((grid, arguments))


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setattr(launching.triton, "JITFunction", Kernel)
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))
    kernel = Kernel()
    launcher = launching.Launcher(kernel)

    def launch(z, n=5, seed=1, threshold=0.5, block=64, warps=4):
        launcher(3, (z, n, seed, threshold), dict(HAS_MASK=False, BLOCK=block), num_warps=warps)
        return len(kernel.compiled), len(kernel.again)

    return launch, kernel


BUFFER = torch.zeros(64)


def test_the_second_launch_is_of_what_was_compiled(launched):
    launch, kernel = launched
    assert launch(BUFFER) == (1, 0)
    assert launch(torch.ones(9), n=6, seed=-2, threshold=2.5) == (1, 1)
    grid, arguments = kernel.again[0]
    assert grid == (3, 1, 1) and arguments[1:] == (6, -2, 2.5, 64, False)  # the constants in the kernel's order


@pytest.mark.parametrize(
    "change",
    [
        dict(z=BUFFER[1:]),  # an address of no more than 4 bytes' alignment
        dict(z=BUFFER.bfloat16()),
        dict(z=None),
        dict(seed=1 << 31),
        dict(seed=-(1 << 31) - 1),
        dict(seed=torch.zeros((), dtype=torch.int64)),
        dict(threshold=torch.ones(())),
        dict(threshold=1),
        dict(block=128),
        dict(warps=8),
    ],
    ids=str,
)
def test_what_triton_would_compile_anew_is_compiled_anew(launched, change):
    launch, _ = launched
    arguments = dict(z=BUFFER)
    launch(**arguments)
    assert launch(**arguments | change) == (2, 0)
    assert launch(**arguments | change) == (2, 1)


def test_integers_that_triton_specialises_on_count_by_value_and_others_by_width(launched):
    launch, _ = launched
    for i, (threshold, seed) in enumerate([(1, 1), (2, 1), (16, 1)], start=1):
        assert launch(BUFFER, threshold=threshold, seed=seed)[0] == i
    for seed in (-(1 << 31), (1 << 31) - 1, 0):
        assert launch(BUFFER, threshold=1, seed=seed)[0] == 3


def test_another_device_compiles_its_own(launched, monkeypatch):
    launch, _ = launched
    launch(BUFFER)
    monkeypatch.setattr(launching.driver.active, "get_current_device", lambda: 1)
    assert launch(BUFFER) == (2, 0)
