"""fastanila.data.image_files: a file's pixels are what viewers show, or it is refused; a folder's images, each once."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastanila.data import image_files

# ----------------------------------------------------------------------------------------------------------------------
# Files, written by hand where Pillow would choose for us


def png(path: Path, depth: int, colour: int, samples, **chunks: bytes) -> str:
    """A PNG whose rows are all ``samples``; depth: bits of a sample, colour: the format's number of the kind."""
    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    row = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    width = len(samples) // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    blocks = {"IHDR": struct.pack(">IIBBBBB", width, width, depth, colour, 0, 0, 0)} | chunks
    blocks |= {"IDAT": zlib.compress((b"\0" + row) * width), "IEND": b""}
    content = b"\x89PNG\r\n\x1a\n"
    for name, block in blocks.items():
        named = name.encode() + block
        content += struct.pack(">I", len(block)) + named + struct.pack(">I", zlib.crc32(named))
    path.write_bytes(content)
    return str(path)


def tiff(path: Path, values: bytes, bits: int, photometric: int = 1, sample_format: int = 1) -> str:
    """A grey TIFF of 4 x 4 pixels. photometric: 0 if white is zero; sample_format: 1 unsigned, 2 signed, 3 float."""
    tags = [(256, 4), (257, 4), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, 4)]
    tags += [(279, len(values)), (339, sample_format)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, start if tag == 273 else value, 0) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + values)
    return str(path)


def row(path: str | Path, channels: int = 3) -> list:
    """The first row of a file of 4 x 4 pixels: greys, or colours where they are."""
    pixels = image_files.read([str(path)], 4, channels)[0, 0]
    return pixels[:, 0].tolist() if (pixels == pixels[:, :1]).all() else pixels.tolist()


RAMP = np.array([0, 21845, 43690, 65535])  # thirds of 16 bits
THIRDS = [0, 85, 170, 255]


@pytest.mark.parametrize("channels", (1, 3))
def test_greys_of_16_bits_are_scaled(tmp_path, channels):
    rows = np.tile(RAMP, (4, 1))
    for name, kind in (("a.tif", "<u2"), ("b.tif", ">u2"), ("c.png", "<u2"), ("d.pgm", "<u2")):
        Image.fromarray(rows.astype(kind)).save(tmp_path / name)
        assert row(tmp_path / name, channels) == THIRDS
    every = np.arange(65536, dtype="<u2").reshape(256, 256)
    Image.fromarray(every).save(tmp_path / "all.png")
    found = image_files.read([str(tmp_path / "all.png")], 256, 1)[0, :, :, 0]
    np.testing.assert_array_equal(found, np.rint(every / 257))


