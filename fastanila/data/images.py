"""Images to learn from, in memory, and where they are read from; drawn, as densities are, from the noise stream.

A draw is a function of (seed, step, row) and of nothing else: there is no loader, no worker and no shuffling order to
save. Row i of a draw with ``offset=o`` is row o + i of the whole draw, so a batch may be shared out over machines;
``purpose`` is "train", "start" (where chains start) or "held-out", which draw from streams of their own, the last,
for images, from a set that training never sees. Draws trace under ``torch.compile(fullgraph=True)`` with ``seed`` and
``step`` as 0-dim int64 tensors on the draw's device.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import noise
from . import image_files
from .densities import STREAMS


def from_pixels(pixels: Tensor) -> Tensor:
    """Pixels of any shape, uint8 or means of them, as float32 in [-1, 1]: x / 127.5 - 1."""
    # A GPU divides by a constant through its reciprocal, so write the product and get the same bits everywhere.
    return (pixels.to(torch.float32) - 127.5) * (1 / 127.5)


def to_pixels(images: Tensor, box: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """The nearest pixels, uint8, of states in the box; what lies outside becomes black or white, NaN black."""
    low, high = box
    shares = ((images.float() - low) / (high - low)).clamp(0, 1).nan_to_num(0.0)
    return (shares * 255).round().to(torch.uint8)


@dataclass(frozen=True, eq=False)
class Images:
    """Images held in memory as uint8, all on one device, and drawn with replacement as floats in [-1, 1]."""

    name: str
    train: Tensor  #: uint8 (N, C, H, W)
    held_out: Tensor  #: uint8 (M, C, H, W)
    box: tuple[float, float] = (-1.0, 1.0)
    train_labels: Tensor | None = None  #: int64 (N,), the class of each from 0 on; None where there are no classes
    held_out_labels: Tensor | None = None  #: int64 (M,)

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.train.shape[1:])

    @cached_property
    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """What tells these images from others, as JSON has it: of each set its shape and its pixels' SHA-256 digest."""
        return {
            name: {"shape": list(images.shape), "sha256": hashlib.sha256(images.cpu().contiguous().numpy()).hexdigest()}
            for name, images in (("training", self.train), ("held-out", self.held_out))
        }

    def to(self, device) -> Images:
        tensors = ("train", "held_out", "train_labels", "held_out_labels")
        here = {name: getattr(self, name) for name in tensors}
        return replace(self, **{name: None if x is None else x.to(device) for name, x in here.items()})

    def draw(
        self, count: int, *, seed: int | Tensor, step: int | Tensor, purpose="train", offset: int = 0, device=None
    ) -> Tensor:
        """Images (count, C, H, W), `from_pixels`; picked where the images lie, then moved to ``device``."""
        images = self.held_out if purpose == "held-out" else self.train
        drawn = from_pixels(images[self.rows(count, seed=seed, step=step, purpose=purpose, offset=offset)])
        return drawn if device is None else drawn.to(device)

    def rows(self, count: int, *, seed: int | Tensor, step: int | Tensor, purpose="train", offset: int = 0) -> Tensor:
        """Which of the images `draw` takes: (count,) int64, where the images lie."""
        images, (stream, _) = self.held_out if purpose == "held-out" else self.train, STREAMS[purpose]
        return noise.integers(
            len(images), (count,), seed=seed, step=step, stream=stream, offset=offset, device=images.device
        )


def changes(before: dict[str, Any] | None, now: dict[str, Any] | None) -> list[str]:
    """How the images of two fingerprints differ, in words; nothing where one is not known."""
    found = []
    for name in before if before and now else ():
        was, become = before[name], now[name]
        if was["shape"][0] != become["shape"][0]:
            found.append(f"{was['shape'][0]} {name} images then, {become['shape'][0]} now")
        elif was != become:
            found.append(f"as many {name} images, but not the same")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# A loader returns (training, held-out), each `Labelled`, on the CPU. Of the options of `registry.load` it has those
# that it takes: root (the data_dir), size, channels, download.


class Labelled(NamedTuple):
    """Images, and which class each is of."""

    pixels: Tensor  #: uint8 (N, C, H, W)
    labels: Tensor  #: int64 (N,), classes counted from 0

    def at(self, rows: Tensor) -> Labelled:
        """Those that ``rows``, a mask or indices, names."""
        return Labelled(self.pixels[rows], self.labels[rows])


def digits() -> tuple[Labelled, Labelled]:
    from sklearn.datasets import load_digits

    source = load_digits()
    values = torch.from_numpy(source.images)  # (1797, 8, 8), 0..16
    pixels = (values * (255 / 16)).round().to(torch.uint8)[:, None]
    return _split(Labelled(pixels, _labels(source.target)), every=5)


def cifar10(root: Path, download: bool) -> tuple[Labelled, Labelled]:
    from torchvision.datasets import CIFAR10

    # CIFAR10 unpickles its files, and does so only after it has found the checksum of each to be right.
    sets = (_from_torchvision(CIFAR10, root, download, train=train) for train in (True, False))
    return tuple(Labelled(_channels_first(dataset.data), _labels(dataset.targets)) for dataset in sets)


