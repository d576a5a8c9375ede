"""Distances against closed forms and scipy. Statistical tests fix their seeds; each false-alarm rate is 1e-6."""

import json
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


def test_pca_finds_the_axes():
    axes = torch.linalg.qr(randn(6, 6)).Q
    data = with_moments(randn(6, seed=1), axes @ torch.diag(torch.arange(6.0).double() ** 2) @ axes.T, 300)
    found = distances.pca(data, components=3)
    assert found.components.shape == (6, 3) and found.mean.dtype == torch.float64
    cosines = (found.components * axes.flip(1)[:, :3]).sum(0).abs()
    assert torch.allclose(cosines, torch.ones(3, dtype=torch.float64))
    features = distances.project(found, data.reshape(300, 2, 3))
    expected = torch.tensor([25.0, 16.0, 9.0], dtype=torch.float64) / 50
    assert torch.allclose(torch.cov(features.T), torch.diag(expected), atol=1e-12)
    assert features.mean(0).abs().max() < 1e-12


def test_pca_in_batches_and_with_little_data(monkeypatch):
    data = randn(50, 3, 4, 4)
    whole = distances.pca(data, 5)
    projected = distances.project(whole, data)
    monkeypatch.setattr(distances, "_BATCH", 7)
    parts = distances.pca(data, 5)
    assert torch.allclose(parts.components.abs(), whole.components.abs(), atol=1e-10)
    assert torch.allclose(distances.project(whole, data), projected, atol=1e-12)
    assert distances.pca(data[:4]).components.shape == (48, 3)  # three axes are all that four images have
    with pytest.raises(ValueError, match="vary"):
        distances.pca(torch.ones(5, 2))
    with pytest.raises(ValueError, match="finite"):
        distances.pca(torch.full((5, 2), math.nan))


def test_gaussian_pixels_have_the_datas_means_and_variances_and_no_correlation():
    data = (random_covariance(4, 4, 0) @ randn(4, 500, seed=1)).T.reshape(500, 1, 2, 2).float() + 3
    draws = distances.gaussian_pixels(data, 40_000, seed=7)
    assert draws.shape == (40_000, 1, 2, 2) and draws.dtype == torch.float32
    x, y = data.flatten(1), draws.flatten(1)
    n = len(draws)
    # 4.9 standard errors each, 5.6 for all the 4 + 4 + 6 numbers together
    assert ((y.mean(0) - x.mean(0)).abs() < 5.6 * x.std(0) / math.sqrt(n)).all()
    assert ((y.var(0) / x.var(0) - 1).abs() < 5.6 * math.sqrt(2 / n)).all()
    assert (torch.corrcoef(y.T) - torch.eye(4)).abs().max() < 5.6 / math.sqrt(n)
    assert torch.corrcoef(x.T).fill_diagonal_(0).abs().max() > 0.3  # which the data has
    assert torch.equal(draws, distances.gaussian_pixels(data, n, seed=7))
    assert not torch.equal(draws, distances.gaussian_pixels(data, n, seed=8))
    stream = noise.normal((2, 1, 2, 2), seed=7, step=0, stream=noise.Stream.BASELINE)
    assert torch.allclose(draws[:2], data.mean(0) + data.std(0) * stream, atol=1e-5)
    assert distances.gaussian_pixels((data * 10).to(torch.uint8), 2, seed=0).dtype == torch.float32


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


@pytest.mark.parametrize("name", ("chains", "held_out", "train", "start"))
def test_evaluate_images_says_which_images_are_too_few(name):
    sets = {other: randn(1 if other == name else 4, 1, 3, 3) for other in ("chains", "held_out", "train", "start")}
    with pytest.raises(ValueError, match=f"{name} must be at least 2 images, which have a covariance, got 1"):
        distances.evaluate_images(**sets)


def test_one_row_has_no_mmd():
    assert math.isnan(distances.mmd(randn(1, 3), randn(5, 3))) and math.isnan(distances.mmd(randn(5, 3), randn(1, 3)))


def test_evaluate_images_orders_what_is_closer():
    def images(count, seed):  # two kinds of image: strong correlation, which no pixelwise Gaussian has
        pattern = randn(1, 1, 8, 8, seed=99)
        sign = 2.0 * (torch.arange(count) % 2).reshape(-1, 1, 1, 1) - 1
        return (sign * pattern + 0.5 * randn(count, 1, 8, 8, seed=seed)).float()

    train, held_out, chains = images(600, 0), images(300, 1), images(200, 2)
    report = distances.evaluate_images(chains, held_out, train, randn(200, 1, 8, 8, seed=3).float())
    names = "frechet frechet_start frechet_gaussian frechet_train mmd mmd_start components"
    assert list(report) == names.split()
    assert json.loads(json.dumps(report)) == report and report["components"] == 32
    assert report["frechet"] < 3 * report["frechet_train"] < report["frechet_gaussian"] < 1
    assert report["frechet"] < report["frechet_start"] and abs(report["mmd"]) < report["mmd_start"]
    again = distances.evaluate_images(chains, held_out, train, chains, components=5)
    assert again["components"] == 5 and again["frechet_start"] == again["frechet"]
    assert again["mmd_start"] == again["mmd"]
    broken = distances.evaluate_images(chains * math.nan, held_out, train, chains)
    assert math.isnan(broken["frechet"]) and math.isfinite(broken["frechet_gaussian"])
    mean = train.mean(0, keepdim=True).expand(200, -1, -1, -1)
    assert distances.evaluate_images(mean, train, train, mean)["frechet"] == pytest.approx(1, abs=1e-6)
