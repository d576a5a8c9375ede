"""What there is to learn, by name."""

from __future__ import annotations

from pathlib import Path

from . import images
from .densities import DENSITIES, Density
from .images import Images

NAMES = (*(density.name for density in DENSITIES), *images.LOADERS)


def box_of(name: str) -> tuple[float, float]:
    """(low, high) of every element of the data called ``name``."""
    return next((density.box for density in DENSITIES if density.name == name), Images.box)


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
    for density in DENSITIES:
        if density.name == name:
            return density
    if size < 1 or channels not in (1, 3):
        raise ValueError(f"size must be at least 1 and channels 1 or 3, got size {size} and channels {channels}")
    if name == "cifar10" and (size, channels) != (32, 3):
        raise ValueError(f"cifar10 has size 32 and channels 3, got size {size} and channels {channels}")
    if name == "image-folder" and data_dir is None:
        raise ValueError("image-folder needs a folder: pass --data-dir for where the class folders lie")
    root = Path("data" if data_dir is None else data_dir)
    given = dict(root=root, size=size, channels=channels, download=download)
    train, held_out = images.LOADERS[name](**{option: given[option] for option in images.options(name)})
    sets = train.pixels, held_out.pixels
    return Images(name, *sets, train_labels=train.labels, held_out_labels=held_out.labels).to(device)