def flowers102(root: Path, size: int, channels: int, download: bool) -> tuple[Labelled, Labelled]:
    from torchvision.datasets import Flowers102

    def read(*splits: str) -> Labelled:
        items = []
        for split in splits:  # with a loader that gives the path, for torchvision's tells of no broken file which it is
            dataset = _from_torchvision(Flowers102, root, download, split=split, loader=str)
            items += [dataset[i] for i in range(len(dataset))]
        paths, labels = zip(*items, strict=True)
        return Labelled(_read_images(paths, size, channels), _labels(labels))

    return read("train", "val"), read("test")


def _from_torchvision(kind: type, root: Path, download: bool, **options):
    """The torchvision dataset at ``root``: FileNotFoundError if it is not there, ValueError if it is not intact."""
    folder = root / {"CIFAR10": "cifar-10-batches-py", "Flowers102": "flowers-102"}[kind.__name__]
    advice = "pass --download to fetch it or --data-dir for where it lies"
    if not (download or folder.is_dir()):
        raise FileNotFoundError(f"no {kind.__name__}: {folder} is not a folder; {advice}")
    try:
        return kind(root, download=download, **options)
    except RuntimeError as error:  # torchvision says the same of a missing file and of a wrong checksum
        raise ValueError(f"{kind.__name__} is broken: a file in {folder} is missing or damaged; {advice}") from error


def image_folder(root: Path, size: int, channels: int) -> tuple[Labelled, Labelled]:
    """The class is the folder below ``root``, or below its train/ and test/: counted in the order of the names."""
    if not root.is_dir():
        raise FileNotFoundError(f"no images: {root} is not a folder; pass --data-dir for where the class folders lie")
    parts = image_files.parts(root)
    if parts is None:
        paths = _found(root, least=2).values()
        (labels,) = _class_labels({root: paths})
        return _apart(*_split(Labelled(_read_images([*paths], size, channels), labels), every=10))
    found = [_found(part, least=1) for part in parts]
    if both := [found[0][identity] for identity in found[0] if identity in found[1]]:
        number = "1 image is" if len(both) == 1 else f"{len(both)} images are"
        raise ValueError(f"{number} in both {parts[0]} and {parts[1]}, by a link: {both[0]}")
    labels = _class_labels({root: paths.values() for root, paths in zip(parts, found, strict=True)})
    train, held_out = (
        Labelled(_read_images([*paths.values()], size, channels), of) for paths, of in zip(found, labels, strict=True)
    )
    if copies := int(_copies(train.pixels, held_out.pixels).sum()):
        _tell(f"{copies} of {len(held_out.pixels)} held-out images equal a training image, pixel by pixel")
    return train, held_out


def _class_labels(found: dict[Path, Collection[str]]) -> list[Tensor]:
    """The class of each path, by the first folder below its root: one tensor a root. The classes of all are counted
    together, so that a folder of the same name is the same class below each."""
    names = [[os.path.relpath(path, root).split(os.sep)[0] for path in paths] for root, paths in found.items()]
    number = {name: i for i, name in enumerate(sorted({name for part in names for name in part}))}
    return [_labels([number[name] for name in part]) for part in names]


def _apart(train: Labelled, held_out: Labelled) -> tuple[Labelled, Labelled]:
    """Both, where the split is ours: held-out images of which there is a copy in training go there too."""
    copies = _copies(train.pixels, held_out.pixels)
    if copies.all():  # nothing would be held out
        _tell(f"all {len(copies)} held-out images equal a training image, pixel by pixel")
    elif copies.any():
        _tell(f"not held out: {int(copies.sum())} of the images, which have copies, pixel by pixel, in training")
        moved = held_out.at(copies)
        return Labelled(*(torch.cat(both) for both in zip(train, moved, strict=True))), held_out.at(~copies)
    return train, held_out


def _copies(train: Tensor, held_out: Tensor) -> Tensor:
    """Which held-out images equal a training image, pixel by pixel: (M,) bool."""

    def digests(images: Tensor) -> list[bytes]:
        return [hashlib.blake2b(image, digest_size=16).digest() for image in images.numpy()]

    known = set(digests(train))
    return torch.tensor([digest in known for digest in digests(held_out)])


def _tell(line: str) -> None:
    warnings.warn(line, stacklevel=3)


def _found(root: Path, least: int) -> dict[image_files.Identity, str]:
    """The images below ``root``'s class folders, by what tells files apart, in the order of their paths."""
    paths = image_files.find(root)
    if len(paths) < least:
        expected = f"{least} or more, in class folders, as {' '.join(image_files.EXTENSIONS)}"
        raise ValueError(f"{len(paths)} images in {root}: expected {expected}")
    return paths


def _read_images(paths: Sequence[str], size: int, channels: int) -> Tensor:
    return _channels_first(image_files.read(paths, size, channels))


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _labels(classes) -> Tensor:
    return torch.as_tensor(classes, dtype=torch.int64, device="cpu")


def _split(images: Labelled, every: int) -> tuple[Labelled, Labelled]:
    """Holds out every ``every``-th image, the first included."""
    held_out = torch.arange(len(images.labels), device="cpu") % every == 0
    return images.at(~held_out), images.at(held_out)


#: By the data set's name.
LOADERS: dict[str, Callable[..., tuple[Labelled, Labelled]]] = {
    "digits": digits,
    "image-folder": image_folder,
    "cifar10": cifar10,
    "flowers102": flowers102,
}


def options(name: str) -> tuple[str, ...]:
    """Which of root, size, channels and download the loader of a data set takes."""
    return tuple(inspect.signature(LOADERS[name]).parameters)
