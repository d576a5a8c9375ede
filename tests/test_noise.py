"""The noise stream against its known answer, an independent Philox, and the laws it claims."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

import oracle
from fastanila import noise
from fastanila.noise import Stream

FALSE_ALARM = 1e-6  # of each statistical test below; seeds are fixed
N = 1 << 20


def z_bound(tests: int = 1) -> float:
    """How many standard deviations a normal statistic may be out, two-sided, over ``tests`` of them."""
    return scipy.stats.norm.isf(FALSE_ALARM / tests / 2)


def test_known_answer():
    # Random123's kat_vectors: philox4x32 10, counter 0, key 0
    assert [f"{w:08x}" for w in noise.words(4, seed=0, step=0).tolist()] == [
        "6627e8d5",
        "e169c58d",
        "bc57ac4c",
        "9b00dbd8",
    ]


def test_known_answer_with_all_bits_set():
    ones = torch.full((1,), 0xFFFFFFFF)
    words = noise.philox(*[ones] * 4, *[ones] * 2)
    assert [f"{w.item():08x}" for w in words] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def test_philox_equals_the_independent_one():
    rng = np.random.default_rng(0)
    counter = rng.integers(0, 1 << 32, (2000, 4), dtype=np.uint64).astype(np.uint32)
    key = rng.integers(0, 1 << 32, (2000, 2), dtype=np.uint64).astype(np.uint32)
    ours = noise.philox(*[torch.from_numpy(x.astype(np.int64)) for x in (*counter.T, *key.T)])
    assert np.array_equal(torch.stack(ours, 1).numpy(), oracle.philox4x32(counter, key).astype(np.int64))


@pytest.mark.parametrize("seed", [0, 7, 1 << 63, (1 << 64) - 1, -1])
@pytest.mark.parametrize("step", [0, 1, (1 << 32) + 3, (1 << 56) - 1])
@pytest.mark.parametrize("start", [0, 1, 5, (1 << 31) - 2, (1 << 34) - 3])
def test_words_follow_the_contract(seed, step, start):
    lanes, which = oracle.words(np.arange(start, start + 11, dtype=object), seed, step, stream=3)
    expected = lanes[np.arange(11), which].astype(np.int64)
    assert np.array_equal(noise.words(11, seed=seed, step=step, stream=3, start=start).numpy(), expected)


def test_seed_and_step_may_be_tensors_and_seeds_wrap():
    a = noise.normal((5, 3), seed=(1 << 64) - 5, step=(1 << 40) + 1)
    b = noise.normal((5, 3), seed=torch.tensor(-5), step=torch.tensor((1 << 40) + 1))
    c = noise.normal((5, 3), seed=-5 + (1 << 65), step=(1 << 40) + 1)
    assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (5, 1), (1023,), (7, 3, 2, 2)])
def test_a_slice_draws_what_the_whole_draws_there(shape):
    whole = noise.normal((shape[0] + 3, *shape[1:]), seed=1, step=2)
    for offset in range(4):
        part = noise.normal((max(shape[0] - 1, 0), *shape[1:]), seed=1, step=2, offset=offset)
        assert torch.equal(part, whole[offset : offset + len(part)])


def test_normals_equal_the_float64_formula():
    expected = oracle.normals(np.arange(10000), seed=11, step=13)
    assert np.abs(noise.normal((10000,), seed=11, step=13, dtype=torch.float64).numpy() - expected).max() < 1e-12
    assert np.abs(noise.normal((10000,), seed=11, step=13).numpy() - expected).max() < 2e-6
    low = noise.normal((10000,), seed=11, step=13, dtype=torch.bfloat16)
    assert torch.equal(low, noise.normal((10000,), seed=11, step=13).bfloat16())


def test_the_largest_normal_is_finite():
    rho = noise._box_muller(torch.tensor([0, 0xFFFFFFFF]), torch.tensor([0, 0]), torch.float32)[0]
    assert rho[0].item() == pytest.approx(math.sqrt(2 * 33 * math.log(2)), rel=1e-6)  # 6.76
    assert rho[1].item() == 0


def test_integers_are_the_high_half():
    lanes, which = oracle.words(np.arange(1000), seed=5, step=6, stream=5)
    words = [int(w) for w in lanes[np.arange(1000), which]]
    for high in (1, 2, 10, 50000, 1 << 31):
        ours = noise.integers(high, (1000,), seed=5, step=6, stream=5).tolist()
        assert ours == [w * high >> 32 for w in words]
    for high in (0, -1, (1 << 31) + 1):
        with pytest.raises(ValueError, match="high"):
            noise.integers(high, (3,), seed=0, step=0, stream=5)


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(step=-1), r"step must be in \[0, 2\*\*56\), got -1"),
        (dict(step=1 << 56), "step must be in"),
        (dict(stream=256), r"stream must be in \[0, 256\), got 256"),
        (dict(offset=-1), "offset must be at least 0"),
    ],
)
def test_what_the_stream_does_not_have_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        noise.normal((4,), **dict(seed=0, step=0) | bad)


def test_uniforms_lie_in_the_half_open_interval():
    u = noise._unit(torch.tensor([0, 0xFFFFFFFF]))
    assert u[0].item() > 0 and u[1].item() == 1.0


def test_compiles_to_the_same_numbers():
    def f(z, seed, step):
        return z + noise.normal(z.shape, seed=seed, step=step, offset=3)

    z = torch.zeros(33, 3)
    for seed, step in ((3, 4), (1 << 62, 1 << 50)):
        args = (z, torch.tensor(seed), torch.tensor(step))
        torch.testing.assert_close(torch.compile(f, fullgraph=True)(*args), f(*args), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- laws


def test_moments_of_the_normals():
    x = noise.normal((N,), seed=2, step=3, dtype=torch.float64).numpy()
    # E x, E x^2, E x^3, E x^4 of N(0, 1) with the variances of x, x^2, x^3, x^4
    for power, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs((x**power).mean() - mean) / math.sqrt(variance / N) < z_bound(4)


@pytest.mark.parametrize("lane", range(4))
def test_kolmogorov_smirnov(lane):
    x = noise.normal((N,), seed=4, step=5, dtype=torch.float64).numpy()[lane::4]
    assert scipy.stats.kstest(x, "norm").pvalue > FALSE_ALARM / 4
    u = noise.uniform((N,), seed=4, step=5, stream=1, dtype=torch.float64).numpy()[lane::4]
    assert scipy.stats.kstest(u, "uniform").pvalue > FALSE_ALARM / 4
    # teeth: a scale wrong by one per cent, or a mean by a hundredth, is seen at this size
    assert scipy.stats.kstest(1.02 * x, "norm").pvalue < FALSE_ALARM / 4
    assert scipy.stats.kstest(x + 0.02, "norm").pvalue < FALSE_ALARM / 4


def test_tails():
    x = torch.cat([noise.normal((1 << 22,), seed=6, step=t).abs() for t in range(4)])
    for threshold in (3.0, 4.0, 5.0):
        p = 2 * scipy.stats.norm.sf(threshold)
        count = (x > threshold).sum().item()
        assert scipy.stats.binom.cdf(count, x.numel(), p) > FALSE_ALARM / 6
        assert scipy.stats.binom.sf(count - 1, x.numel(), p) > FALSE_ALARM / 6
    assert x.max() < 6.77


def test_tail_beyond_six_is_reachable():
    # one draw in 3e8 lies beyond 6: reach it through the words that make it, 2^32 exp(-18) = 65 of 2^32
    rho = noise._box_muller(torch.arange(70), torch.zeros(70, dtype=torch.int64), torch.float64)[0]
    expected = np.sqrt(-2 * np.log((np.arange(70) + 0.5) / 2**32))
    np.testing.assert_allclose(rho.numpy(), expected, rtol=1e-6)
    assert expected[0] > 6.7 and 6 < expected[64] < 6.01


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of two sets of standard normals in units of its standard deviation under independence."""
    return ((a.double() * b.double()).mean() * math.sqrt(a.numel())).item()


