"""Sets of images that say what a distance to held-out ones is worth: what anybody can draw without a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import noise

_COVARIANCE_OF = 10_000  #: the most images that a covariance is taken of


def spaced(rows: Tensor, most: int) -> Tensor:
    """At most so many of the rows, evenly spaced, so that each class of rows in order keeps its share."""
    count = min(len(rows), most)
    return rows[torch.arange(count, device=rows.device) * len(rows) // count]


def gaussian_pixels(data: Tensor, count: int, *, seed: int) -> Tensor:
    """``count`` draws of the Gaussian with each pixel's own mean and variance and no correlation.

    Of the data's shape and device, and its dtype where that is floating (float32 where not).
    """
    rows = data.double() if data.dtype == torch.float64 else data.float()
    shape = (count, *data.shape[1:])
    xi = noise.normal(shape, seed=seed, step=0, stream=noise.Stream.BASELINE, device=data.device, dtype=rows.dtype)
    draws = rows.mean(0) + rows.std(0) * xi
    return draws.to(data.dtype) if data.is_floating_point() else draws


def gaussian(data: Tensor, count: int, *, seed: int) -> Tensor:
    """``count`` draws of the Gaussian with the mean and the full covariance of images (N, ...), N >= 2: float32.

    A draw is the mean plus the centred images, each times an independent normal, over the root of N - 1: its covariance
    is the sample covariance, and no matrix is factorised. Of more than 10,000 images evenly spaced ones are taken.
    """
    rows = spaced(data, _COVARIANCE_OF).flatten(1).float()
    mean = rows.mean(0)
    shape, stream = (count, len(rows)), noise.Stream.BASELINE
    xi = noise.normal(shape, seed=seed, step=1, stream=stream, device=rows.device, dtype=torch.float32)
    draws = mean + xi @ (rows - mean) / math.sqrt(len(rows) - 1)
    return draws.reshape(count, *data.shape[1:])


def patches(data: Tensor, count: int, *, seed: int, side: int = 4) -> Tensor:
    """``count`` images put together from a ``side`` x ``side`` grid of patches, each cut from an image (N, C, H, W) of
    its own, drawn at random, at its own place: right in every patch, and with nothing that holds them together."""
    height, width = data.shape[-2:]
    shape, stream = (count, side * side), noise.Stream.BASELINE
    chosen = noise.integers(len(data), shape, seed=seed, step=2, stream=stream, device=data.device)
    rows, columns = (torch.arange(length, device=data.device) for length in (height, width))
    cell = (rows * side // height)[:, None] * side + columns * side // width
    which = chosen[:, cell]  # (count, H, W): the image that each pixel is of
    return data.movedim(1, -1)[which, rows[:, None], columns].movedim(-1, 1).contiguous()
