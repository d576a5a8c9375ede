"""Distances against closed forms and scipy. Statistical tests fix their seeds; each false-alarm rate is 1e-6."""

import math

import pytest
import scipy.linalg
import scipy.optimize
import torch

from fastanila import noise
from fastanila.evaluation import distances


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean, covariance, count, seed=0):
    """Rows whose sample mean and covariance are exactly those given."""
    rows = randn(count, len(mean), seed=seed)
    rows = rows - rows.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(rows.T @ rows / (count - 1)), rows.T, upper=False).T
    values, vectors = torch.linalg.eigh(covariance)
    return white @ (vectors * values.clamp(min=0).sqrt()).T + mean


def random_covariance(k, rank, seed):
    root = randn(k, rank, seed=seed)
    return root @ root.T / rank


@pytest.mark.parametrize(("k", "rank_a", "rank_b"), [(1, 1, 1), (4, 4, 4), (16, 32, 16), (8, 3, 8), (8, 3, 2)])
def test_frechet_equals_the_matrix_square_root(k, rank_a, rank_b):
    ca, cb = random_covariance(k, rank_a, 1), random_covariance(k, rank_b, 2)
    ma, mb = randn(k, seed=3), randn(k, seed=4)
    ours = distances.frechet(with_moments(ma, ca, 100, 5), with_moments(mb, cb, 150, 6))
    # a whisker of the identity, because scipy's root of a singular product is unreliable; it moves the result by 1e-4
    singular = min(rank_a, rank_b) < k
    eye = 1e-10 * torch.eye(k, dtype=torch.float64) if singular else 0
    root = scipy.linalg.sqrtm(((ca + eye) @ (cb + eye)).numpy()).real
    true = (ma - mb).square().sum() + (ca + cb).trace() - 2 * root.trace()
    assert ours == pytest.approx(float(true), rel=1e-3 if singular else 1e-9)


def test_frechet_of_known_gaussians():
    # commuting covariances: sum of squared differences of the standard deviations, and of the means
    sa, sb = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64), torch.tensor([3.0, 0.5, 0.0], dtype=torch.float64)
    shift = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    a = with_moments(torch.zeros(3, dtype=torch.float64), torch.diag(sa**2), 50)
    b = with_moments(shift, torch.diag(sb**2), 80, seed=1)
    assert distances.frechet(a, b) == pytest.approx(4 + 2.25 + 5, abs=1e-12)


def test_frechet_is_a_distance():
    a, b = randn(60, 5), 2 * randn(40, 5, seed=1) + 1
    assert distances.frechet(a, b) == pytest.approx(distances.frechet(b, a), rel=1e-12)
    assert 0 <= distances.frechet(a, a) < 1e-13 and distances.frechet(a, a.flip(0)) < 1e-13
    shift = torch.tensor([3.0, 0, 0, 4.0, 0], dtype=torch.float64)
    assert distances.frechet(a, a + shift) == pytest.approx(25, rel=1e-12)
    few = randn(3, 64)  # fewer rows than dimensions, as small evaluations have
    assert distances.frechet(few, few) < 1e-12 and distances.frechet(few, 0 * few) > 0


@pytest.mark.parametrize("distance", [distances.frechet, distances.mmd, distances.sliced_wasserstein])
def test_a_set_that_is_not_finite_is_at_distance_nan(distance):
    broken = randn(10, 3)
    broken[4, 1] = math.inf
    assert math.isnan(distance(broken, randn(10, 3))) and math.isnan(distance(randn(10, 3), broken))


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="2 rows"):
        distances.frechet(randn(1, 3), randn(5, 3))


