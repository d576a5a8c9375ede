"""The step alone: `pytest bench --benchmark-only`. Groups hold the same work, so ratios within one are fair.

fused: the Triton kernel on CUDA. compiled: the plain definition through torch.compile, which is what CPU runs use.
eager: the plain definition as it stands. randn: torch.randn of the same elements, for scale.
"""

import pytest
import torch

from fastanila import ops
from fastanila.capture import compiled

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES = [1 << 12, 1 << 16, 1 << 20, 1 << 24]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def step(z, score, threshold, step_size, seed, t):
    return ops.anisotropic_step(z, score, threshold, step_size=step_size, seed=seed, step=t)


def plain(*arguments):
    with ops.plain():
        return step(*arguments)


def randn(z, *_):
    return torch.randn_like(z)


def ways():
    return {**({"fused": step} if CUDA else {}), "compiled": None, "eager": plain, "randn": randn}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", ways())
def test_step(benchmark, way, size, dtype):
    benchmark.group = f"step, 2^{size.bit_length() - 1} elements, {dtype}, {DEVICE}"
    benchmark.name = way
    z = torch.zeros(size // 64, 64, device=DEVICE, dtype=DTYPES[dtype])
    numbers = [torch.tensor(x, device=DEVICE) for x in (1.0, 0.01)]
    words = [torch.tensor(x, device=DEVICE) for x in (1, 2)]
    function = ways()[way]
    if way == "compiled":
        with ops.plain():  # on CUDA too: what Inductor makes of the definition
            function = compiled(step)
            function(z, z, *numbers, *words)

    def run():
        with ops.plain() if way == "compiled" else torch.no_grad():
            function(z, z, *numbers, *words)
        if CUDA:
            torch.cuda.synchronize()

    run()
    benchmark.extra_info.update(elements=size, dtype=dtype, device=DEVICE)
    benchmark.pedantic(
        run, rounds=5 if size >= 1 << 24 else 20, iterations=1 if size >= 1 << 20 else 10, warmup_rounds=2
    )
