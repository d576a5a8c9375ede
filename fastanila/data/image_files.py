"""Files of images: which of a folder's are taken, and what each shows as pixels.

A file is read as a viewer would show it, in 8 bits a channel: EXIF's orientation is followed, transparency is
composited on white, greys of more than 8 bits are scaled by the largest value that their bits can hold, colours of 16
bits keep the upper 8, CMYK and YCbCr become RGB by Pillow's formulas, of several frames the first is read. Colour
profiles are not applied. What has no stated black and white (floats, signed and 32-bit integers) is refused, as are
colours that Pillow shows in another way than viewers (LAB).
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # ImageFolder's

#: Folders that systems put beside images, with copies or thumbnails of them; names that begin with a dot go too.
_NOT_DATA = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN")

#: What a word of a folder's name, in any case, says of the images in it.
_SETS = {
    **dict.fromkeys(("train", "training"), "training"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation", "holdout"), "validation"),
}

#: Pillow's modes that are known without a look at the file: 8 bits a channel or fewer.
_PLAIN = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION, _PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 0x0112, 262, 258, 339  # tags of EXIF and TIFF

Identity = tuple[int, int]  #: device and inode: equal for all the paths that lead to one file


# ------------------------------------------------------------------------------------------------ which files there are


def parts(root: Path) -> tuple[Path, Path] | None:
    """(training, held-out) of a folder that holds both, None for one that holds neither.

    Training is train/ or training/; held out is test/ or testing/, and where that is missing val/, valid/, validation/,
    dev/, eval/, evaluation/ or holdout/. Both may have other words in common (train_images/ and val_images/). Raises
    ValueError where it is open which folders are meant.
    """
    names = [entry.name for entry in os.scandir(root) if _is_data(entry) and _is_folder(entry)]
    pairs = _pairs(names)
    if not pairs:
        if alone := [name for name in names if _SETS.get(name.lower(), "training") != "training"]:
            raise ValueError(
                f"{root} holds {alone[0]}/ but no train/: name the folder to train on train/, "
                f"or pass --data-dir {root / alone[0]} to train on that"
            )
        return None
    training, held_out = (sorted(name for pair in pairs for name in pair[i]) for i in range(2))
    for found in (training, held_out):
        if len(found) > 1:
            raise ValueError(f"{root} holds {' and '.join(f'{name}/' for name in found)}: expected one of them")
    return root / training[0], root / held_out[0]


def find(root: Path) -> dict[Identity, str]:
    """The images below ``root``'s class folders by identity, in the order of their paths; which class is of no use.

    What is reached twice, by symbolic or hard links, is there once, if it can be by a path without links; links to a
    folder that holds ``root`` are not followed; hidden files and folders are skipped. Raises ValueError for images
    that cannot be there: a link to nothing, or training and held-out images below a class folder.
    """
    seen = {_identity(folder.stat()) for folder in root.resolve().parents}
    found: dict[Identity, str] = {}
    plain, links = [str(root)], []
    while plain or links:  # links last: what is reached both ways then has the path that it has without them
        path = plain.pop() if plain else links.pop(0)
        status = _status(path)
        if _identity(status) in seen:
            continue
        seen.add(_identity(status))
        if not stat.S_ISDIR(status.st_mode):
            found[_identity(status)] = path
            continue
        inside = path != str(root)
        entries = [entry for entry in sorted(os.scandir(path), key=lambda entry: entry.name) if _is_data(entry)]
        folders = [entry for entry in entries if _is_folder(entry)]
        if inside:
            _refuse_parts(path, [entry.name for entry in folders])
        files = [entry for entry in entries if not _is_folder(entry)]
        images = [entry for entry in files if (inside and _is_image(entry.name)) or _leads_nowhere(entry)]
        for entry in reversed(folders + images):
            (links if entry.is_symlink() else plain).append(entry.path)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _is_data(entry: os.DirEntry) -> bool:
    return not entry.name.startswith(".") and entry.name not in _NOT_DATA


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _leads_nowhere(entry: os.DirEntry) -> bool:
    """Whether it may have been a folder: a link, by its name of no kind of file, to what is not there."""
    return entry.is_symlink() and not os.path.exists(entry.path) and not os.path.splitext(entry.name)[1]


def _pairs(names: Iterable[str]) -> list[tuple[list[str], list[str]]]:
    """The names of (training, held-out) folders, of each set of names with the same other words that has both."""
    families: dict = defaultdict(lambda: defaultdict(list))
    for name in names:
        words = re.findall("[a-z]+|[0-9]+", name.lower())
        kinds = [_SETS[word] for word in words if word in _SETS]
        if len(kinds) == 1:
            others = tuple(word for word in words if word not in _SETS)
            families[others][kinds[0]].append(name)
    pairs = [(family["training"], family["test"] or family["validation"]) for family in families.values()]
    return [pair for pair in pairs if all(pair)]


def _refuse_parts(folder: str, names: Sequence[str]) -> None:
    for training, held_out in _pairs(names):
        raise ValueError(
            f"{folder} holds {training[0]}/ and {held_out[0]}/, which would be read as one: pass --data-dir {folder}, "
            "or put them above the class folders"
        )


def _status(path: str) -> os.stat_result:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: the link leads nowhere ({error.strerror})") from error
    if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):  # to open a pipe would wait for ever
        raise ValueError(f"cannot read the image {path}: it is no regular file")
    return status


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


# --------------------------------------------------------------------------------------------------- what a file shows


def read(paths: Sequence[str], size: int, channels: int) -> np.ndarray:
    """(N, size, size, channels) uint8: the shorter side resized to ``size``, the longer cropped about its centre.

    ``channels`` is 3 for RGB or 1 for grey. Warns of files that hold several frames; raises ValueError, naming the
    file, for one that cannot be read or is not understood.
    """
    pixels, several = np.empty((len(paths), size, size, channels), np.uint8), []
    for row, path in zip(pixels, paths, strict=True):  # one by one: threads wait for Python's lock, and take longer
        image, frames = _read(path)
        row[:] = _cropped(image.convert("RGB" if channels == 3 else "L"), size).reshape(row.shape)
        if frames:
            several.append(path)
    if several:
        number = "1 image holds" if len(several) == 1 else f"{len(several)} images hold"
        warnings.warn(f"{number} several frames, of which the first is read: {several[0]}", stacklevel=2)
    return pixels


def _read(path: str) -> tuple[Image.Image, bool]:
    """What the file shows, L or RGB, and whether it holds more frames than that."""
    from PIL import Image, UnidentifiedImageError

    try:
        # not by its name, for then Pillow maps a TIFF that is to be turned by a quarter with the wrong width
        with open(path, "rb") as stream, Image.open(stream) as file:
            # MPO is what cameras and telephones write: a JPEG with previews of itself behind it
            frames = bool(getattr(file, "is_animated", False)) and file.format != "MPO"
            return _shown(file), frames
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot read the image {path}: it is none, or of a kind that Pillow does not know") from error
    except Exception as error:  # whatever a decoder makes of broken bytes: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot read the image {path}: {error}") from error


def _cropped(image: Image.Image, size: int) -> np.ndarray:
    from PIL import Image

    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.asarray(image)


def _shown(file: Image.Image) -> Image.Image:
    """The file's picture in 8 bits, L or RGB: upright, and on white where it is transparent."""
    _refuse_unknown(file)
    key = _transparent_value(file)
    file.load()
    if file.mode in _PLAIN:
        image = file
        if key is not None:
            image.info["transparency"] = key
    else:
        image = _scaled_grey(file, key)
    if image.has_transparency_data:
        image = _on_white(image)
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return _upright(image, file)


