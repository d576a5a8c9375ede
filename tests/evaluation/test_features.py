"""What the report of images says of sets whose order is known, of copies, and of what cannot be."""

import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastanila import data
from fastanila.data.images import to_pixels
from fastanila.evaluation import baselines, distances, extractors, features


def generator(seed):
    return torch.Generator().manual_seed(seed)


def noisy(pixels, sd, seed=0):
    moved = pixels.float() + sd * torch.randn(pixels.shape, generator=generator(seed))
    return moved.clamp(0, 255).round().to(torch.uint8)


def blurred(pixels, sd):
    """By a Gaussian of that standard deviation, in pixels."""
    at = torch.arange(-4, 5).float()
    line = torch.exp(-0.5 * (at / sd) ** 2)
    kernel = torch.outer(line, line) / line.sum() ** 2
    channels = pixels.shape[1]
    padded = F.pad(pixels.float(), (4, 4, 4, 4), mode="reflect")
    blur = F.conv2d(padded, kernel.expand(channels, 1, 9, 9), groups=channels)
    return blur.round().to(torch.uint8)


def order(extractor, train, labels, held_out, count):
    """Kid and Frechet distance of sets, to held-out images, by name."""
    some = baselines.spaced(train, count)
    half = train[labels < (labels.max() + 1) // 2]
    values = train.float()
    sets = {
        "training": some,
        "half the classes": baselines.spaced(half, count),
        **({"blur": blurred(some, 1.0)} if train.shape[-1] > 8 else {}),
        "noise 8": noisy(some, 8),
        "noise 32": noisy(some, 32),
        "patches": baselines.patches(train, count, seed=0),
        "gaussian": features._pixels(baselines.gaussian(values, count, seed=0), (0.0, 255.0)),
        "pixelwise": features._pixels(baselines.gaussian_pixels(values, count, seed=0), (0.0, 255.0)),
    }
    truth = extractors.features_of(extractor, baselines.spaced(held_out, count))
    found = {}
    for name, pixels in sets.items():
        made = extractors.features_of(extractor, pixels)
        found[name] = distances.kid(made, truth), distances.frechet(made, truth)
        print(f"{name}: kid {found[name][0].mean:.1f} +- {found[name][0].sd:.1f}, frechet {found[name][1]:.2f}")
    return {name: kid.mean for name, (kid, _) in found.items()}


def rises(found, *names):
    return all(found[a] < found[b] for a, b in itertools.pairwise(names))


def crops(count, seed, size=32):
    """Crops of scikit-learn's two photographs, reduced to ``size``, and which photograph each is of."""
    from sklearn.datasets import load_sample_images

    photos = [torch.tensor(photo).permute(2, 0, 1) for photo in load_sample_images().images]
    which = torch.arange(count) * 2 // count
    corners = torch.rand(count, 2, generator=generator(seed))
    made = []
    for photo, corner in zip(which.tolist(), corners, strict=True):
        top, left = (int(u * (side - 64)) for u, side in zip(corner, photos[photo].shape[1:], strict=True))
        made.append(photos[photo][:, top : top + 64, left : left + 64])
    return F.avg_pool2d(torch.stack(made).float(), 64 // size).round().to(torch.uint8), which


def test_the_order_of_known_sets_of_photographs():
    (train, labels), (held_out, _) = crops(96, 0), crops(48, 1)
    found = order(extractors.efficientnet_lite0(), train, labels, held_out, 48)
    assert rises(found, "training", "noise 8", "noise 32", "gaussian", "pixelwise")
    assert rises(found, "training", "half the classes", "pixelwise") and rises(found, "training", "blur", "pixelwise")
    assert found["training"] < found["patches"]


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("flowers12-64px", 16), ("cifar10-jpeg", 32)])
def test_the_order_of_known_sets_of_images(name, size):
    """FASTANILA_TEST_IMAGES is the folder that holds them. Its numbers are those of docs/results.md."""
    folder = os.environ.get("FASTANILA_TEST_IMAGES")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"FASTANILA_TEST_IMAGES names no folder that holds {name}")
    images = data.load("image-folder", data_dir=Path(folder) / name, size=size)
    found = order(extractors.efficientnet_lite0(), images.train, images.train_labels, images.held_out, 500)
    assert rises(found, "training", "half the classes", "noise 8", "gaussian", "pixelwise")
    assert rises(found, "noise 8", "noise 32", "pixelwise") and rises(found, "training", "blur", "pixelwise")
    assert found["noise 8"] < found["patches"]


def test_the_order_of_known_sets_of_digits():
    digits = data.load("digits")
    classes = digits.train_labels, digits.held_out, digits.held_out_labels
    network = extractors.classifier(digits.train, *classes)
    found = order(network, digits.train, digits.train_labels, digits.held_out, 360)
    assert rises(found, "training", "noise 8", "noise 32", "gaussian", "pixelwise")
    assert rises(found, "training", "half the classes", "pixelwise") and found["training"] < found["patches"]


# ----------------------------------------------------------------------------------------------------------------------
# The report, by features that cost nothing: the pixels


PIXELS = extractors.Extractor("pixels", "of no weights", lambda pixels: pixels.flatten(1).float() / 128)


def patterns(count, seed):
    """Images of two kinds, (count, 1, 8, 8): correlations that no pixelwise Gaussian has; float in [-1, 1]."""
    pattern = torch.randn(1, 1, 8, 8, generator=generator(99))
    sign = 2.0 * (torch.arange(count) % 2).reshape(-1, 1, 1, 1) - 1
    return (0.3 * sign * pattern + 0.2 * torch.randn(count, 1, 8, 8, generator=generator(seed))).clamp(-1, 1)