def test_mmd_by_its_definition():
    a, b = randn(5, 2), randn(7, 2, seed=1) + 1
    pooled = torch.cat([a, b])
    gaps = torch.tensor([(pooled[i] - pooled[j]).norm().item() for i in range(12) for j in range(i)])
    median = gaps.median().item()

    def kernel(x, y):
        return math.exp(-(x - y).square().sum().item() / (2 * median**2))

    aa = sum(kernel(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    bb = sum(kernel(b[i], b[j]) for i in range(7) for j in range(7) if i != j) / 42
    ab = sum(kernel(x, y) for x in a for y in b) / 35
    assert distances.mmd(a, b) == pytest.approx(aa + bb - 2 * ab, abs=1e-6)
    assert distances.mmd(a, b) == pytest.approx(distances.mmd(b, a), abs=1e-12)


def test_mmd_is_centred_for_equal_laws_and_positive_for_different_ones():
    equal = torch.tensor([distances.mmd(randn(40, 3, seed=2 * i), randn(40, 3, seed=2 * i + 1)) for i in range(300)])
    assert abs(equal.mean()) < 4.9 * equal.std() / math.sqrt(len(equal))  # a mean of 300: normal, 1e-6 two-sided
    biased = equal + 2 / 40 * 0.4  # what the biased estimator, with its diagonal, adds at least
    assert biased.mean() > 4.9 * biased.std() / math.sqrt(len(biased))  # the test has the power to see it
    assert distances.mmd(randn(40, 3), randn(40, 3, seed=1) + 1) > 2 * equal.max()


def test_mmd_of_mostly_equal_rows_is_finite():
    same = torch.zeros(20, 2)
    assert distances.mmd(same, same) == 0
    assert distances.mmd(same, torch.cat([same[:18], torch.ones(2, 2)])) > 0


def test_sliced_wasserstein_in_one_dimension_is_the_sorted_difference():
    a, b = randn(30, 1), 3 * randn(30, 1, seed=1)
    true = (a.sort(0).values - b.sort(0).values).square().mean().sqrt().item()
    assert distances.sliced_wasserstein(a, b) == pytest.approx(true, rel=1e-12)
    # of different sizes: repeat both up to a common size
    c = randn(12, 1, seed=2)
    true = distances.sliced_wasserstein(a.repeat(2, 1), c.repeat(5, 1))
    assert distances.sliced_wasserstein(a, c) == pytest.approx(true, rel=1e-12)


def test_sliced_wasserstein_by_its_definition():
    # in each direction the cheapest assignment of 12 rows to 12, of rows repeated where there are fewer
    a, b = randn(6, 3), 2 * randn(4, 3, seed=1) + 1
    directions = noise.normal((10, 3), seed=5, step=0, stream=noise.Stream.BASELINE).double()
    costs = []
    for w in directions / directions.norm(dim=1, keepdim=True):
        cost = ((a @ w).repeat(2)[:, None] - (b @ w).repeat(3)).square().numpy()
        costs.append(cost[scipy.optimize.linear_sum_assignment(cost)].mean())
    found = distances.sliced_wasserstein(a, b, projections=10, seed=5)
    assert found == pytest.approx(math.sqrt(sum(costs) / 10), rel=1e-10)


def test_sliced_wasserstein_is_a_distance():
    a, b = randn(60, 4), randn(50, 4, seed=1) + 1
    assert distances.sliced_wasserstein(a, a.flip(0)) == 0
    assert distances.sliced_wasserstein(a, b) == pytest.approx(distances.sliced_wasserstein(b, a), rel=1e-12)
    shift = torch.tensor([2.0, 0, 0, 0], dtype=torch.float64)
    # a shift by v is seen as (v . direction)**2, whose mean is |v|**2 / 4 here; the variance of the square of a
    # direction's coordinate in 4 dimensions is 1/16, so 4.9 standard errors of 4096 are 0.02 of 1/4
    seen = distances.sliced_wasserstein(a, a + shift, projections=4096) ** 2
    assert seen == pytest.approx(1, abs=4 * 4.9 / 4 / math.sqrt(4096))


def test_one_row_has_no_mmd():
    assert math.isnan(distances.mmd(randn(1, 3), randn(5, 3))) and math.isnan(distances.mmd(randn(5, 3), randn(1, 3)))


def cubic(x, y):
    return (x @ y / len(x) + 1) ** 3


def unbiased(a, b):
    """The squared MMD, pair by pair."""
    n, m = len(a), len(b)
    aa = sum(cubic(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    bb = sum(cubic(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return (aa + bb - 2 * sum(cubic(x, y) for x in a for y in b) / (n * m)).item()


def test_kid_by_its_definition(monkeypatch):
    a, b = randn(13, 5), 1.5 * randn(9, 5, seed=1) + 0.3
    sets = []
    for step, x in enumerate((a, b)):
        u = noise.uniform((7, len(x)), seed=3, step=step, stream=noise.Stream.SUBSETS)
        sets.append([x[row.argsort()[:4]] for row in u])  # 4 is half of 9
    true = torch.tensor([1000 * unbiased(x, y) for x, y in zip(*sets, strict=True)], dtype=torch.float64)
    for block in (512, 3):
        monkeypatch.setattr(distances, "_BLOCK", block)
        found = distances.kid(a, b, subsets=7, seed=3)
        assert found == pytest.approx((true.mean().item(), true.std().item()), rel=1e-9)
    assert distances.kid(a, b, subsets=7, size=2, seed=3) != found and distances.kid(a, b, subsets=7, seed=4) != found
    assert math.isnan(distances.kid(randn(1, 5), b).mean) and math.isnan(distances.kid(a, b, subsets=1).sd)
    assert math.isfinite(distances.kid(randn(2, 5), b).mean)


def test_kid_has_no_bias_at_any_size():
    def mean(statistic):
        values = torch.tensor([statistic(randn(24, 3, seed=2 * i), randn(60, 3, seed=2 * i + 1)) for i in range(200)])
        return values.mean() / (values.std() / math.sqrt(len(values)))

    assert abs(mean(lambda a, b: distances.kid(a, b, subsets=5).mean)) < 4.9  # normal, 1e-6 two-sided
    diagonal = 1000 * 2 / 12 * 5  # the biased estimator of 12 rows adds 1000 * 2 / 12 times k(x, x) - k(x, y), over 5
    assert mean(lambda a, b: distances.kid(a, b, subsets=5).mean + diagonal) > 4.9
    assert distances.kid(randn(40, 3), randn(40, 3, seed=1) + 1).mean > 1000


def test_neighbours_by_their_definition():
    samples, truth = randn(23, 3), 0.8 * randn(17, 3, seed=1) + 0.9

    def radius(x, i, k):
        return sorted((x[i] - x[j]).norm().item() for j in range(len(x)) if j != i)[k - 1]

    def inside(x, centres, i, k):
        return (x - centres[i]).norm().item() <= radius(centres, i, k)

    n, m = len(samples), len(truth)
    precision = sum(any(inside(x, truth, j, 3) for j in range(m)) for x in samples) / n
    recall = sum(any(inside(y, samples, i, 3) for i in range(n)) for y in truth) / m
    density = sum(inside(x, truth, j, 5) for x in samples for j in range(m)) / (5 * n)
    coverage = sum(any(inside(x, truth, j, 5) for x in samples) for j in range(m)) / m
    found = distances.neighbours(samples, truth)
    assert found == pytest.approx((precision, recall, density, coverage), rel=1e-12)
    assert len(set(found)) == 4 and all(0 < value < 1 for value in found)  # no two of them could be mixed up
    other = distances.neighbours(samples, truth, k=1, k_density=2)
    assert other.precision < found.precision and other.recall < found.recall
    assert distances.neighbours(truth, truth) == pytest.approx((1, 1, 1.2, 1), rel=1e-12)  # itself and 5 others, of 5
    assert all(map(math.isnan, distances.neighbours(samples[:3], truth)))
    assert all(map(math.isnan, distances.neighbours(samples, truth[:5])))
    broken = samples.clone()
    broken[4, 1] = math.nan
    assert all(map(math.isnan, distances.neighbours(broken, truth))) and math.isnan(distances.kid(broken, truth).mean)


def test_nearest_by_its_definition(monkeypatch):
    rows, pool = 20 * randn(11, 4), 20 * randn(31, 4, seed=1)
    rows[3] = pool[8]
    monkeypatch.setattr(distances, "_BLOCK", 4)
    found = distances.nearest(rows, pool, k=6)
    for i, row in enumerate(rows):
        gaps = sorted(((row - y).norm().item(), j) for j, y in enumerate(pool))
        assert found.which[i] == gaps[0][1]
        assert found.distance[i].item() == pytest.approx(gaps[0][0], rel=1e-5)  # of rows that were rounded to float32
        assert found.ratio[i].item() == pytest.approx(gaps[0][0] * 6 / sum(gap for gap, _ in gaps[:6]), rel=1e-5)
    assert found.distance[3] == found.ratio[3] == 0 and found.distance.dtype == torch.float64
    assert distances.nearest(rows, pool[:1]).ratio.tolist() == [1.0] * 3 + [pytest.approx(1)] * 8  # nothing to compare
    assert distances.nearest(pool[:2], pool[:1].expand(9, 4)).ratio.tolist() == pytest.approx([0, 1], abs=1e-6)
