"""The statistics of a step, by their definition and through the operator's CPU path."""

import math

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import oracle
from fastanila.ops import Statistics, anisotropic_step, anisotropic_step_, reference
from fastanila.ops.reference import NORMS

SHAPES = [(1,), (5,), (4, 1), (3, 5), (2, 3, 4, 5)]


def draw(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(dtype), 3 * torch.randn(shape, generator=generator).to(dtype)


def assert_equals_the_formula(seen, score, threshold, norm, gamma=None, rtol=2e-6):
    assert isinstance(seen, Statistics)
    for got, want in zip(seen, oracle.statistics(score.double(), threshold, norm, gamma), strict=True):
        assert got.shape == (len(score),)
        np.testing.assert_allclose(got.double().numpy(), want, rtol=rtol)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("threshold", [0.5, 5.0, math.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_definition_equals_the_formula(norm, threshold, shape, dtype):
    if norm == "channel" and len(shape) == 1:
        pytest.skip("no channels")
    _, score = draw(shape, dtype)
    seen = reference.statistics(score, threshold, norm)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(s.dtype == wide for s in seen)
    assert_equals_the_formula(seen, score, threshold, norm, rtol=1e-12 if dtype == torch.float64 else 2e-6)


def test_a_clipped_element_is_one_beyond_the_threshold():
    score = torch.tensor([[1.5, -1.5, 0.0, 1.4], [1.6, -7.0, 3.0, 1.5]])
    assert reference.statistics(score, 1.5).clip_fraction.tolist() == [0.0, 0.75]
    seen = reference.statistics(score, 1e9)
    assert seen.gamma_mean.tolist() == [1, 1] and seen.clip_fraction.tolist() == [0, 0]


@pytest.mark.parametrize("norm", NORMS)
def test_they_do_not_overflow_and_show_what_is_not_finite(norm):
    score = torch.ones(5, 2, 3) * torch.tensor([3e38, 1e-30, 0.0, math.inf, math.nan])[:, None, None]
    gamma, rms, clip = reference.statistics(score, 2.0, norm)
    torch.testing.assert_close(rms, torch.tensor([3e38, 1e-30, 0, math.inf, math.nan]), equal_nan=True)
    assert gamma[1:3].tolist() == [1, 1] and gamma[3] == 0 and gamma[4].isnan()
    assert clip.tolist() == [1, 0, 0, 1, 0]


@pytest.mark.parametrize("norm", NORMS)
def test_the_gain_can_be_frozen(norm):
    z, score = draw((4, 3, 5))
    gamma = reference.gain(score, 1.5, norm)
    assert gamma.shape == score.shape
    np.testing.assert_allclose(gamma, oracle.gain(score, 1.5, norm)[0], rtol=1e-6)
    settings = dict(seed=1, step=2, statistics=True)
    frozen, seen = anisotropic_step(z, score, None, gamma=gamma, **settings)
    fresh, its = anisotropic_step(z, score, 1.5, norm=norm, **settings)
    torch.testing.assert_close(frozen, fresh)
    torch.testing.assert_close(tuple(seen), tuple(its))


def test_a_frozen_gain_is_broadcast():
    z, score = draw((4, 3, 5))
    gamma = torch.tensor([0.25, 1.0, 0.5]).view(3, 1)
    _, seen = anisotropic_step(z, score, None, gamma=gamma, seed=1, step=2, statistics=True)
    assert_equals_the_formula(seen, score, None, "element", gamma.numpy())
    torch.testing.assert_close(seen.gamma_mean, torch.full((4,), 1.75 / 3))
    torch.testing.assert_close(seen.clip_fraction, torch.full((4,), 2 / 3))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_step_with_statistics_is_the_step(norm, dtype):
    z, score = draw((6, 2, 4), dtype)
    settings = dict(norm=norm, seed=1, step=2, step_size=0.3, bounds=(-1.0, 2.0))
    want = anisotropic_step(z, score, 3.0, **settings)
    out, seen = anisotropic_step(z, score, 3.0, statistics=True, **settings)
    assert torch.equal(out, want) and all(s.dtype == torch.float32 for s in seen)
    assert_equals_the_formula(seen, score, 3.0, norm)
    target = z.clone()
    out, its = anisotropic_step_(target, score, 3.0, statistics=True, **settings)
    assert out is target and torch.equal(out, want) and all(map(torch.equal, seen, its))


@pytest.mark.parametrize("function", [anisotropic_step, anisotropic_step_])
def test_they_are_detached_and_of_the_score_before_the_step(function):
    z = draw((4, 3))[0].requires_grad_()
    want = reference.statistics(z.detach().clone(), 0.5)
    out, seen = function(z, z, 0.5, seed=0, step=0, statistics=True)
    assert not any(s.requires_grad for s in seen) and all(map(torch.equal, seen, want))
    assert function is anisotropic_step_ or not out.requires_grad


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 2, 3)], ids=str)
def test_empty(norm, shape, recwarn):
    z = torch.zeros(shape)
    for function in (anisotropic_step, anisotropic_step_):
        out, seen = function(z, z, 1.0, norm=norm, seed=0, step=0, statistics=True)
        assert out.shape == z.shape
        assert [s.tolist() for s in seen] == [[x] * shape[0] for x in (1.0, 0.0, 0.0)]
    assert not recwarn.list


@pytest.mark.parametrize("norm", NORMS)
def test_compiled_they_are_one_graph_whatever_the_scalars(norm):
    check_compiled(norm, backend=CompileCounter())


@pytest.mark.slow  # each norm is compiled for some 10 s
@pytest.mark.parametrize("norm", NORMS)
def test_compiled_they_are_the_same(norm):
    check_compiled(norm, backend="inductor")


def check_compiled(norm, backend):
    def f(z, threshold, step):
        return anisotropic_step(z, -3 * z, threshold, norm=norm, seed=1, step=step, statistics=True)

    compiled = torch.compile(f, fullgraph=True, backend=backend)
    z, _ = draw((7, 3, 4))
    for i in range(1, 4):
        arguments = torch.tensor(0.7 * i), torch.tensor(i << 33)
        (out, seen), (want, wanted) = compiled(z, *arguments), f(z, *arguments)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
        torch.testing.assert_close(tuple(seen), tuple(wanted), rtol=2e-6, atol=1e-7)
    assert backend == "inductor" or backend.frame_count == 1
