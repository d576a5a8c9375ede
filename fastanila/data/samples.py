"""Data of one's own: vectors held in memory, and what becomes of a tensor, an indexable data set or a density."""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import noise
from .completion import Completions
from .densities import STREAMS, Density
from .images import Images, to_pixels

_EVERY = 10  #: one row in so many is held out, the first included
_ROOM = 0.05  #: of the data's range, that the box has beyond it at each end

WANTED = "a tensor (N, D) or (N, C, H, W), an indexable data set of such items, or a 2-D Density"


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors held in memory as float32, all on one device, and drawn with replacement."""

    name: str
    train: Tensor  #: float32 (N, D)
    held_out: Tensor  #: float32 (M, D)
    box: tuple[float, float]  #: (low, high) of every element, with a little room

    @property
    def shape(self) -> tuple[int]:
        return tuple(self.train.shape[1:])

    @cached_property
    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """What tells these vectors from others: as `Images.fingerprint`, of their bytes."""
        return {
            name: {"shape": list(rows.shape), "sha256": hashlib.sha256(rows.cpu().contiguous().numpy()).hexdigest()}
            for name, rows in (("training", self.train), ("held-out", self.held_out))
        }

    def to(self, device) -> Vectors:
        return replace(self, train=self.train.to(device), held_out=self.held_out.to(device))

    def draw(
        self, count: int, *, seed: int | Tensor, step: int | Tensor, purpose="train", offset: int = 0, device=None
    ) -> Tensor:
        """Vectors (count, D), float32: as `Images.draw`."""
        rows, (stream, _) = self.held_out if purpose == "held-out" else self.train, STREAMS[purpose]
        picked = noise.integers(
            len(rows), (count,), seed=seed, step=step, stream=stream, offset=offset, device=rows.device
        )
        drawn = rows[picked]
        return drawn if device is None else drawn.to(device)


def of(value: Any, name: str) -> Density | Images | Vectors:
    """The data set that ``value`` is, called ``name``, on the CPU.

    A tensor or array (N, D) of floats is `Vectors`. One of images (N, C, H, W), C 1 or 3, is `Images`: uint8, or floats
    in [-1, 1], which are rounded to 8 bits. Floats of which none is below 0 are taken as in [0, 1], as torchvision's
    ToTensor has them, and a warning says so. An indexable data set (len and [i]) is read whole: its items are tensors,
    arrays or Pillow's images, or tuples that begin with one (image, label). Every tenth row is held out. A `Density`
    stays one. Raises TypeError for anything else, and ValueError for values that cannot be: NaN, no rows, other shapes.
    """
    if isinstance(value, Completions):
        value = value.images
    if isinstance(value, (Images, Vectors)):
        return replace(value, name=name)
    if isinstance(value, Density):
        return _checked_density(replace(value, name=name))
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        if not (hasattr(value, "__getitem__") and hasattr(value, "__len__")) or isinstance(value, (str, bytes, dict)):
            raise TypeError(f"data must be {WANTED}, got {type(value).__name__}")
        value = _stacked(value)
    value = value.detach().cpu()
    if value.dim() not in (2, 4):
        hint = "; images without a channel are x[:, None]" if value.dim() == 3 else ""
        raise ValueError(f"data must be (N, D) or (N, C, H, W), got shape {tuple(value.shape)}{hint}")
    if len(value) < 2 or not value[0].numel():
        raise ValueError(
            f"data must have at least 2 rows, of which 1 in {_EVERY} is held out, got {tuple(value.shape)}"
        )
    if value.is_floating_point() and (bad := int((~torch.isfinite(value)).flatten(1).any(1).sum())):
        raise ValueError(f"data must be finite, but {bad} of {len(value)} rows hold NaN or infinity")
    if value.dim() == 4:
        return Images(name, *_split(_pixels(value)))
    if not value.is_floating_point():
        raise ValueError(f"data of vectors must be floats, got {value.dtype}")
    return _vectors(value.to(torch.float32), name)


def _vectors(rows: Tensor, name: str) -> Vectors:
    low, high = rows.min().item(), rows.max().item()
    if not low < high:
        raise ValueError(f"data must vary, but every element is {low}")
    room = _ROOM * (high - low)
    return Vectors(name, *_split(rows), box=(low - room, high + room))


def _pixels(images: Tensor) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise ValueError(f"data of images must have 1 or 3 channels, got shape {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.contiguous()
    if not images.is_floating_point():
        raise ValueError(f"data of images must be uint8 or floats in [-1, 1], got {images.dtype}")
    low, high = images.min().item(), images.max().item()
    if low < -1 or high > 1:
        raise ValueError(f"data of images must be floats in [-1, 1] or uint8, got floats from {low:.4g} to {high:.4g}")
    if low >= 0:
        warnings.warn("data: no pixel is below 0, so they are taken as in [0, 1], where 0 is black", stacklevel=4)
        return to_pixels(images, (0.0, 1.0))
    return to_pixels(images)


def _stacked(items) -> Tensor:
    """The items of an indexable data set, without their labels, in one tensor."""
    if not len(items):
        raise ValueError("data must have at least 2 rows, got none")
    first = _item(items[0], 0)
    rows = torch.empty((len(items), *first.shape), dtype=first.dtype)
    for i in range(len(items)):
        row = first if i == 0 else _item(items[i], i)
        if row.shape != first.shape or row.dtype != first.dtype:
            raise ValueError(
                f"data must be items of one shape and dtype: item 0 is {first.dtype} {tuple(first.shape)}, "
                f"item {i} is {row.dtype} {tuple(row.shape)}"
            )
        rows[i] = row
    return rows


def _item(item: Any, index: int) -> Tensor:
    if isinstance(item, (tuple, list)) and item:
        item = item[0]
    if isinstance(item, Tensor):
        return item.detach().cpu()
    if isinstance(item, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(item))
    if hasattr(item, "convert") and hasattr(item, "mode"):  # Pillow's
        pixels = np.array(item.convert("L" if item.mode in ("1", "L") else "RGB"))
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()
    raise TypeError(f"data must be {WANTED}; item {index} is of type {type(item).__name__}")


def _checked_density(density: Density) -> Density:
    drawn = density.draw(5, seed=0, step=0)
    if drawn.shape != (5, 2) or not torch.isfinite(drawn).all():
        raise ValueError(f"data: five points of a Density must be (5, 2) and finite, got {tuple(drawn.shape)}: {drawn}")
    low, high = density.box
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"data: the box of a Density must be (low, high) with low < high, got {density.box}")
    return density


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(training, held out)."""
    held_out = torch.arange(len(rows)) % _EVERY == 0
    return rows[~held_out], rows[held_out]
