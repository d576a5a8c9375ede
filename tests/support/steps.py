"""What the parity tests of the step share: the device, drawn states, the float64 formula, and equality to rounding."""

from types import ModuleType

import numpy as np
import pytest
import torch

import oracle
from fastanila import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and not ops.INTERPRETED,
        reason="no CUDA device; tests/test_interpreter.py runs it in Triton's interpreter",
    ),
]


def counting(monkeypatch, *launches: tuple[ModuleType, str]) -> list[str]:
    """The names, as they come, of those of the `Launcher`s (by module and name) that launch."""
    launched: list[str] = []
    for module, name in launches:
        launcher = getattr(module, name)

        def counted(*arguments, launcher=launcher, name=name, **options):
            launched.append(name)
            launcher(*arguments, **options)

        monkeypatch.setattr(module, name, counted)
    return launched


def draw(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=generator).to(dtype).to(DEVICE)
    score = (3 * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)
    return z, score


def expected(z, score, threshold, *, seed, step, offset=0, **options):
    d = z[0].numel() if len(z) else 1
    k = np.arange(offset * d, offset * d + z.numel(), dtype=object)
    xi = oracle.normals(k, seed, step).reshape(z.shape) if z.numel() else np.zeros(z.shape)
    return oracle.step(z.double().cpu(), score.double().cpu(), threshold, xi, **options)


def assert_equal_to_rounding(out, want, dtype):
    got, want = out.double().cpu().numpy(), np.asarray(want)
    assert got.shape == want.shape
    assert np.array_equal(np.isnan(got), np.isnan(want))
    inf = np.isinf(want)
    assert np.array_equal(got[inf], want[inf])
    with np.errstate(invalid="ignore"):
        error = np.abs(got - want)[~inf & ~np.isnan(want)]
        size = np.abs(want)[~inf & ~np.isnan(want)]
    if dtype == torch.float32:
        # fast logarithms lose digits near u = 1, on a GPU only: seldom, but a case of few elements may have one or two
        misses = (error > 1e-5 * np.maximum(1, size)).sum()
        assert DEVICE == "cpu" or misses <= max(2, 1e-4 * error.size)
        assert (error <= (3e-3 if DEVICE == "cuda" else 3e-6) * np.maximum(1, size)).all()
    else:
        ulp = 2.0 ** np.floor(np.log2(np.maximum(size, 2.0**-14))) * torch.finfo(dtype).eps
        # one unit in the last place, because the interpreter truncates to bfloat16 where a GPU rounds
        assert (error <= 1.01 * ulp + (3e-3 if DEVICE == "cuda" else 3e-6)).all()
