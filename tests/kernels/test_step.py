"""The fused step against the float64 formula: on CUDA where there is one, else in Triton's interpreter.

Without a GPU these run in a process of their own (tests/test_interpreter.py), because the interpreter is chosen
when triton is imported.
"""

import math

import pytest
import torch

from cases import one_in
from fastanila import noise, ops
from fastanila.ops import dispatch
from steps import DEVICE, DTYPES, MARKS, assert_equal_to_rounding, draw, expected

pytestmark = MARKS


@one_in(
    3,
    shape=[(1,), (3,), (5, 1), (1, 5), (33, 31), (4097,), (3, 3, 2, 2), (2, 2048)],
    dtype=DTYPES,
    options=[{}, dict(bounds=(-0.5, 1.0)), dict(threshold=math.inf)],
    in_place=[False, True],
)
def test_equals_the_formula(poisoned, shape, dtype, options, in_place):
    options = dict(options)
    threshold = options.pop("threshold", 2.0)
    z, score = draw(shape, dtype)
    settings = dict(seed=(1 << 63) + 5, step=(1 << 33) + 7, step_size=0.3, noise_scale=0.8, **options)
    want = expected(z, score, threshold, **settings)
    before = z.clone()
    function = ops.anisotropic_step_ if in_place else ops.anisotropic_step
    out = function(z, score, threshold, **settings)
    assert_equal_to_rounding(out, want, dtype)
    assert out.dtype == dtype and out.is_contiguous() and (out is z) == in_place
    assert in_place or torch.equal(z, before)


