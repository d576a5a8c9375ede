"""Outliers told from data by their energy. Statistical tests fix their seeds; each false-alarm rate is 1e-6."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from fastanila import data
from fastanila.data.images import Images, from_pixels
from fastanila.evaluation import ood


def by_pairs(inside, outside):
    """The definition: of all pairs, those in which the outlier has the higher energy, and half of the equal ones."""
    wins = sum((b > a) + 0.5 * (b == a) for a in inside.tolist() for b in outside.tolist())
    return wins / (len(inside) * len(outside))


@pytest.mark.parametrize(("n", "m", "levels"), [(7, 5, None), (33, 61, 4), (1, 1, 1), (12, 1, 3), (50, 50, 2)])
def test_auroc_is_that_of_all_pairs_and_scikit_learns(n, m, levels):
    a, b = np.random.default_rng(n).normal(0, 1, n), np.random.default_rng(m + 1).normal(0.7, 1, m)
    if levels is not None:  # ties
        a, b = np.floor(a * levels / 4), np.floor(b * levels / 4)
    found = ood.auroc(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(by_pairs(a, b), abs=1e-12)
    assert found == pytest.approx(roc_auc_score([0] * n + [1] * m, [*a, *b]), abs=1e-12)
    assert ood.auroc(torch.from_numpy(b), torch.from_numpy(a)) == pytest.approx(1 - found, abs=1e-12)


def test_auroc_at_its_ends():
    low, high = torch.arange(5.0), torch.arange(5.0, 9.0)
    assert ood.auroc(low, high) == 1 and ood.auroc(high, low) == 0 and ood.auroc(low, low) == 0.5
    assert ood.auroc(low, torch.tensor([math.inf])) == 1
    assert math.isnan(ood.auroc(low, torch.tensor([math.nan, 9.0])))
    with pytest.raises(ValueError, match="inside and outside must not be empty, got 5 and 0 energies"):
        ood.auroc(low, low[:0])


def test_outliers_are_what_they_are_called():
    train = torch.rand(40, 3, 5, 5, generator=torch.Generator().manual_seed(0)) - 1
    made = ood.outliers(train, 900, seed=3)
    assert list(made) == ["uniform", "constant", "gaussian"]
    assert all(x.shape == (900, 3, 5, 5) and x.dtype == torch.float32 for x in made.values())
    for x in (made["uniform"], made["constant"]):
        u = (x[:, :, 0, 0] + 1) / 2
        assert (u >= 0).all() and (u <= 1).all()
        # 5.1 standard errors: a false alarm of 1e-6 over the six means; those of [0, 1] as [-1, 1] would be 25 out
        assert ((u.mean(0) - 0.5).abs() < 5.1 / math.sqrt(12 * 900)).all()
        assert (torch.corrcoef(u.T) - torch.eye(3)).abs().max() < 5.1 / math.sqrt(900)  # channels of their own
    assert (made["constant"] == made["constant"][:, :, :1, :1]).all()
    assert made["uniform"].flatten(1).std(1).min() > 0.3
    again = ood.outliers(train, 900, seed=3)
    assert all(torch.equal(made[name], again[name]) for name in made)
    assert not torch.equal(made["uniform"], ood.outliers(train, 900, seed=4)["uniform"])


def test_an_energy_tells_what_it_must():
    """An energy of which the answers are known: the spread of an image's pixels."""
    pixels = torch.randint(100, 156, (30, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images = Images("x", pixels, pixels[::2])
    found = ood.evaluate(lambda x: x.flatten(1).var(1), images, torch.zeros(4, 1, 8, 8))
    assert found["auroc_uniform"] == 1 and found["auroc_constant"] == 0 and found["auroc_ood"] == 0
    assert 0.2 < found["auroc_gaussian"] < 0.8
    reverse = ood.evaluate(lambda x: -x.flatten(1).var(1), images)
    assert reverse["auroc_constant"] == 1 and "auroc_ood" not in reverse


def test_many_images_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(ood, "_MOST", 3)
    pixels = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(9, 1, 8, 8).contiguous()
    seen = []
    ood.evaluate(lambda x: seen.append(x) or x.flatten(1).sum(1), Images("x", pixels, pixels))
    assert torch.equal(seen[0], from_pixels(pixels[[0, 3, 6]])) and all(len(x) == 3 for x in seen)


def test_images_of_another_shape_are_fitted():
    x = torch.rand(2, 3, 12, 12) * 2 - 1
    grey = ood.fitted(x, (1, 12, 12))
    expected = np.einsum("nchw,c->nhw", x.double().numpy(), [0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey[:, 0], expected, atol=1e-6)
    assert torch.equal(ood.fitted(grey, (3, 12, 12)), grey.expand(2, 3, 12, 12))
    flat = torch.full((1, 1, 8, 8), 0.25)
    torch.testing.assert_close(ood.fitted(flat, (3, 16, 16)), torch.full((1, 3, 16, 16), 0.25))
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8)[None, None]
    smaller = ood.fitted(checks, (1, 4, 4))
    assert smaller.abs().max() < 0.2  # antialiased, where every fourth pixel would be 1 or -1


def test_another_data_set_by_name_or_folder(tmp_path):
    digits = ood.load("digits", (1, 8, 8))
    held_out = data.load("digits").held_out
    assert torch.equal(digits, from_pixels(held_out)) and len(held_out) == len(load_digits().target[::5])
    assert ood.load("digits", (3, 16, 16)).shape == (360, 3, 16, 16)
    for i in range(12):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), i, dtype=np.uint8)).save(tmp_path / "a" / f"{i:02d}.png")
    found = ood.load(str(tmp_path), (1, 4, 4))
    assert torch.equal(found, from_pixels(torch.tensor([0, 10]))[:, None, None, None].expand(2, 1, 4, 4))
    with pytest.raises(ValueError, match="ood must be digits, cifar10, flowers102 or a folder of class folders, got"):
        ood.load("nowhere", (1, 8, 8))