def test_no_correlation_between_chains_steps_lanes_and_seeds():
    size = (1 << 10, 1 << 10)
    x = noise.normal(size, seed=8, step=9)
    pairs = {
        "chains": (x[:-1], x[1:]),
        "half of the chains": (x[:512], x[512:]),
        "steps": (x, noise.normal(size, seed=8, step=10)),
        "steps 2^32 apart": (x, noise.normal(size, seed=8, step=9 + (1 << 32))),
        "seeds": (x, noise.normal(size, seed=9, step=9)),
        "high words of seeds": (x, noise.normal(size, seed=8 + (1 << 32), step=9)),
        "seed and step exchanged": (x, noise.normal(size, seed=9, step=8)),
        **{f"lanes {i} {j}": (x[:, i::4], x[:, j::4]) for i, j in itertools.combinations(range(4), 2)},
        **{f"squares of lanes {i} {j}": ((x[:, i::4] ** 2 - 1) / math.sqrt(2), (x[:, j::4] ** 2 - 1) / math.sqrt(2))
           for i, j in itertools.combinations(range(4), 2)},
    }  # fmt: skip
    for name, (a, b) in pairs.items():
        assert abs(correlation(a, b)) < z_bound(len(pairs)), name
    # teeth: a hundredth of shared variance
    assert abs(correlation(x, 0.1 * x + math.sqrt(0.99) * pairs["steps"][1])) > z_bound(len(pairs))


