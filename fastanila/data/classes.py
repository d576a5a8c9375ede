"""Images with their class: states that carry it, as those of `data.completion` carry their region.

A state (B, C + 1, H, W) holds an image and, in its last channel, the number of its class, the same in every pixel.
Chains move where `free` says, by the step's ``mask``: each keeps its class, and what takes a batch of states takes
these.
"""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .images import Images


def state(images: Tensor, labels: Tensor) -> Tensor:
    """(B, C + 1, H, W) of images (B, C, H, W) and their classes (B,), counted from 0; in the images' dtype, of which
    float32 holds 2^24 classes exactly."""
    plane = labels.to(images.dtype)[:, None, None, None].expand(-1, 1, *images.shape[2:])
    return torch.cat((images, plane), 1)


def images(z: Tensor) -> Tensor:
    """The images (B, C, H, W) of states."""
    return z[:, :-1]


def labels(z: Tensor) -> Tensor:
    """The classes (B,) of states, int64."""
    return z[:, -1, 0, 0].long()


def free(z: Tensor) -> Tensor:
    """Which elements of states chains may move: all but the class. Bool, of z's shape."""
    return torch.cat((torch.ones_like(images(z), dtype=torch.bool), torch.zeros_like(z[:, -1:], dtype=torch.bool)), 1)


def share(z: Tensor, norm: str) -> Tensor:
    """The share, 0-dim, of a state's elements whose gain can be below 1: those that may move; with a norm over channels
    or chains the class has the gain of the others."""
    channels = z.shape[1]
    return torch.full((), (channels - 1) / channels if norm == "element" else 1.0, device=z.device)


@dataclasses.dataclass(frozen=True, eq=False)
class ByClass:
    """Labelled images as states that carry their class: what `fastanila.data` calls a data set.

    Raises ValueError for images without labels, or of fewer than two classes.
    """

    images: Images

    def __post_init__(self):
        if self.count < 2:
            raise ValueError(f"classes must be at least 2, and all images of {self.name} are of one")

    @property
    def name(self) -> str:
        return self.images.name

    @property
    def box(self) -> tuple[float, float]:
        """Of the images: the numbers of classes lie outside of it."""
        return self.images.box

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape
        return channels + 1, height, width

    @cached_property
    def sets(self) -> dict[str, Tensor]:
        """The classes of the images, int64 (N,), by set as `fingerprint` names them."""
        train, held_out = self.images.train_labels, self.images.held_out_labels
        if train is None or held_out is None:
            raise ValueError(f"classes need images with labels, and those of {self.name} have none")
        return {"training": train, "held-out": held_out}

    @property
    def labels(self) -> Tensor:
        """The classes of the training images, int64 (N,)."""
        return self.sets["training"]

    @cached_property
    def count(self) -> int:
        """How many classes there are."""
        return 1 + max(int(labels.cpu().max()) for labels in self.sets.values() if len(labels))

    @cached_property
    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """As `Images.fingerprint`, with the SHA-256 digest of each set's classes too."""
        digests = {
            name: hashlib.sha256(labels.cpu().numpy().tobytes()).hexdigest() for name, labels in self.sets.items()
        }
        return {name: of | {"labels": digests[name]} for name, of in self.images.fingerprint.items()}

    def draw(
        self, count: int, *, seed: int | Tensor, step: int | Tensor, purpose="train", offset: int = 0, device=None
    ) -> Tensor:
        """States (count, C + 1, H, W), float32: images as `Images.draw` draws them, with their classes."""
        where: dict[str, Any] = dict(seed=seed, step=step, purpose=purpose, offset=offset)
        of_each = self.sets["held-out" if purpose == "held-out" else "training"]
        drawn = state(self.images.draw(count, **where), of_each[self.images.rows(count, **where)])
        return drawn if device is None else drawn.to(device)
