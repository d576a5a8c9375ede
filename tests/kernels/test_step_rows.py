"""The fused norms and statistics against the float64 formula: on CUDA where there is one, else in the interpreter."""

import math

import numpy as np
import pytest
import torch

import oracle
from cases import LARGE, LAUNCHED, OUTGROWN, SHAPES, SMALL_TILES, one_in, with_slow
from fastanila import ops
from fastanila.ops import Statistics, dispatch
from fastanila.ops import step as step_ops
from fastanila.ops.reference import NORMS
from steps import DEVICE, DTYPES, MARKS, assert_equal_to_rounding, counting, draw, expected

pytestmark = MARKS
OPTIONS = {"": {}, "bounds": dict(bounds=(-0.5, 1.0)), "inf": dict(threshold=math.inf)}
NAMED = dict(seed=(1 << 63) + 5, step=(1 << 33) + 7)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that short chains outgrow."""
    for name, elements in SMALL_TILES.items():
        monkeypatch.setattr(dispatch.kernels.step_rows, name, elements)


def assert_statistics(seen, score, threshold, norm, gamma=None):
    assert isinstance(seen, Statistics)
    for got, want in zip(seen, oracle.statistics(score.double().cpu(), threshold, norm, gamma), strict=True):
        assert got.shape == (len(score),) and got.dtype == torch.float32
        np.testing.assert_allclose(got.double().cpu().numpy(), want, rtol=2e-6, atol=1e-7)


def check(shape, dtype, norm, options, *, in_place=False, statistics=True, seed=0):
    if norm == "channel" and len(shape) == 1:
        pytest.skip("no channels")
    options = dict(options)
    threshold = options.pop("threshold", 2.0 * math.sqrt(math.prod(shape[1:])) if norm == "chain" else 3.0)
    settings = NAMED | dict(step_size=0.3, noise_scale=0.8, norm=norm, **options)
    z, score = draw(shape, dtype, seed)
    score[-1] *= 2  # some chains clip and some do not
    want, before = expected(z, score, threshold, **settings), z.clone()
    function = ops.anisotropic_step_ if in_place else ops.anisotropic_step
    out = function(z, score, threshold, statistics=statistics, **settings)
    if statistics:
        out, seen = out
        assert_statistics(seen, score, threshold, norm)
    assert_equal_to_rounding(out, want, dtype)
    assert out.dtype == dtype and out.is_contiguous() and (out is z) == in_place
    assert in_place or torch.equal(z, before)


@one_in(4, dtype=DTYPES[:2], shape=SHAPES, norm=["channel", "chain"])
def test_norms_equal_the_formula(poisoned, dtype, shape, norm):
    check(shape, dtype, norm, {}, statistics=False)


@one_in(5, dtype=DTYPES, shape=SHAPES, norm=NORMS)
def test_statistics_equal_the_formula(poisoned, dtype, shape, norm):
    check(shape, dtype, norm, {})


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
def test_options(poisoned, norm, options, in_place):
    check((3, 3, 2, 4), torch.float32, norm, options, in_place=in_place)


@one_in(7, dtype=[torch.float32, torch.bfloat16], shape=OUTGROWN, norm=NORMS)
def test_chains_larger_than_a_tile(poisoned, small_tiles, dtype, shape, norm):
    view = dispatch.kernels.step_rows.view(shape, norm)
    tile = dispatch.kernels.step_rows.tile_of(view.channels, view.size, view.norm)
    assert view.size > tile.cols
    check(shape, dtype, norm, {})
    check(shape, dtype, norm, {}, statistics=False, in_place=True)


@pytest.mark.parametrize("norm", NORMS)
def test_chains_larger_than_the_largest_tile(poisoned, norm):
    check(LARGE[norm], torch.float32, norm, {})


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("offset", [1, (1 << 31) - 1, (1 << 40) + 1])
def test_offsets(poisoned, norm, offset):
    for shape in ((3, 3, 5), (3, 3, 4)):
        check(shape, torch.float32, norm, dict(offset=offset))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gamma_and_mask(poisoned, dtype):
    z, score = draw((5, 3, 7), dtype)
    gamma = torch.tensor([0.25, 1.0, 0.5]).view(3, 1).to(DEVICE)
    mask = (torch.rand(5, 1, 7, generator=torch.Generator().manual_seed(1)) < 0.5).to(DEVICE)
    settings = dict(seed=1, step=2, step_size=0.2)
    want = expected(z, score, None, gamma=gamma.cpu().numpy(), mask=mask.cpu().numpy(), **settings)
    out, seen = ops.anisotropic_step(z, score, None, gamma=gamma, mask=mask, statistics=True, **settings)
    assert_equal_to_rounding(out, want, dtype)
    assert_statistics(seen, score, None, "element", gamma.cpu().numpy())
    torch.testing.assert_close(seen.clip_fraction, torch.full((5,), 2 / 3, device=DEVICE))
    for norm in ("channel", "chain"):
        out = ops.anisotropic_step(z, score, 2.0, norm=norm, mask=mask, **settings)
        assert_equal_to_rounding(out, expected(z, score, 2.0, norm=norm, mask=mask.cpu().numpy(), **settings), dtype)


@one_in(2, tiles=["more", "one tile"], norm=NORMS)
def test_scores_that_are_not_finite(norm, tiles, request):
    if tiles == "more":
        request.getfixturevalue("small_tiles")
    z, score = draw((7, 2, 24), torch.float32)
    score[0, 0, 0] = math.inf
    score[1, 0, 3], score[1, 1, 3], score[1, 1, 20] = math.inf, -math.inf, -math.inf
    score[2, 1, 17] = math.nan
    score[3, 0, 1], score[3, 0, 22] = math.inf, math.nan
    score[4], score[5] = math.nan, 0.0
    settings = dict(seed=1, step=2, step_size=0.5, norm=norm)
    out, seen = ops.anisotropic_step(z, score, 2.0, statistics=True, **settings)
    assert_equal_to_rounding(out, expected(z, score, 2.0, **settings), torch.float32)
    assert_statistics(seen, score, 2.0, norm)
    plain, seen = ops.anisotropic_step(z, score, math.inf, bounds=(-9.0, 9.0), statistics=True, **settings)
    assert plain[2, 1, 17].isnan() and seen.gamma_mean[2].isnan()  # clamping does not hide it
    assert_equal_to_rounding(plain[5:], expected(z, score, math.inf, bounds=(-9.0, 9.0), **settings)[5:], torch.float32)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [3e38, 1e30, 1e-30])
@pytest.mark.parametrize("tiles", ["one tile", "more"])
def test_norms_and_statistics_do_not_overflow(norm, size, tiles, request):
    if tiles == "more":
        request.getfixturevalue("small_tiles")
    z, score = draw((3, 3, 24), torch.float32)
    score = size * score.sign()
    score[1] /= torch.linspace(1, 1e6, 24, device=DEVICE)
    settings = dict(seed=0, step=0, step_size=0.5, norm=norm)
    out, seen = ops.anisotropic_step(z, score, 1.5, statistics=True, **settings)
    assert_equal_to_rounding(out, expected(z, score, 1.5, **settings), torch.float32)
    want = oracle.statistics(score.double().cpu(), 1.5, norm)
    for got, value in zip(seen, want, strict=True):
        np.testing.assert_allclose(got.double().cpu().numpy(), value, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("norm", NORMS)
def test_the_same_bits_at_every_run_and_in_every_batch(norm):
    z, score = draw((37, 3, 20), torch.float32)
    settings = dict(seed=1, step=2, norm=norm, statistics=True)
    whole, seen = ops.anisotropic_step(z, score, 4.0, **settings)
    again, once_more = ops.anisotropic_step(z, score, 4.0, **settings)
    assert torch.equal(whole, again) and all(map(torch.equal, seen, once_more))
    for i in (0, 5, 36):
        alone, its = ops.anisotropic_step(z[i : i + 1], score[i : i + 1], 4.0, offset=i, **settings)
        assert torch.equal(alone[0], whole[i])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(its, seen, strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_numbers_and_tensors_agree(norm):
    z, score = draw((9, 5, 2), torch.float32)
    numbers = dict(step_size=0.3, noise_scale=0.7, seed=-3, step=(1 << 40) + 1)
    as_tensors = {
        k: torch.tensor(v, device=DEVICE, dtype=torch.int64 if k in ("seed", "step") else torch.float32)
        for k, v in numbers.items()
    }
    out, seen = ops.anisotropic_step(z, score, 2.0, norm=norm, statistics=True, **numbers)
    b = torch.tensor(2.0, device=DEVICE)
    same, its = ops.anisotropic_step(z, score, b, norm=norm, statistics=True, **as_tensors)
    assert torch.equal(out, same) and all(map(torch.equal, seen, its))


@pytest.mark.parametrize("norm", NORMS)
def test_layouts(norm):
    z, score = draw((6, 3, 4, 4), torch.float32)
    settings = dict(norm=norm, seed=1, step=1, statistics=True)
    want, seen = ops.anisotropic_step(z, score, 2.0, **settings)
    last = score.to(memory_format=torch.channels_last)
    assert torch.equal(ops.anisotropic_step(z, last, 2.0, **settings)[0], want)
    strided = z.transpose(1, 3).contiguous().transpose(1, 3)
    out, its = ops.anisotropic_step_(strided, score, 2.0, **settings)
    assert out is strided and torch.equal(strided, want) and all(map(torch.equal, seen, its))
    buffer = torch.zeros(6 * 48 + 1, device=DEVICE)
    unaligned = buffer[1:].view(6, 3, 4, 4).copy_(z)
    assert torch.equal(ops.anisotropic_step_(unaligned, score, 2.0, **settings)[0], want) and buffer[0] == 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("statistics", [False, True])
def test_a_score_in_the_memory_of_z(norm, statistics):
    """What a program writes, another has yet to read: those run out of place."""
    buffer = draw((4, 2, 1100), torch.float32)[0]
    settings = dict(norm=norm, seed=1, step=1, statistics=statistics)
    want = ops.anisotropic_step(buffer[1:].clone(), buffer[:-1].clone(), 2.0, **settings)
    out = ops.anisotropic_step_(buffer[1:], buffer[:-1], 2.0, **settings)
    if statistics:
        (out, seen), (want, wanted) = out, want
        assert all(map(torch.equal, seen, wanted))
    assert torch.equal(out, want)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 3, 2), (3, 2, 0)], ids=str)
def test_empty(norm, shape):
    z = torch.zeros(shape, device=DEVICE)
    for function in (ops.anisotropic_step, ops.anisotropic_step_):
        out, seen = function(z, z, 1.0, norm=norm, seed=0, step=0, statistics=True)
        assert out.shape == z.shape
        assert [s.tolist() for s in seen] == [[x] * shape[0] for x in (1.0, 0.0, 0.0)]


@pytest.mark.parametrize("channels", [2048, 2049])
def test_channels_beyond_a_tile_run_the_definition(channels, monkeypatch):
    launches = count_launches(monkeypatch)
    z = draw((1, channels, 2), torch.float32)[0]
    assert ops.fused(z, "channel") == (channels == 2048) and ops.fused(z, "chain")
    check((1, channels, 2), torch.float32, "channel", dict(threshold=100.0))
    assert len(launches) == (channels == 2048)


KERNELS = ("anisotropic_step_kernel", "rows_kernel")


def count_launches(monkeypatch) -> list[str]:
    return counting(monkeypatch, (dispatch.kernels.step, "_launch_step"), (dispatch.kernels.step_rows, "_launch_rows"))


@one_in(3, norm=NORMS, statistics=[False, True], shape=LAUNCHED)
def test_one_launch(norm, statistics, shape, monkeypatch):
    z, score = draw(shape, torch.float32)
    settings = dict(norm=norm, statistics=statistics, seed=torch.tensor(1, device=DEVICE), step=2)
    ops.anisotropic_step(z, score, 2.0, **settings)  # compiles, on a GPU
    launches = count_launches(monkeypatch)
    ops.anisotropic_step(z, score, 2.0, **settings)
    assert len(launches) == 1
    if DEVICE == "cuda":  # nothing beside it either
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            ops.anisotropic_step(z, score, 2.0, **settings)
            torch.cuda.synchronize()
        on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        made = [
            name for name in on_device if "Activity Buffer" not in name and "Sync" not in name
        ]  # the profiler's own
        if not made:
            pytest.skip("the profiler saw nothing on the device: the launch was counted, what is beside it was not")
        assert len(made) == 1 and any(name in made[0] for name in KERNELS), made


@pytest.mark.parametrize("norm", with_slow(["chain"], ["element", "channel"]))
def test_compiled_with_the_kernel_inside(norm):
    def f(z, threshold, seed, step):
        z, seen = ops.anisotropic_step(z, -z, threshold, norm=norm, seed=seed, step=step, statistics=True)
        ops.anisotropic_step_(z, -z, threshold, norm=norm, seed=seed, step=step + 1, statistics=True)
        return z, seen

    z, _ = draw((9, 5, 2), torch.float32)
    args = (torch.tensor(0.7, device=DEVICE), torch.tensor(1, device=DEVICE), torch.tensor(2, device=DEVICE))
    (out, seen), (want, wanted) = torch.compile(f, fullgraph=True)(z, *args), f(z, *args)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tuple(seen), tuple(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm):
    z, score = draw((5, 3, 2), torch.float32)
    z, score, arguments = step_ops.prepare(z, score, 1.5, 0.3, 1.0, norm, 1, 2, 0, None, None, None)
    for name in (
        "anisotropic_step",
        "anisotropic_step_",
        "anisotropic_step_statistics",
        "anisotropic_step_statistics_",
    ):
        torch.library.opcheck(getattr(torch.ops.fastanila, name).default, (z, score, *arguments))


def test_a_score_is_laid_out_ahead_of_the_operator():
    """Compiled, the conversion of a channels_last gradient then fuses with what made a score of it."""
    orders = []

    def backend(graph, inputs):
        orders.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph

    z, score = draw((2, 3, 4, 4), torch.float32)
    last = score.to(memory_format=torch.channels_last)
    f = torch.compile(lambda z, s: ops.anisotropic_step(z, -s, 1.0, seed=1, step=1), backend=backend, fullgraph=True)
    assert torch.equal(f(z, last), ops.anisotropic_step(z, -score, 1.0, seed=1, step=1))
    (order,) = orders
    assert order.index("contiguous") < next(i for i, name in enumerate(order) if "anisotropic_step" in name)