def test_cross_chain_mean():
    """Noise shared by all chains, which no marginal test sees: the variance over D of the mean over chains."""
    chains, dim = 1024, 3072
    x = noise.normal((chains, dim), seed=10, step=11).double()

    def statistic(x):
        return ((x.mean(0).square().mean() * chains - 1) / math.sqrt(2 / dim)).item()

    shared = noise.normal((1, dim), seed=10, step=12).double()
    assert abs(statistic(x)) < z_bound()
    assert abs(statistic(math.sqrt(0.999) * x + math.sqrt(0.001) * shared)) > z_bound()


def test_every_pair_of_streams_differs():
    draws = {s: noise.normal((1 << 18,), seed=12, step=13, stream=s) for s in Stream}
    pairs = list(itertools.combinations(Stream, 2))
    for a, b in pairs:
        assert abs(correlation(draws[a], draws[b])) < z_bound(len(pairs)), (a, b)
    assert len({int(s) for s in Stream}) == len(Stream) and max(Stream) < 256


@pytest.mark.parametrize("shape, offset", [((7, 3), 0), ((5,), 3), ((1, 1), 2), ((33, 2, 5), 11), ((0, 2), 1)])
def test_a_philox_call_an_element_draws_the_same_bits(shape, offset, monkeypatch):
    """What a GPU compiles for small draws, run here."""
    place = dict(seed=(1 << 63) + 5, step=(1 << 40) + 3, stream=noise.Stream.DATA, offset=offset)
    drawn = [lambda: noise.uniform(shape, **place), lambda: noise.integers(1000, shape, **place)]
    drawn += [lambda dtype=dtype: noise.normal(shape, **place, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    expected = [draw() for draw in drawn]
    calls = []
    monkeypatch.setattr(noise, "_by_element", lambda count, device: calls.append(count) or True)
    for draw, want in zip(drawn, expected, strict=True):
        got = draw()
        assert torch.equal(got, want) and got.dtype == want.dtype
    assert len(calls) == 4


def test_small_compiled_draws_on_a_gpu_take_a_call_an_element(monkeypatch):
    assert not noise._by_element(100, "cuda")  # eager, where one call for four elements is less work
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert noise._by_element(1 << 20, "cuda:0") and noise._by_element(1, torch.device("cuda"))
    assert not noise._by_element((1 << 20) + 1, "cuda")
    assert not noise._by_element(100, None) and not noise._by_element(100, "cpu")