def test_greys_of_other_bits_are_scaled_by_their_largest(tmp_path):
    assert row(png(tmp_path / "1.png", 1, 0, [0, 1, 1, 0])) == [0, 255, 255, 0]
    assert row(png(tmp_path / "2.png", 2, 0, [0, 1, 2, 3])) == THIRDS
    assert row(png(tmp_path / "4.png", 4, 0, [0, 5, 10, 15])) == THIRDS
    packed = sum(value << 12 * (3 - i) for i, value in enumerate((0, 1365, 2730, 4095))).to_bytes(6, "big")
    assert row(tiff(tmp_path / "12.tif", packed * 4, 12)) == THIRDS
    for top in (100, 1000, 4095):
        samples = np.array([0, top // 5, top // 2, top])
        content = np.tile(samples, 4).astype("u1" if top < 256 else ">u2").tobytes()
        (tmp_path / "x.pgm").write_bytes(f"P5 4 4 {top}\n".encode() + content)
        np.testing.assert_allclose(row(tmp_path / "x.pgm"), samples * 255 / top, atol=1)


def test_white_may_be_zero(tmp_path):
    assert row(tiff(tmp_path / "8.tif", bytes([0, 85, 170, 255] * 4), 8, photometric=0)) == THIRDS[::-1]
    assert row(tiff(tmp_path / "16.tif", np.tile(RAMP, 4).astype("<u2").tobytes(), 16, photometric=0)) == THIRDS[::-1]


def test_colours_of_16_bits_keep_the_upper_8(tmp_path):
    assert row(png(tmp_path / "c.png", 16, 2, np.repeat(RAMP, 3))) == THIRDS
    content = np.tile(np.repeat(RAMP, 3), 4).astype(">u2").tobytes()
    (tmp_path / "c.ppm").write_bytes(b"P6 4 4 65535\n" + content)
    assert row(tmp_path / "c.ppm") == THIRDS


@pytest.mark.parametrize(
    "content, bits, sample_format, told",
    [
        (np.linspace(0, 1, 16).astype("<f4"), 32, 3, "a TIFF of mode F is not understood"),
        (np.arange(16).astype("<u4"), 32, 1, "a TIFF of mode I is not understood"),
        (np.arange(16).astype("<i4"), 32, 2, "a TIFF of signed integers is not understood"),
        (np.arange(-8, 8).astype("<i2"), 16, 2, "a TIFF of signed integers is not understood"),
        (np.arange(-8, 8).astype("i1"), 8, 2, "a TIFF of signed integers is not understood"),
    ],
)
def test_what_has_no_stated_black_and_white_is_refused(tmp_path, content, bits, sample_format, told):
    path = tiff(tmp_path / "x.tif", content.tobytes(), bits, sample_format=sample_format)
    with pytest.raises(ValueError) as error:
        image_files.read([path], 4, 3)
    assert f"cannot read the image {path}: {told}" in str(error.value) and "at most 16 bits" in str(error.value)


def test_lab_is_refused(tmp_path):
    Image.new("RGB", (4, 4), "red").convert("LAB").save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="a TIFF of mode LAB is not understood"):
        image_files.read([str(tmp_path / "x.tif")], 4, 3)


def test_transparency_is_composited_on_white(tmp_path):
    """Each kind of it: black, whose alpha is 255, 128, 0, and something that is seen."""
    grey, colour = [0, 255, 0, 128, 0, 0, 40, 255], [0, 0, 0, 255, 0, 0, 0, 128, 0, 0, 0, 0, 40, 40, 40, 255]
    expected = [0, 127, 255, 40]
    assert row(png(tmp_path / "la.png", 8, 4, grey)) == expected
    assert row(png(tmp_path / "la16.png", 16, 4, [257 * v for v in grey])) == expected
    assert row(png(tmp_path / "rgba.png", 8, 6, colour)) == expected
    assert row(png(tmp_path / "rgba16.png", 16, 6, [257 * v for v in colour])) == expected
    palette = dict(PLTE=bytes([0] * 9 + [40] * 3), tRNS=bytes([255, 128, 0]))
    assert row(png(tmp_path / "p.png", 8, 3, range(4), **palette)) == expected
    assert row(png(tmp_path / "p2.png", 2, 3, range(4), **palette)) == expected
    pixels = np.array(colour, np.uint8).reshape(1, 4, 4).repeat(4, 0)
    for name, options in (("x.webp", {"lossless": True, "exact": True}), ("x.tif", {})):
        Image.fromarray(pixels).save(tmp_path / name, **options)
        assert row(tmp_path / name) == expected
    value, alpha = (Image.fromarray(np.tile(np.array(grey[i::2], np.uint8), (4, 1))) for i in range(2))
    indexed = value.convert("P")
    indexed.putalpha(alpha)
    assert indexed.mode == "PA"
    indexed.save(tmp_path / "pa.tif")
    assert row(tmp_path / "pa.tif") == expected
    red = png(tmp_path / "red.png", 8, 6, [255, 0, 0, 51] * 4)
    assert row(red) == [[255, 204, 204]] * 4


@pytest.mark.parametrize("depth", (1, 2, 4, 8, 16))
def test_a_value_that_is_transparent_is_white(tmp_path, depth):
    """PNG's tRNS is in units of the samples, of which Pillow gives scaled ones."""
    top, key = 2**depth - 1, (1 << depth) // 3
    samples = [0, key, key + 1, top] if depth > 1 else [0, 1, 1, 0]
    expected = [255 if sample == key else round(255 * sample / top) for sample in samples]
    assert row(png(tmp_path / "x.png", depth, 0, samples, tRNS=struct.pack(">H", key))) == expected


def test_a_colour_that_is_transparent_is_white(tmp_path):
    eight = [0, 0, 0, 9, 8, 7, 9, 9, 7, 200, 200, 200]
    expected = [[0] * 3, [255] * 3, [9, 9, 7], [200] * 3]
    assert row(png(tmp_path / "8.png", 8, 2, eight, tRNS=struct.pack(">HHH", 9, 8, 7))) == expected
    key = struct.pack(">HHH", *(257 * v for v in (9, 8, 7)))
    assert row(png(tmp_path / "16.png", 16, 2, [257 * v for v in eight], tRNS=key)) == expected


def test_other_colours_are_converted(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for mode, tolerance in (("CMYK", 0), ("YCbCr", 3)):
        image.convert(mode).save(tmp_path / "x.tif")
        found = image_files.read([str(tmp_path / "x.tif")], 4, 3)[0]
        np.testing.assert_allclose(found.astype(int), pixels, atol=tolerance)
    luma = image_files.read([str(tmp_path / "x.tif")], 4, 1)[0, :, :, 0]
    np.testing.assert_allclose(luma, pixels @ [0.299, 0.587, 0.114], atol=3)


@pytest.mark.parametrize("kind", ("jpg", "png", "webp", "tif"))
def test_orientation_is_followed(tmp_path, kind):
    """Every orientation of EXIF shows the same picture, which is stored turned; on one that is not square."""
    upright = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6).repeat(8, 0).repeat(8, 1)
    stored = {  # where the picture's top and left lie in the file, by EXIF's definition
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{kind}"
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif, quality=100)
        found = image_files.read([str(path)], 32, 1)[0, :, :, 0]
        np.testing.assert_allclose(found.astype(int), upright[:, 8:40], atol=6)


def test_an_exif_block_that_cannot_be_read_says_nothing(tmp_path):
    content = io.BytesIO()
    Image.new("L", (4, 4), 99).save(content, "JPEG", exif=b"Exif\0\0no tags at all")
    (tmp_path / "x.jpg").write_bytes(content.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert row(tmp_path / "x.jpg") == [99] * 4


@pytest.mark.parametrize("kind", ("png", "webp", "tif", "gif"))
def test_of_several_frames_the_first_is_read_and_it_is_told(tmp_path, kind):
    frames = [Image.new("L", (4, 4), value) for value in (51, 204)]
    frames[0].save(tmp_path / f"x.{kind}", save_all=True, append_images=frames[1:])
    path = (tmp_path / f"x.{kind}").rename(tmp_path / "x.png")  # of which many are a GIF
    with pytest.warns(UserWarning, match=r"1 image holds several frames, of which the first is read: .*x\.png"):
        assert row(path) == [51] * 4


def test_the_previews_of_a_photograph_are_not_told(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (51, 204)]
    frames[0].save(tmp_path / "x.mpo", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert row((tmp_path / "x.mpo").rename(tmp_path / "x.jpg")) == [51] * 4


@pytest.mark.parametrize("kind", ("png", "jpg", "webp", "tif", "bmp", "ppm"))
def test_a_file_that_was_cut_short_is_named(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = tmp_path / f"x.{kind}"
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    for share in (0, 0.1, 0.5, 0.95):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=f"cannot read the image .*x.{kind}: "):
            image_files.read([str(path)], 8, 3)
    path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match=f"cannot read the image .*x.{kind}: it is none, or of a kind"):
        image_files.read([str(path)], 8, 3)


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def found(root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in image_files.find(root).values()]


def test_hidden_files_and_what_systems_leave_are_skipped(tmp_path):
    files(tmp_path, "a/0.png", "a/b/1.JPG", "stray.png", "a/notes.txt")
    files(tmp_path, "a/._0.png", "a/.ipynb_checkpoints/0-checkpoint.png", ".hidden/0.png", "__MACOSX/a/0.png")
    files(tmp_path, "a/@eaDir/0.png/thumb.jpg", "a/.DS_Store", "a/Thumbs.db", "$RECYCLE.BIN/0.png")
    assert found(tmp_path) == ["a/0.png", "a/b/1.JPG"]
    files(tmp_path, ".cache/set/a/0.png")
    assert found(tmp_path / ".cache" / "set") == ["a/0.png"]  # what is asked for may be hidden


def test_what_is_reached_twice_counts_once(tmp_path):
    root = tmp_path / "root"
    files(root, "b/0.png", "b/1.png", "c/deep/2.png")
    before = found(root)
    assert before == ["b/0.png", "b/1.png", "c/deep/2.png"]
    (root / "a").mkdir()
    for link, target in {
        "b/here": ".",
        "b/up": "..",
        "a/two-up": "../..",
        "c/all": str(root),
        "c/deep/sky": "/",
        "a/class": "../b",
        "a/0.png": "../b/0.png",
        "z": "c/deep",
    }.items():
        (root / link).symlink_to(target)
    os.link(root / "b" / "1.png", root / "c" / "again.png")
    files(tmp_path, "beside/x.png")  # below the folder that a/two-up leads to
    assert found(root) == before


def test_links_to_other_places_are_followed(tmp_path):
    files(tmp_path, "store/0.png", "store/1.png", "elsewhere/2.png")
    (tmp_path / "root" / "b").mkdir(parents=True)
    (tmp_path / "root" / "a").symlink_to("../store")
    (tmp_path / "root" / "b" / "x.png").symlink_to("../../elsewhere/2.png")
    assert found(tmp_path / "root") == ["a/0.png", "a/1.png", "b/x.png"]
    (tmp_path / "link").symlink_to("root")
    assert found(tmp_path / "link") == ["a/0.png", "a/1.png", "b/x.png"]


@pytest.mark.parametrize("target", ("nowhere.png", "x.png"))
def test_a_link_to_nothing_is_named(tmp_path, target):
    files(tmp_path, "a/0.png")
    (tmp_path / "a" / "x.png").symlink_to(target)
    with pytest.raises(ValueError, match=r"cannot read .*a.x\.png: the link leads nowhere"):
        image_files.find(tmp_path)


def test_a_class_that_is_a_link_to_nothing_is_named(tmp_path):
    files(tmp_path, "a/0.png")
    (tmp_path / "README.txt").symlink_to("nowhere")
    assert found(tmp_path) == ["a/0.png"]
    (tmp_path / "b").symlink_to("not-mounted")
    with pytest.raises(ValueError, match=r"cannot read .*b: the link leads nowhere"):
        image_files.find(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_not_waited_for(tmp_path):
    files(tmp_path, "a/0.png")
    os.mkfifo(tmp_path / "a" / "x.png")
    with pytest.raises(ValueError, match=r"cannot read the image .*a.x\.png: it is no regular file"):
        image_files.find(tmp_path)