def _refuse_unknown(file: Image.Image) -> None:
    signed = file.format == "TIFF" and 2 in file.tag_v2.get(_SAMPLE_FORMAT, ())  # read by Pillow as if it were not
    grey_16 = file.mode in _GREY_16 or (file.mode == "I" and file.format in ("PNG", "PPM"))
    if signed or not (file.mode in _PLAIN or grey_16):
        raise ValueError(
            f"a {file.format} of {'signed integers' if signed else f'mode {file.mode}'} is not understood; expected "
            "unsigned integers of at most 16 bits: grey, a palette, RGB, CMYK or YCbCr, with or without transparency"
        )


def _transparent_value(file: Image.Image) -> int | bytes | tuple[int, ...] | None:
    """The value, or for a palette the alphas, that a file without an alpha channel declares transparent.

    In units of the pixels that Pillow gives: a PNG has it in those of its samples, of 1 to 16 bits.
    """
    key = file.info.get("transparency")
    if key is None or file.format != "PNG" or not file.tile:
        return key
    samples = file.tile[0][3]  # Pillow's name for what the file holds, such as "L;4"
    if samples in ("L;2", "L;4"):
        return key * {"L;2": 85, "L;4": 17}[samples]
    if samples == "RGB;16B":
        return tuple(value >> 8 for value in key)  # as Pillow reads the colours
    return key


def _scaled_grey(file: Image.Image, key: int | None) -> Image.Image:
    """Greys of 9 to 16 bits in 8, L, or LA where ``key`` is transparent."""
    from PIL import Image

    values, white = np.asarray(file).astype(np.float64), 65535
    if file.format == "TIFF":
        white = 2 ** file.tag_v2[_BITS][0] - 1
        if file.tag_v2.get(_PHOTOMETRIC) == 0:  # white is zero: Pillow minds that of 8 bits only
            values = white - values
    image = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if key is not None:
        image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return image


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "La":  # which Pillow takes to LA only
        image = image.convert("LA")
    image = image.convert("RGBA")
    ground = Image.new("RGB", image.size, "white")
    ground.paste(image, mask=image.getchannel("A"))
    return ground


def _upright(image: Image.Image, file: Image.Image) -> Image.Image:
    """The image as its file's EXIF says that it is to be turned; a block that cannot be read says nothing."""
    from PIL.Image import Transpose

    if not any("exif" in str(key).lower() or "xmp" in str(key).lower() for key in file.info):
        return image  # as all but photographs; a TIFF, whose tags are no such block, Pillow has turned on loading it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = file.getexif().get(_ORIENTATION, 1)
    except Exception:  # SyntaxError, struct.error, ...: viewers show such a file as it lies
        orientation = 1
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image