def report(chains, **options):
    train, held_out = to_pixels(patterns(300, 0)), to_pixels(patterns(150, 1))
    return features.evaluate_images(chains, held_out, train, **dict(extractor=PIXELS) | options)


def test_the_report_orders_what_is_closer():
    chains, start = patterns(120, 2), torch.randn(120, 1, 8, 8, generator=generator(3))
    found = report(chains, start=start)
    numbers = ["kid", "kid_sd", "frechet", "precision", "recall", "density", "coverage"]
    near = ["nearest", "copied", "nearest_features", "copied_features"]
    held_out = ["nearest_held_out", "copied_held_out", "nearest_features_held_out", "copied_features_held_out"]
    sizes = ["features", "samples", "held_out", "training"]
    assert list(found) == [*sizes, *numbers, *near, *held_out, "kid_start", "frechet_start", "baselines"]
    assert tuple(found["baselines"]) == features.BASELINES
    assert all(list(values) == [*numbers, *near] for values in found["baselines"].values())
    assert json.loads(json.dumps(found)) == found  # nothing but plain numbers and words
    assert [found[name] for name in sizes] == ["pixels", 120, 150, 300]
    kid = {name: values["kid"] for name, values in found["baselines"].items()}
    assert abs(found["kid"]) < 3 * found["kid_sd"] and abs(kid["training"]) < 3 * found["kid_sd"]
    assert max(found["kid"], kid["training"]) < kid["pixelwise"] < found["kid_start"]
    assert found["frechet"] < found["baselines"]["pixelwise"]["frechet"] < found["frechet_start"]
    assert found == report(chains, start=start) and found["kid"] != report(chains, seed=1)["kid"]


def test_the_report_is_of_what_its_measures_say():
    chains = patterns(120, 2)
    found = report(chains, with_baselines=False)
    assert "baselines" not in found and "kid_start" not in found
    x, y, z = (to_pixels(patterns(*of)) for of in ((120, 2), (150, 1), (300, 0)))
    a, b = (PIXELS.features(images) for images in (x, y))
    assert (found["kid"], found["kid_sd"]) == distances.kid(a, b) and found["frechet"] == distances.frechet(a, b)
    assert tuple(found[name] for name in distances.Neighbours._fields) == distances.neighbours(a, b)
    gaps = torch.cdist(x.flatten(1).double(), z.flatten(1).double()).min(1).values / 8
    assert found["nearest"] == pytest.approx(gaps.median().item(), rel=1e-6)
    assert found["nearest_features"] == pytest.approx(gaps.median().item() * 8 / 128, rel=1e-6)
    held_out = torch.cdist(y.flatten(1).double(), z.flatten(1).double()).min(1).values / 8
    assert found["nearest_held_out"] == pytest.approx(held_out.median().item(), rel=1e-6)
    fewer = report(chains, with_baselines=False, count=60)
    assert (fewer["samples"], fewer["held_out"], fewer["training"]) == (60, 60, 300)
    assert fewer["kid"] == distances.kid(a[::2], PIXELS.features(baselines.spaced(y, 60))).mean
    assert fewer["nearest"] == pytest.approx(gaps[::2].median().item(), rel=1e-6)  # of all training images
    pixels = report(x, with_baselines=False)
    wide = report(7 * chains + 3, box=(-4.0, 10.0), with_baselines=False)
    assert pixels == found and wide["kid"] == pytest.approx(found["kid"], abs=0.1)


def test_copies_show():
    train = to_pixels(patterns(300, 0))
    fresh, copies = report(patterns(120, 2)), report(noisy(train[:120], 8))
    assert fresh["copied"] == fresh["copied_features"] == fresh["copied_held_out"] == 0
    assert copies["copied"] == copies["copied_features"] == 1 and copies["nearest"] < 10 < copies["nearest_held_out"]
    of = {name: values["copied"] for name, values in copies["baselines"].items()}
    assert of == {"training": 1, "copies": 1, "gaussian": 0, "patches": 0, "pixelwise": 0}
    assert copies["baselines"]["copies"]["nearest"] == copies["baselines"]["training"]["nearest"] == 0
    half = torch.cat([to_pixels(patterns(60, 2)), noisy(train[:60], 8)])
    assert report(half, with_baselines=False)["copied"] == 0.5


def test_chains_that_are_not_finite_are_at_no_distance():
    chains = patterns(40, 2)
    chains[3, 0, 2, 1] = math.nan
    found = report(chains, start=chains, count=40)
    assert all(math.isnan(found[name]) for name in ("kid", "frechet", "precision", "copied", "kid_start"))
    assert math.isfinite(found["baselines"]["gaussian"]["kid"]) and math.isfinite(found["nearest_held_out"])


def test_images_that_cannot_be_compared_are_named():
    sets = dict(chains=patterns(4, 0), held_out=patterns(4, 1), train=patterns(4, 2), start=patterns(4, 3))
    for name in sets:
        for wrong in (sets[name][:1], sets[name][:, 0]):
            with pytest.raises(ValueError, match=rf"{name} must be at least 2 images \(N, C, H, W\), got shape"):
                features.evaluate_images(**sets | {name: wrong}, extractor=PIXELS)
    with pytest.raises(ValueError, match=r"train must be of the chains' shape \(1, 8, 8\), got \(1, 8, 7\)"):
        features.evaluate_images(**sets | dict(train=patterns(4, 2)[..., :7]), extractor=PIXELS)
    with pytest.raises(ValueError, match="count must be at least 2, got 1"):
        features.evaluate_images(**sets, extractor=PIXELS, count=1)
