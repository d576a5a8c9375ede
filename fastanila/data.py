"""What a model learns from: densities on the plane and images, both drawn by update from the noise stream.

A draw is a function of (seed, step, row) and of nothing else: there is no loader, no worker and no shuffling order to
save. Row i of a draw with ``offset=o`` is row o + i of the whole draw, so a batch may be shared out over machines;
``purpose`` is "train", "start" (where chains start) or "held-out", which draw from streams of their own, the last,
for images, from a set that training never sees. Draws trace under
``torch.compile(fullgraph=True)`` with ``seed`` and ``step`` as 0-dim int64 tensors on the draw's device.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastanila import image_files, noise
from fastanila.config import IMAGES
from fastanila.exact import Modes
from fastanila.noise import Stream

#: what a draw is for -> the streams of its uniforms (or indices) and of its normals
_STREAMS = {
    "train": (Stream.DATA, Stream.DATA_NORMALS),
    "start": (Stream.START_DATA, Stream.START_DATA_NORMALS),
    "held-out": (Stream.EVALUATION, Stream.EVALUATION_NORMALS),
}


@dataclass(frozen=True)
class Density:
    """A probability density on the plane: draws of it, and its value where that is known."""

    name: str
    box: tuple[float, float]  #: the square [low, high]^2 outside which less than 1e-8 of the mass lies
    #: Turns uniforms (N, 3) on (0, 1] and standard normals (N, 2) into points (N, 2): the first uniform chooses the
    #: part of the density, the others the place in it, and the normals blur it.
    points: Callable[[Tensor, Tensor], Tensor]
    #: The natural logarithm of the normalised density, (N, 2) -> (N,) of the same dtype; None where it is not known.
    log_density: Callable[[Tensor], Tensor] | None = None
    entropy: float | None = None  #: in nats, where it has a closed form
    modes: Modes | None = None  #: where they are well apart
    fingerprint = None  #: of `Images`; a density needs none, since its draws follow from its name

    @property
    def shape(self) -> tuple[int]:
        return (2,)

    def draw(
        self, count: int, *, seed: int | Tensor, step: int | Tensor, purpose="train", offset: int = 0, device=None
    ) -> Tensor:
        """Points (count, 2), float32, on ``device``."""
        which, blur = _STREAMS[purpose]
        uniforms = noise.uniform((count, 3), seed=seed, step=step, stream=which, offset=offset, device=device)
        normals = noise.normal((count, 2), seed=seed, step=step, stream=blur, offset=offset, device=device)
        return self.points(uniforms, normals)


@dataclass(frozen=True, eq=False)
class Images:
    """Images held in memory as uint8, all on one device, and drawn with replacement as floats in [-1, 1]."""

    name: str
    train: Tensor  #: uint8 (N, C, H, W)
    held_out: Tensor  #: uint8 (M, C, H, W)
    box: tuple[float, float] = (-1.0, 1.0)

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
        return replace(self, train=self.train.to(device), held_out=self.held_out.to(device))

    def draw(
        self, count: int, *, seed: int | Tensor, step: int | Tensor, purpose="train", offset: int = 0, device=None
    ) -> Tensor:
        """Images (count, C, H, W), float32, x / 127.5 - 1; picked where the images lie, then moved to ``device``."""
        images, (stream, _) = self.held_out if purpose == "held-out" else self.train, _STREAMS[purpose]
        rows = noise.integers(
            len(images), (count,), seed=seed, step=step, stream=stream, offset=offset, device=images.device
        )
        # A GPU divides by a constant through its reciprocal, so write the product and get the same bits everywhere.
        drawn = (images[rows].to(torch.float32) - 127.5) * (1 / 127.5)
        return drawn if device is None else drawn.to(device)


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
# Densities on the plane. Their shapes are those of FFJORD's toy data (Grathwohl et al., 2019, lib/toy_data.py) unless
# a comment says otherwise. Nothing here looks a table up, so a draw can be captured in a CUDA graph.


def _pick(uniform: Tensor, parts: int) -> Tensor:
    """Which of ``parts`` equally likely parts: integers below ``parts``, as floats. A uniform may be 1."""
    return (uniform * parts).floor().clamp(max=parts - 1)


def _polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)


def _log_mixture(x: Tensor, centres: Tensor, weights: Tensor, sd: float) -> Tensor:
    """log sum_m weights_m N(x; centres_m, sd^2 I) for x (N, 2), centres (M, 2) and weights (M,)."""
    logs = []
    for part in x.split(1 << 12):  # bounds the memory that N * M terms take
        squares = (part[:, :1] - centres[:, 0]).square() + (part[:, 1:] - centres[:, 1]).square()
        logs.append(torch.logsumexp(weights.log() - squares / (2 * sd**2), dim=1))
    return torch.cat(logs) - math.log(2 * math.pi * sd**2)


def _gaussians(name: str, centre: Callable[[Tensor], Tensor], parts: int, sd: float) -> Density:
    """Equally likely Gaussians about ``centre`` of 0 to parts - 1, (M,) -> (M, 2)."""

    def points(u: Tensor, n: Tensor) -> Tensor:
        return centre(_pick(u[:, 0], parts)) + sd * n

    def log_density(x: Tensor) -> Tensor:
        part = torch.arange(parts, dtype=x.dtype, device=x.device)
        return _log_mixture(x, centre(part), torch.full_like(part, 1 / parts), sd)

    return Density(name, (-5.0, 5.0), points, log_density, modes=Modes(centre(torch.arange(parts).float()), sd))


def _circle(part: Tensor) -> Tensor:
    return _polar(4 / math.sqrt(2), part * (math.pi / 4))


def _grid(part: Tensor) -> Tensor:
    row = torch.floor((part + 0.5) / 5)  # half a part off the edge, lest a rounded quotient fall short of it
    return 2 * torch.stack([row - 2, part - 5 * row - 2], dim=-1)


def _around_curve(name: str, curve: Callable[[Tensor, Tensor], Tensor], parts: int, sd: float) -> Density:
    """Points of ``curve``, (part (M,), u (M,)) -> (M, 2), at an equally likely part and a uniform u, plus N(0, sd^2 I).

    A Gaussian is so smooth that 320 nodes of Gauss and Legendre's rule for the integral over u are exact to 1e-10.
    """

    def points(u: Tensor, n: Tensor) -> Tensor:
        return curve(_pick(u[:, 0], parts), u[:, 1]) + sd * n

    def log_density(x: Tensor) -> Tensor:
        u, weights = (torch.as_tensor(values, dtype=x.dtype, device=x.device) for values in _unit_rule(320 // parts))
        centres = torch.cat([curve(torch.full_like(u, part), u) for part in range(parts)])
        return _log_mixture(x, centres, weights.repeat(parts) / parts, sd)

    return Density(name, (-4.5, 4.5), points, log_density)


@cache
def _unit_rule(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss and Legendre's rule on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (nodes + 1) / 2, weights / 2


def _moons(part: Tensor, u: Tensor) -> Tensor:
    # scikit-learn's moons, times 2 and moved by (-1, -0.2): each is the other, turned about (0, 0.3)
    sign, angle = 1 - 2 * part, math.pi * u
    return torch.stack([sign * (2 * torch.cos(angle) - 1), sign * (2 * torch.sin(angle) - 0.5) + 0.3], dim=-1)


def _roll(part: Tensor, u: Tensor) -> Tensor:
    angle = 1.5 * math.pi * (1 + 2 * u)  # scikit-learn's Swiss roll, over 5
    return _polar(angle / 5, angle)


# Four rings (ebm-anatomy's and STANLEY's toy): an equally likely radius of 1 to 4, blurred, at a uniform angle.
_RINGS, _RING_SD = 4, 0.15


def _ring_points(u: Tensor, n: Tensor) -> Tensor:
    return _polar(1 + _pick(u[:, 0], _RINGS) + _RING_SD * n[:, 0], 2 * math.pi * u[:, 1])


def _ring_log_density(x: Tensor) -> Tensor:
    # The density has a pole at the origin, near which there is no mass: hold it at its value at radius 0.001. (A
    # blurred radius below zero, one draw in 1e11, is left out too.)
    radius = torch.linalg.vector_norm(x, dim=1).clamp(min=1e-3)
    rings = torch.arange(1, _RINGS + 1, dtype=x.dtype, device=x.device)
    exponents = -0.5 * ((radius[:, None] - rings) / _RING_SD).square()
    scale = _RINGS * _RING_SD * math.sqrt(2 * math.pi)
    return torch.logsumexp(exponents, dim=1) - math.log(scale) - torch.log(2 * math.pi * radius)


def _pinwheel_points(u: Tensor, n: Tensor) -> Tensor:
    # five Gaussian blobs, long along the radius, every point turned the further the more it lies out
    along, across = 1 + 0.3 * n[:, 0], 0.1 * n[:, 1]
    angle = 2 * math.pi / 5 * _pick(u[:, 0], 5) + 0.25 * torch.exp(along)
    cos, sin = torch.cos(angle), torch.sin(angle)
    return 2 * torch.stack([along * cos + across * sin, across * cos - along * sin], dim=-1)


# A board of 4x4 squares of side 2 on [-4, 4]^2, uniform on the eight whose column and row are both even or both odd.
_BOARD_AREA = 32


def _board_points(u: Tensor, n: Tensor) -> Tensor:
    square = _pick(u[:, 0], 8)
    column = torch.floor(square / 2)
    row = 2 * (square % 2) + column % 2
    within = u[:, 1:].clamp(1e-6, 1 - 1e-6)  # so that rounding to float32 moves no point across an edge
    return 2 * (torch.stack([column, row], dim=-1) + within) - 4


def _board_log_density(x: Tensor) -> Tensor:
    column, row = torch.floor(x / 2).unbind(dim=1)
    inside = ((column + row) % 2 == 0) & (x >= -4).all(dim=1) & (x < 4).all(dim=1)
    return torch.where(inside, torch.full_like(column, -math.log(_BOARD_AREA)), -math.inf)


_DENSITIES = (
    Density("rings", (-5.0, 5.0), _ring_points, _ring_log_density),
    _gaussians("8gaussians", _circle, parts=8, sd=0.5 / math.sqrt(2)),
    # The grid that GANs are tried on (Gulrajani et al., 2017), with Gaussians three times as wide for their spacing:
    # between theirs there is so little mass that a sampler that moves in small steps all but never crosses.
    _gaussians("25gaussians", _grid, parts=25, sd=0.15),
    Density("pinwheel", (-6.0, 6.0), _pinwheel_points),
    _around_curve("two-moons", _moons, parts=2, sd=0.2),
    _around_curve("swiss-roll", _roll, parts=1, sd=0.2),
    Density("checkerboard", (-4.0, 4.0), _board_points, _board_log_density, entropy=math.log(_BOARD_AREA)),
)


# ----------------------------------------------------------------------------------------------------------------------
# Images. A loader returns (training, held-out) pixels, uint8 (N, C, H, W), on the CPU.


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    values = torch.from_numpy(load_digits().images)  # (1797, 8, 8), 0..16
    return _split((values * (255 / 16)).round().to(torch.uint8)[:, None], every=5)


def _cifar10(root: Path, download: bool) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import CIFAR10

    # CIFAR10 unpickles its files, and does so only after it has found the checksum of each to be right.
    sets = (_from_torchvision(CIFAR10, root, download, train=train) for train in (True, False))
    return tuple(_channels_first(dataset.data) for dataset in sets)


def _flowers102(root: Path, size: int, channels: int, download: bool) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import Flowers102

    def read(*splits: str) -> Tensor:
        paths = []
        for split in splits:  # with a loader that gives the path, for torchvision's tells of no broken file which it is
            dataset = _from_torchvision(Flowers102, root, download, split=split, loader=str)
            paths += [dataset[i][0] for i in range(len(dataset))]
        return _read_images(paths, size, channels)

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


def _image_folder(root: Path, size: int, channels: int) -> tuple[Tensor, Tensor]:
    if not root.is_dir():
        raise FileNotFoundError(f"no images: {root} is not a folder; pass --data-dir for where the class folders lie")
    parts = image_files.parts(root)
    if parts is None:
        return _apart(*_split(_read_images([*_found(root, least=2).values()], size, channels), every=10))
    train, held_out = (_found(part, least=1) for part in parts)
    if both := [train[identity] for identity in train if identity in held_out]:
        number = "1 image is" if len(both) == 1 else f"{len(both)} images are"
        raise ValueError(f"{number} in both {parts[0]} and {parts[1]}, by a link: {both[0]}")
    train, held_out = (_read_images([*part.values()], size, channels) for part in (train, held_out))
    if copies := int(_copies(train, held_out).sum()):
        _tell(f"{copies} of {len(held_out)} held-out images equal a training image, pixel by pixel")
    return train, held_out


def _apart(train: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
    """Both, where the split is ours: held-out images of which there is a copy in training go there too."""
    copies = _copies(train, held_out)
    if copies.all():  # nothing would be held out
        _tell(f"all {len(held_out)} held-out images equal a training image, pixel by pixel")
    elif copies.any():
        _tell(f"not held out: {int(copies.sum())} of the images, which have copies, pixel by pixel, in training")
        return torch.cat([train, held_out[copies]]), held_out[~copies]
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


def _split(images: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """Holds out every ``every``-th image, the first included."""
    held_out = torch.arange(len(images)) % every == 0
    return images[~held_out], images[held_out]


# ----------------------------------------------------------------------------------------------------------------------

NAMES = (*(density.name for density in _DENSITIES), *IMAGES)


def box_of(name: str) -> tuple[float, float]:
    """(low, high) of every element of the data called ``name``."""
    return next((density.box for density in _DENSITIES if density.name == name), Images.box)


def load(
    name: str, *, data_dir: str | Path | None = None, size: int = 32, channels: int = 3, download=False, device=None
) -> Density | Images:
    """The data called ``name``, one of `NAMES`; images lie on ``device``.

    ``data_dir`` is where image-folder, cifar10 and flowers102 look, the last two in "data" by default and with
    ``download`` to fetch what is not there; nothing else ever uses the network. ``size`` and ``channels`` (1 or 3)
    are what image-folder and flowers102 make of their files; digits are 1x8x8 and cifar10 is 3x32x32.

    An image-folder holds class folders, of which every tenth image is held out, or train/ beside test/ (or val/,
    valid/, validation/ where that is missing) with class folders in each: see `image_files.parts`, and
    `image_files` for which files are taken and what is made of 16 bits, transparency and orientation.

    Raises ValueError for an unknown name, a wrong option and data that cannot be read, FileNotFoundError for data that
    are not there.
    """
    if name not in NAMES:
        raise ValueError(f"data must be one of {', '.join(NAMES)}; got {name!r}")
    for density in _DENSITIES:
        if density.name == name:
            return density
    if size < 1 or channels not in (1, 3):
        raise ValueError(f"size must be at least 1 and channels 1 or 3, got size {size} and channels {channels}")
    if name == "cifar10" and (size, channels) != (32, 3):
        raise ValueError(f"cifar10 has size 32 and channels 3, got size {size} and channels {channels}")
    if name == "image-folder" and data_dir is None:
        raise ValueError("image-folder needs a folder: pass --data-dir for where the class folders lie")
    root = Path("data" if data_dir is None else data_dir)
    match name:
        case "digits":
            train, held_out = _digits()
        case "image-folder":
            train, held_out = _image_folder(root, size, channels)
        case "cifar10":
            train, held_out = _cifar10(root, download)
        case "flowers102":
            train, held_out = _flowers102(root, size, channels, download)
    return Images(name, train, held_out).to(device)