@one_in(3, dtype=DTYPES, d=[1, 2, 3, 5, 1023], offset=[0, 1, 2, 3, (1 << 31) - 1, (1 << 40) + 1])
def test_offsets_straddle_lanes(poisoned, dtype, d, offset):
    z, score = draw((7, d), dtype)
    want = expected(z, score, 1.5, seed=3, step=4, offset=offset)
    assert_equal_to_rounding(ops.anisotropic_step(z, score, 1.5, seed=3, step=4, offset=offset), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gamma_and_mask(poisoned, dtype):
    z, score = draw((5, 3, 7), dtype)
    gamma = torch.rand(3, 1).to(DEVICE)
    mask = (torch.rand(5, 1, 7) < 0.5).to(DEVICE)
    want = expected(z, score, None, seed=1, step=2, step_size=0.2, gamma=gamma.cpu().numpy(), mask=mask.cpu().numpy())
    out = ops.anisotropic_step(z, score, None, seed=1, step=2, step_size=0.2, gamma=gamma, mask=mask)
    assert_equal_to_rounding(out, want, dtype)
    still = ~mask.expand_as(z)
    assert torch.equal(out[still], z[still])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_of_full_blocks(poisoned, dtype):
    """Read by words there, by bytes in the ragged tail; a mask that is not aligned is copied."""
    z, score = draw((2, 2051), dtype)
    buffer = torch.rand(2 * 2051 + 1, generator=torch.Generator().manual_seed(3)).to(DEVICE) < 0.5
    assert dispatch.aligned(buffer[1:]).data_ptr() % 16 == 0
    for mask in (buffer[:-1], buffer[1:]):
        mask = mask.view(2, 2051)
        out = ops.anisotropic_step(z, score, 2.0, seed=1, step=2, mask=mask)
        assert_equal_to_rounding(out, expected(z, score, 2.0, seed=1, step=2, mask=mask.cpu().numpy()), dtype)
        assert torch.equal(out[~mask], z[~mask])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_that_are_not_finite(poisoned, dtype):
    z, score = draw((4, 1030), dtype)
    score[0, 0], score[1, 1], score[2, 2], score[3, 1029] = math.inf, -math.inf, math.nan, math.nan
    want = expected(z, score, 2.0, seed=1, step=2, step_size=0.5)
    assert want[0, 0] == z[0, 0].double().item() + 0.5  # eps b / 2, without noise
    assert_equal_to_rounding(ops.anisotropic_step(z, score, 2.0, seed=1, step=2, step_size=0.5), want, dtype)
    plain = ops.anisotropic_step(z, score, math.inf, seed=1, step=2, bounds=(-9.0, 9.0))
    assert plain[2, 2].isnan() and plain[3, 1029].isnan()  # clamping does not hide it


def test_huge_scores_do_not_overflow():
    z, score = draw((3, 5), torch.float32)
    score = torch.full_like(score, 3e38)
    out = ops.anisotropic_step(z, score, 1.0, seed=0, step=0, step_size=0.5)
    assert_equal_to_rounding(out, expected(z, score, 1.0, seed=0, step=0, step_size=0.5), torch.float32)


def test_numbers_and_tensors_agree():
    z, score = draw((9, 5), torch.float32)
    numbers = dict(step_size=0.3, noise_scale=0.7, seed=-3, step=(1 << 40) + 1)
    as_tensors = {
        k: torch.tensor(v, device=DEVICE, dtype=torch.int64 if k in ("seed", "step") else torch.float32)
        for k, v in numbers.items()
    }
    out = ops.anisotropic_step(z, score, 2.0, **numbers)
    assert torch.equal(out, ops.anisotropic_step(z, score, torch.tensor(2.0, device=DEVICE), **as_tensors))
    for name in numbers:  # and mixed
        assert torch.equal(out, ops.anisotropic_step(z, score, 2.0, **numbers | {name: as_tensors[name]}))


def test_layouts():
    z, score = draw((6, 3, 4, 4), torch.float32)
    want = ops.anisotropic_step(z, score, 2.0, seed=1, step=1)
    last = ops.anisotropic_step(z, score.to(memory_format=torch.channels_last), 2.0, seed=1, step=1)
    assert torch.equal(last, want)
    strided = z.transpose(1, 3).contiguous().transpose(1, 3)
    assert not strided.is_contiguous()
    assert torch.equal(ops.anisotropic_step(strided, score, 2.0, seed=1, step=1), want)
    assert ops.anisotropic_step_(strided, score, 2.0, seed=1, step=1) is strided
    assert torch.equal(strided, want)
    buffer = torch.zeros(6 * 48 + 1, device=DEVICE)
    unaligned = buffer[1:].view(6, 3, 4, 4).copy_(z)
    assert torch.equal(ops.anisotropic_step_(unaligned, score, 2.0, seed=1, step=1), want) and buffer[0] == 0


def test_empty():
    for shape in ((0,), (0, 3), (4, 0)):
        z = torch.zeros(shape, device=DEVICE)
        assert ops.anisotropic_step(z, z, 1.0, seed=0, step=0).shape == z.shape
        assert ops.anisotropic_step_(z, z, 1.0, seed=0, step=0) is z


def test_noise_is_the_stream():
    """With sigma = 1, no score and z = 0 the step returns the normals themselves."""
    z = torch.zeros(1000, 3, device=DEVICE)
    out = ops.anisotropic_step(z, z, 1.0, seed=5, step=6)
    assert_equal_to_rounding(out, noise.normal(z.shape, seed=5, step=6, dtype=torch.float64).numpy(), torch.float32)


def test_compiled_with_the_kernel_inside():
    def f(z, threshold, seed, step):
        for _ in range(2):
            z = ops.anisotropic_step(z, -z, threshold, seed=seed, step=step)
            step = step + 1
        return z

    z, _ = draw((9, 5), torch.float32)
    args = (torch.tensor(0.7, device=DEVICE), torch.tensor(1, device=DEVICE), torch.tensor(2, device=DEVICE))
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(z, *args), f(z, *args), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="2^31 elements take the interpreter hours; offsets stand in for it")
def test_elements_beyond_two_to_the_31():
    count = (1 << 31) + 4096
    if torch.cuda.mem_get_info()[0] < 3 * 2 * count:
        pytest.skip("needs 13 GB of device memory")
    z = torch.zeros(count, dtype=torch.bfloat16, device=DEVICE)
    ops.anisotropic_step_(z, torch.zeros_like(z), 1.0, seed=1, step=2)
    tail = noise.normal((5000,), seed=1, step=2, offset=count - 5000, device=DEVICE)
    torch.testing.assert_close(z[-5000:].float(), tail, rtol=8e-3, atol=3e-3)
