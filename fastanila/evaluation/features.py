"""How far images are from held-out ones, by the features of a network, and whether they are copies.

Every distance stands beside those of as many images that anybody could draw (`BASELINES`). None of them is the FID of
papers, whose network is Inception (`inception.fid`): the report names its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.images import to_pixels
from . import baselines, distances, extractors
from .extractors import Extractor, features_of

#: Sets of as many images as there are samples: training images (the floor), the training images nearest to held-out
#: ones (as near, but copies), draws of the Gaussian with the training images' full covariance, patches of training
#: images put together at random, draws of the Gaussian with each pixel's own variance.
BASELINES = ("training", "copies", "gaussian", "patches", "pixelwise")
_COPIED = 0.5  #: of the held-out images' median ratio: below it is a copy


class _Reference(NamedTuple):
    """What samples are compared with."""

    extractor: Extractor
    train: Tensor  #: uint8, all of them
    truth: Tensor  #: (M, k): features of held-out images
    known: Tensor  #: (N, k): features of training images
    copies: Tensor  #: of held-out images, the index of the nearest training image
    pixel: distances.Nearest  #: of held-out images, in pixels
    feature: distances.Nearest


def evaluate_images(
    chains: Tensor,
    held_out: Tensor,
    train: Tensor,
    start: Tensor | None = None,
    *,
    box: tuple[float, float] = (-1.0, 1.0),
    train_labels: Tensor | None = None,
    held_out_labels: Tensor | None = None,
    count: int = 2000,
    seed: int = 0,
    with_baselines: bool = True,
    extractor: Extractor | None = None,
) -> dict[str, Any]:
    """Numbers of images ``chains`` (N, C, H, W) against ``held_out`` ones, N >= 2: plain Python, as JSON has it.

    Images are uint8, or floats in ``box``, which are rounded to 8 bits. At most ``count`` of each set are taken, evenly
    spaced. The network is ``extractor``, or the one that `extractor_of` chooses.

    features, accuracy (of a classifier): which network; samples, held_out, training: how many images.
    kid, kid_sd: `distances.kid`; frechet: `distances.frechet` on the features, which is biased upwards where there are
    few images; precision, recall, density, coverage: `distances.neighbours`; kid_start, frechet_start: of ``start``.
    nearest, nearest_held_out: how far the nearest training image is from a sample, and from a held-out image (median of
    the root mean square over pixels, in grey levels of 255); copied: share of the samples whose `Nearest.ratio` is at
    most half the median of held-out images'; copied_held_out: of held-out images, which is not 0 where data hold an
    image twice. nearest_features, copied_features, ..._held_out: the same in features, of the training images whose
    features are taken.
    baselines: the same numbers of each of `BASELINES`. A set that holds a NaN or an infinity has NaN throughout.
    """
    sets = {"chains": chains, "held_out": held_out, "train": train} | ({} if start is None else {"start": start})
    for name, images in sets.items():
        if images.dim() != 4 or len(images) < 2:
            expected = f"{name} must be at least 2 images (N, C, H, W)"
            raise ValueError(f"{expected}, got shape {tuple(images.shape)}")
        if images.shape[1:] != chains.shape[1:]:
            expected = f"{name} must be of the chains' shape {tuple(chains.shape[1:])}"
            raise ValueError(f"{expected}, got {tuple(images.shape[1:])}")
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    device = chains.device
    pixels = {name: _pixels(images, box).to(device) for name, images in sets.items()}
    if extractor is None:
        extractor = extractor_of(pixels["train"], train_labels, pixels["held_out"], held_out_labels)
    reference = _reference(extractor, pixels["train"], baselines.spaced(pixels["held_out"], count), count)
    sampled, finite = baselines.spaced(pixels["chains"], count), _finite(baselines.spaced(chains, count))
    report: dict[str, Any] = {"features": extractor.name}
    if extractor.accuracy is not None:
        report["accuracy"] = extractor.accuracy
    report |= {"samples": len(sampled), "held_out": len(reference.truth), "training": len(train)}
    report |= _numbers(reference, sampled, finite, seed=seed)
    report |= {
        "nearest_held_out": _levels(reference.pixel, pixels["train"]),
        "copied_held_out": _copied(reference.pixel, reference.pixel),
        "nearest_features_held_out": reference.feature.distance.median().item(),
        "copied_features_held_out": _copied(reference.feature, reference.feature),
    }
    if start is not None:
        begun = features_of(extractor, baselines.spaced(pixels["start"], count))
        begun = begun if _finite(baselines.spaced(start, count)) else begun.fill_(torch.nan)
        report["kid_start"] = distances.kid(begun, reference.truth, seed=seed).mean
        report["frechet_start"] = distances.frechet(begun, reference.truth)
    if with_baselines:
        made = _baselines(reference, len(sampled), seed=seed)
        report["baselines"] = {
            name: _numbers(reference, images, True, seed=seed, keep=True) for name, images in made.items()
        }
    return report


def extractor_of(
    train: Tensor, train_labels: Tensor | None, held_out: Tensor, held_out_labels: Tensor | None
) -> Extractor:
    """EfficientNet-Lite0; for grey images, and those of less than 16 pixels along a side, a classifier of the classes,
    where there are 2 or more."""
    small = train.shape[1] == 1 or min(train.shape[-2:]) < 16
    if small and train_labels is not None and held_out_labels is not None and len(train_labels.unique()) > 1:
        return extractors.classifier(train, train_labels, held_out, held_out_labels)
    return extractors.efficientnet_lite0()


def _reference(extractor: Extractor, train: Tensor, held_out: Tensor, count: int) -> _Reference:
    truth = features_of(extractor, held_out, keep=True)
    known = features_of(extractor, baselines.spaced(train, count), keep=True)
    pixel = distances.nearest(_lines(held_out), _lines(train))
    return _Reference(extractor, train, truth, known, pixel.which, pixel, distances.nearest(truth, known))


def _baselines(reference: _Reference, count: int, *, seed: int) -> Mapping[str, Tensor]:
    train = reference.train
    values = train.to(torch.float32)
    made = {
        "training": baselines.spaced(train, count),
        "copies": train[baselines.spaced(reference.copies, count)],
        "gaussian": baselines.gaussian(values, count, seed=seed),
        "patches": baselines.patches(train, count, seed=seed),
        "pixelwise": baselines.gaussian_pixels(values, count, seed=seed),
    }
    return {name: _pixels(made[name], (0.0, 255.0)) for name in BASELINES}


def _numbers(reference: _Reference, pixels: Tensor, finite: bool, *, seed: int, keep: bool = False) -> dict[str, float]:
    found, truth = features_of(reference.extractor, pixels, keep=keep), reference.truth
    if not finite:
        found = found.fill_(torch.nan)
    kid = distances.kid(found, truth, seed=seed)
    report = {"kid": kid.mean, "kid_sd": kid.sd, "frechet": distances.frechet(found, truth)}
    report |= distances.neighbours(found, truth)._asdict()
    pixel = distances.nearest(_lines(pixels), _lines(reference.train))
    feature = distances.nearest(found, reference.known)
    report |= {
        "nearest": _levels(pixel, reference.train),
        "copied": _copied(pixel, reference.pixel),
        "nearest_features": feature.distance.median().item(),
        "copied_features": _copied(feature, reference.feature),
    }
    return report if finite else dict.fromkeys(report, torch.nan)


def _levels(found: distances.Nearest, images: Tensor) -> float:
    return (found.distance.median() / images[0].numel() ** 0.5).item()


def _copied(found: distances.Nearest, held_out: distances.Nearest) -> float:
    return (found.ratio <= _COPIED * held_out.ratio.median()).double().mean().item()


def _lines(pixels: Tensor) -> Tensor:
    """(N, D) float32, about zero, where float32 has most digits."""
    return pixels.flatten(1).to(torch.float32) - 127.5


def _pixels(images: Tensor, box: tuple[float, float]) -> Tensor:
    return images if images.dtype == torch.uint8 else to_pixels(images.detach(), box)


def _finite(images: Tensor) -> bool:
    return bool(torch.isfinite(images).all())
