"""Baselines have the law that they are said to have. Each false-alarm rate is 1e-6."""

import math

import torch

from fastanila import noise
from fastanila.evaluation import baselines


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(count):
    root = randn(4, 4)
    return (root @ randn(4, count, seed=1)).T.reshape(count, 1, 2, 2).float() + 3


def test_gaussian_pixels_have_the_datas_means_and_variances_and_no_correlation():
    data = correlated(500)
    draws = baselines.gaussian_pixels(data, 40_000, seed=7)
    assert draws.shape == (40_000, 1, 2, 2) and draws.dtype == torch.float32
    x, y = data.flatten(1), draws.flatten(1)
    n = len(draws)
    # 4.9 standard errors each, 5.6 for all the 4 + 4 + 6 numbers together
    assert ((y.mean(0) - x.mean(0)).abs() < 5.6 * x.std(0) / math.sqrt(n)).all()
    assert ((y.var(0) / x.var(0) - 1).abs() < 5.6 * math.sqrt(2 / n)).all()
    assert (torch.corrcoef(y.T) - torch.eye(4)).abs().max() < 5.6 / math.sqrt(n)
    assert torch.corrcoef(x.T).fill_diagonal_(0).abs().max() > 0.3  # which the data has
    assert torch.equal(draws, baselines.gaussian_pixels(data, n, seed=7))
    assert not torch.equal(draws, baselines.gaussian_pixels(data, n, seed=8))
    stream = noise.normal((2, 1, 2, 2), seed=7, step=0, stream=noise.Stream.BASELINE)
    assert torch.allclose(draws[:2], data.mean(0) + data.std(0) * stream, atol=1e-5)
    assert baselines.gaussian_pixels((data * 10).to(torch.uint8), 2, seed=0).dtype == torch.float32


def test_gaussians_have_the_datas_mean_and_covariance(monkeypatch):
    data, n = correlated(300), 40_000
    draws = baselines.gaussian(data, n, seed=7)
    assert draws.shape == (n, 1, 2, 2) and draws.dtype == torch.float32
    x, y = data.flatten(1).double(), draws.flatten(1).double()
    white = (y - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    # 4.9 standard errors of a number, 5.4 for all the 4 + 16 together
    assert (white.mean(0).abs() < 5.4 / math.sqrt(n)).all()
    assert ((torch.cov(white.T) - torch.eye(4)).abs() < 5.4 * math.sqrt(2 / n)).all()
    assert (white**4).mean() < 3.2  # a normal's is 3, that of rows picked from the data is not bounded by it
    assert torch.equal(draws, baselines.gaussian(data, n, seed=7))
    assert not torch.equal(draws, baselines.gaussian(data, n, seed=8))
    monkeypatch.setattr(baselines, "_COVARIANCE_OF", 100)
    some = baselines.gaussian(data, 5, seed=7)
    assert torch.equal(some, baselines.gaussian(data[::3], 5, seed=7))


def test_spaced_rows_keep_the_shares_of_rows_in_order():
    rows = torch.arange(10)
    assert baselines.spaced(rows, 4).tolist() == [0, 2, 5, 7]
    assert torch.equal(baselines.spaced(rows, 10), rows) and torch.equal(baselines.spaced(rows, 99), rows)


def test_patches_are_cut_at_their_place_from_images_of_their_own():
    count, height, width = 30, 7, 10  # odd sizes: cells of 1 or 2 rows and 2 or 3 columns
    which = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, height, width)
    place = torch.arange(height * width, dtype=torch.uint8).reshape(1, 1, height, width).expand(count, -1, -1, -1)
    made = baselines.patches(torch.cat([which, place, which], 1), 200, seed=0)
    assert made.shape == (200, 3, height, width) and made.dtype == torch.uint8 and made.is_contiguous()
    assert torch.equal(made[:, 1], place[:1, 0].expand(200, -1, -1)) and torch.equal(made[:, 0], made[:, 2])
    rows, columns = torch.arange(height) * 4 // height, torch.arange(width) * 4 // width
    cells = [made[:, 0][:, rows == i][..., columns == j] for i in range(4) for j in range(4)]
    assert all((cell == cell[:, :1, :1]).all() for cell in cells)
    chosen = torch.stack([cell[:, 0, 0] for cell in cells], 1)
    assert set(chosen.flatten().tolist()) == set(range(count))
    same = (chosen[:, :1] == chosen[:, 1:]).double().mean().item()  # 1 in 30 by chance, of 3000
    assert abs(same - 1 / count) < 4.9 * math.sqrt(29 / 30**2 / 3000)
    assert not torch.equal(made, baselines.patches(torch.cat([which, place, which], 1), 200, seed=1))
