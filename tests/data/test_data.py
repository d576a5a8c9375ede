"""fastanila.data: the densities integrate to 1 and their draws follow them; images come back as they went in."""

import dataclasses
import hashlib
import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import integrate, stats
from scipy.io import savemat

from fastanila import data, noise
from fastanila.data import images as images_data
from fastanila.noise import Stream

F64 = torch.float64
DENSITIES = ("rings", "8gaussians", "25gaussians", "pinwheel", "two-moons", "swiss-roll", "checkerboard")
KNOWN = tuple(name for name in DENSITIES if name != "pinwheel")
FALSE_ALARM = 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# Densities


@pytest.fixture(scope="module")
def cells():
    """The mass of each of 32 x 32 cells of a density's box, by 10 x 10 Gauss-Legendre points a cell; each made once."""
    made = {}

    def of(density: data.Density) -> np.ndarray:
        if density.name not in made:
            nodes, weights = np.polynomial.legendre.leggauss(10)
            low, high = density.box
            width = (high - low) / 32
            axis = low + width * (np.arange(32)[:, None] + (nodes + 1) / 2).reshape(-1)
            axis = torch.from_numpy(axis)
            values = density.log_density(torch.cartesian_prod(axis, axis)).exp().numpy().reshape(32, 10, 32, 10)
            made[density.name] = np.einsum("iajb,a,b->ij", values, weights, weights) * (width / 2) ** 2
        return made[density.name]

    return of


def p_value(density: data.Density, points: torch.Tensor, mass: np.ndarray) -> float:
    """Pearson's chi-square over the cells, those with less than 20 expected points put together; two-sided."""
    observed = np.histogramdd(points.double().numpy(), bins=32, range=[density.box] * 2)[0]
    expected = mass * len(points)
    small = expected < 20
    outside = max(len(points) - observed.sum(), 0.0)
    observed = np.append(observed[~small], observed[small].sum() + outside)
    expected = np.append(expected[~small], len(points) - expected[~small].sum())
    if expected[-1] < 20:  # too little is left for a cell of its own
        observed, expected = (np.append(v[:-2], v[-2:].sum()) for v in (observed, expected))
    statistic = ((observed - expected) ** 2 / expected).sum()
    law = stats.chi2(len(expected) - 1)
    return 2 * min(law.sf(statistic), law.cdf(statistic))


EXPECTED_STREAMS = {
    "train": [Stream.DATA, Stream.DATA_NORMALS],
    "start": [Stream.START_DATA, Stream.START_DATA_NORMALS],
    "held-out": [Stream.EVALUATION, Stream.EVALUATION_NORMALS],
}


@pytest.mark.parametrize("name", KNOWN)
def test_density_integrates_to_one_over_its_box(name, cells):
    assert cells(data.load(name)).sum() == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("purpose", ("train", "start", "held-out"))
@pytest.mark.parametrize("name", KNOWN)
def test_draws_follow_the_density(name, purpose, cells):
    density = data.load(name)
    points = density.draw(200_000, seed=1, step=0, purpose=purpose)
    assert p_value(density, points, cells(density)) > FALSE_ALARM


@pytest.mark.parametrize("name", KNOWN)
def test_the_test_of_the_draws_sees_a_small_error(name, cells):
    density = data.load(name)
    shifted = density.draw(200_000, seed=1, step=0) + torch.tensor([0.03, 0.0])
    assert p_value(density, shifted, cells(density)) < FALSE_ALARM
    blurred = dataclasses.replace(density, points=lambda u, n: density.points(u, 1.1 * n) + 0.02 * n)
    assert p_value(density, blurred.draw(200_000, seed=1, step=0), cells(density)) < FALSE_ALARM


@pytest.mark.parametrize("name", DENSITIES)
def test_draws_lie_in_the_box_and_have_finite_density(name):
    density = data.load(name)
    points = density.draw(100_000, seed=3, step=5)
    assert points.shape == (100_000, *density.shape) and points.dtype == torch.float32
    assert points.min() >= density.box[0] and points.max() <= density.box[1]
    if density.log_density is not None:
        assert density.log_density(points.double()).isfinite().all()
        assert density.log_density(points).isfinite().all()


@pytest.mark.parametrize("name", DENSITIES)
def test_a_slice_of_a_draw_is_the_draw_of_the_slice(name):
    density = data.load(name)
    whole = density.draw(50, seed=7, step=9)
    for offset, count in ((0, 50), (1, 49), (13, 6), (49, 1)):
        part = density.draw(count, seed=7, step=9, offset=offset)
        assert torch.equal(part, whole[offset : offset + count])


@pytest.mark.parametrize("name", DENSITIES)
def test_draws_depend_on_seed_step_and_set(name):
    density = data.load(name)
    draws = [
        density.draw(100, seed=seed, step=step, purpose=purpose)
        for seed, step, purpose in (
            *((0, 0, "train"), (1, 0, "train"), (0, 1, "train")),
            *((0, 0, "held-out"), (0, 0, "start")),
        )
    ]
    assert torch.equal(draws[0], density.draw(100, seed=torch.tensor(0), step=torch.tensor(0)))
    for i, one in enumerate(draws):
        assert not any(torch.isclose(one, other).any(dim=1).all() for other in draws[i + 1 :])


@pytest.mark.parametrize("purpose", ("train", "start", "held-out"))
def test_draws_use_the_streams_that_are_theirs(purpose, monkeypatch):
    used = []
    for kind in ("uniform", "normal", "integers"):
        original = getattr(noise, kind)

        def spy(*args, original=original, **options):
            used.append(options["stream"])
            return original(*args, **options)

        monkeypatch.setattr(noise, kind, spy)
    for name in DENSITIES:
        used.clear()
        data.load(name).draw(4, seed=0, step=0, purpose=purpose)
        assert used == EXPECTED_STREAMS[purpose]
    used.clear()
    data.load("digits").draw(4, seed=0, step=0, purpose=purpose)
    assert used == EXPECTED_STREAMS[purpose][:1]


def test_no_two_streams_share_a_number():
    assert len(Stream) == len({int(stream) for stream in Stream.__members__.values()}) == len(Stream.__members__)


@pytest.mark.parametrize("name", DENSITIES)
def test_draws_trace_with_tensor_seed_and_step(name):
    density = data.load(name)
    draw = torch.compile(lambda seed, step: density.draw(32, seed=seed, step=step), fullgraph=True, backend="eager")
    seed, step = torch.tensor(5), torch.tensor(1 << 40)
    assert torch.equal(draw(seed, step), density.draw(32, seed=seed, step=step))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_rings_compile_to_the_same_draws_without_recompiling(backend):
    density = data.load("rings")
    torch._dynamo.reset()
    draw = torch.compile(lambda seed, step: density.draw(32, seed=seed, step=step), fullgraph=True, backend=backend)
    for step in range(3):
        expected = density.draw(32, seed=5, step=step)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            actual = draw(torch.tensor(5), torch.tensor(step))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, curves, sd",
    (
        (
            "two-moons",
            (
                lambda t: (2 * math.cos(math.pi * t) - 1, 2 * math.sin(math.pi * t) - 0.2),
                lambda t: (1 - 2 * math.cos(math.pi * t), 0.8 - 2 * math.sin(math.pi * t)),
            ),
            0.2,
        ),
        (
            "swiss-roll",
            (
                lambda t: (
                    (0.3 + 0.6 * t) * math.pi * math.cos(math.pi * (1.5 + 3 * t)),
                    (0.3 + 0.6 * t) * math.pi * math.sin(math.pi * (1.5 + 3 * t)),
                ),
            ),
            0.2,
        ),
    ),
)
def test_the_density_around_a_curve_is_the_integral_along_it(name, curves, sd):
    density = data.load(name)
    points = torch.cat([density.draw(6, seed=0, step=0), torch.tensor([[0.0, 0.0], [-2.5, 1.0], [3.0, -2.0]])])

    def integral(x, y, curve):
        def integrand(t):
            a, b = curve(t)
            return math.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * sd**2)) / (2 * math.pi * sd**2)

        # in pieces, so that the adaptive rule finds the peaks
        return sum(integrate.quad(integrand, i / 40, (i + 1) / 40, epsabs=0, epsrel=1e-12)[0] for i in range(40))

    for (x, y), actual in zip(points.double().tolist(), density.log_density(points.double()).tolist(), strict=True):
        expected = sum(integral(x, y, curve) for curve in curves) / len(curves)
        assert actual == pytest.approx(math.log(expected), abs=1e-10)


def test_moons_and_roll_are_scikit_learns():
    from sklearn.datasets import make_moons, make_swiss_roll

    moons = make_moons(10_000, noise=None)[0] * 2 + [-1, -0.2]
    roll = make_swiss_roll(10_000, noise=0.0, random_state=0)[0][:, [0, 2]] / 5
    for name, curve in (("two-moons", moons), ("swiss-roll", roll)):
        points = data.load(name).points(noise.uniform((500, 3), seed=0, step=0, stream=0), torch.zeros(500, 2)).double()
        assert torch.cdist(points, torch.from_numpy(curve)).min(dim=1).values.max() < 0.05


def test_log_density_against_hand_computed_values():
    def at(name, *point):
        return data.load(name).log_density(torch.tensor([point], dtype=F64)).item()

    normaliser = math.log(2 * math.pi)
    neighbours = math.log1p(2 * math.exp(-0.5 * (2 * math.sqrt(8) * math.sin(math.pi / 8)) ** 2 * 8))
    assert at("8gaussians", math.sqrt(8), 0) == pytest.approx(-normaliser - math.log(8 / 8) + neighbours, abs=1e-9)
    assert at("25gaussians", -4, 2) == pytest.approx(-normaliser - math.log(25 * 0.15**2), abs=1e-12)
    peak = -math.log(4 * 0.15 * math.sqrt(2 * math.pi)) - math.log(2 * math.pi * 3)
    assert at("rings", 0, -3) == pytest.approx(peak, abs=1e-9)
    assert at("checkerboard", -3, -1) == -math.inf
    assert at("checkerboard", -3, -3) == at("checkerboard", 3, 3) == -math.log(32)
    assert at("checkerboard", -3, 5) == at("checkerboard", 5, 1) == -math.inf
    assert data.load("checkerboard").entropy == math.log(32)


def test_log_density_and_its_gradient_are_finite_at_the_pole_and_far_away():
    for name in KNOWN:
        x = torch.tensor([[0.0, 0.0], [40.0, -40.0]], dtype=F64, requires_grad=True)
        value = data.load(name).log_density(x)
        assert value.dtype == F64 and not value.isnan().any()
        if name != "checkerboard":
            assert value.isfinite().all()
            assert torch.autograd.grad(value.sum(), x)[0].isfinite().all()


def test_log_density_of_many_points_is_that_of_each():
    density = data.load("swiss-roll")
    points = density.draw((1 << 12) + 3, seed=0, step=0).double()
    torch.testing.assert_close(density.log_density(points)[-5:], density.log_density(points[-5:]), rtol=1e-12, atol=0)
    assert density.log_density(points[:0]).shape == (0,)


# ----------------------------------------------------------------------------------------------------------------------
# Images


def make_images(train: int = 40, held_out: int = 7) -> data.Images:
    pixels = torch.arange(train + held_out, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 5)
    return data.Images("made", pixels[:train].contiguous(), pixels[train:].contiguous())


def test_image_draws_are_the_pixels_scaled_exactly():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    images = data.Images("made", pixels, pixels)
    drawn = images.draw(3, seed=0, step=0)
    assert images.shape == (1, 16, 16) and drawn.shape == (3, 1, 16, 16) and drawn.dtype == torch.float32
    assert drawn.min() == -1 and drawn.max() == 1
    expected = (pixels.double() / 127.5 - 1).expand(3, -1, -1, -1)
    torch.testing.assert_close(drawn.double(), expected, rtol=0, atol=1.2e-7)
    assert torch.equal(((drawn + 1) * 127.5).round().to(torch.uint8), pixels.expand(3, -1, -1, -1))


def test_pixels_come_back_from_states():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    states = images_data.from_pixels(pixels)
    assert torch.equal(images_data.to_pixels(states), pixels)
    assert torch.equal(data.Images("made", pixels, pixels).draw(1, seed=0, step=0), states)
    assert torch.equal(images_data.to_pixels(3 * states + 1, (-2.0, 4.0)), pixels)
    beyond = torch.tensor([-7.0, 7.0, math.nan, -math.inf, math.inf])
    assert images_data.to_pixels(beyond).tolist() == [0, 255, 0, 0, 255]


def test_image_draws_are_sliced_repeated_and_held_out():
    images = make_images()
    whole = images.draw(50, seed=7, step=9)
    assert torch.equal(images.draw(6, seed=7, step=9, offset=13), whole[13:19])
    assert torch.equal(images.draw(50, seed=torch.tensor(7), step=torch.tensor(9)), whole)
    assert not torch.equal(images.draw(50, seed=7, step=10), whole)
    assert not torch.equal(images.draw(50, seed=8, step=9), whole)
    seen = ((images.draw(500, seed=7, step=9, purpose="held-out") + 1) * 127.5).round()
    assert set(seen.unique().tolist()) == set(range(40, 47))


def test_image_draws_cover_the_indices_evenly():
    images = make_images()
    index = ((images.draw(100_000, seed=2, step=0)[:, 0, 0, 0] + 1) * 127.5).round().long()
    counts = torch.bincount(index)
    assert len(counts) == 40
    law = stats.chi2(39)
    statistic = ((counts - 2500) ** 2 / 2500).sum().item()
    assert 2 * min(law.sf(statistic), law.cdf(statistic)) > FALSE_ALARM


def test_image_draws_trace_with_tensor_seed_and_step():
    images = make_images()
    draw = torch.compile(lambda seed, step: images.draw(8, seed=seed, step=step), fullgraph=True, backend="eager")
    assert torch.equal(draw(torch.tensor(5), torch.tensor(6)), images.draw(8, seed=5, step=6))


def test_images_move_to_a_device():
    moved = make_images().to("meta")
    assert moved.train.device.type == moved.held_out.device.type == "meta"
    assert data.load("digits", device="meta").train.device.type == "meta"


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    images = data.load("digits")
    source = load_digits().images
    assert images.shape == (1, 8, 8)
    assert images.train.shape == (1437, 1, 8, 8) and images.held_out.shape == (360, 1, 8, 8)
    assert images.train.dtype == torch.uint8
    np.testing.assert_array_equal(images.held_out[3, 0].numpy(), np.round(source[15] * 255 / 16))
    np.testing.assert_array_equal(images.train[0, 0].numpy(), np.round(source[1] * 255 / 16))
    classes = torch.from_numpy(load_digits().target).long()
    assert images.train_labels.dtype == images.held_out_labels.dtype == torch.int64
    assert torch.equal(images.held_out_labels, classes[::5])
    assert torch.equal(images.train_labels, classes[torch.arange(1797) % 5 > 0])
    moved = images.to("meta")
    assert moved.train_labels.device.type == moved.held_out_labels.device.type == "meta"


# ----------------------------------------------------------------------------------------------------------------------
# Folders of images


def save(path: Path, width: int, height: int, mode: str = "RGB", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze()).save(path)  # L, RGB or RGBA, by the channels
    return path


@pytest.fixture
def folder(tmp_path):
    """Twelve images of odd sizes, modes and kinds in two classes, one nested deeper, beside files that are none."""
    for i in range(10):
        save(tmp_path / "b" / f"{i}.png", 40 + i, 33 + 2 * i, seed=i)
    save(tmp_path / "a" / "deep" / "grey.PNG", 50, 20, mode="L")
    save(tmp_path / "a" / "alpha.webp", 20, 50, mode="RGBA")
    save(tmp_path / "stray.png", 32, 32)  # in no class
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    return tmp_path


def reference_pixels(path: Path, size: int, mode: str = "RGB") -> torch.Tensor:
    """The same by torchvision's transforms, on white where it is transparent."""
    from torchvision import transforms

    with Image.open(path) as file:
        pixels = np.asarray(file.convert("RGBA"), dtype=float)
    colour, alpha = pixels[..., :3], pixels[..., 3:] / 255
    image = Image.fromarray(np.rint(colour * alpha + 255 * (1 - alpha)).astype(np.uint8)).convert(mode)
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC, antialias=True)
    return transforms.PILToTensor()(transforms.CenterCrop(size)(resize(image)))


@pytest.mark.parametrize("channels, mode", ((3, "RGB"), (1, "L")))
def test_image_folder_reads_what_torchvision_would(folder, channels, mode):
    images = data.load("image-folder", data_dir=folder, size=16, channels=channels)
    paths = [folder / "a" / "alpha.webp", folder / "a" / "deep" / "grey.PNG"]
    paths += [folder / "b" / f"{i}.png" for i in range(10)]
    expected = torch.stack([reference_pixels(path, 16, mode) for path in paths])
    assert images.shape == (channels, 16, 16) and images.train.dtype == torch.uint8
    assert torch.equal(images.held_out, expected[[0, 10]])  # every tenth
    assert torch.equal(images.train, expected[[*range(1, 10), 11]])
    assert images.held_out_labels.tolist() == [0, 1]  # a and b; a/deep is a
    assert images.train_labels.tolist() == [0, *[1] * 9]


def test_image_folder_enlarges_small_images(folder):
    images = data.load("image-folder", data_dir=str(folder), size=64)
    assert images.shape == (3, 64, 64)


def test_image_folder_takes_train_and_test(tmp_path):
    for i in range(3):
        save(tmp_path / "train" / "x" / f"{i}.png", 8, 8, seed=i)
    save(tmp_path / "test" / "x" / "0.png", 8, 8, seed=9)
    images = data.load("image-folder", data_dir=tmp_path, size=8)
    assert len(images.train) == 3 and len(images.held_out) == 1
    assert torch.equal(images.held_out[0], reference_pixels(tmp_path / "test" / "x" / "0.png", 8))


def test_classes_are_the_folders_names_in_order_and_the_same_in_both_sets(tmp_path, monkeypatch):
    for i, name in enumerate(("train/b", "train/a", "train/c", "test/c", "test/a/deeper/still")):
        flat(tmp_path / name / "x.png", i)
    monkeypatch.chdir(tmp_path)
    images = data.load("image-folder", data_dir=".", size=4)
    assert greys(images.train) == [1, 0, 2] and images.train_labels.tolist() == [0, 1, 2]
    assert greys(images.held_out) == [4, 3] and images.held_out_labels.tolist() == [0, 2]
    assert images.train_labels.dtype == torch.int64
    flat(tmp_path / "test" / "aa" / "x.png", 9)  # a class that training lacks has a number of its own
    images = data.load("image-folder", data_dir=".", size=4)
    assert images.train_labels.tolist() == [0, 2, 3] and images.held_out_labels.tolist() == [0, 1, 3]


def test_a_broken_image_is_named(folder):
    broken = folder / "b" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cannot read the image .*b.3\.png"):
        data.load("image-folder", data_dir=folder)
    broken.write_bytes(b"no image at all")
    with pytest.raises(ValueError, match=r"cannot read the image .*b.3\.png"):
        data.load("image-folder", data_dir=folder)


def test_a_folder_without_enough_images_says_what_was_expected(tmp_path):
    save(tmp_path / "stray.png", 8, 8)
    with pytest.raises(ValueError, match=r"0 images in .*: expected 2 or more, in class folders, as \.jpg"):
        data.load("image-folder", data_dir=tmp_path)
    save(tmp_path / "a" / "one.png", 8, 8)
    with pytest.raises(ValueError, match="1 images in"):
        data.load("image-folder", data_dir=tmp_path)
    save(tmp_path / "train" / "a" / "one.png", 8, 8)
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match=r"0 images in .*test: expected 1 or more"):
        data.load("image-folder", data_dir=tmp_path)


def flat(path: Path, value: int, size: int = 4) -> None:
    """An image of one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), value).save(path)


def greys(images: torch.Tensor) -> list[int]:
    """What grey each of the images made by `flat` is."""
    return images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    "train, held_out",
    [
        *[("train", "val"), ("train", "valid"), ("train", "validation"), ("Training", "Testing"), ("TRAIN", "test")],
        *[("train", "dev"), ("train_images", "val_images"), ("seg_train", "seg_test"), ("train2017", "val2017")],
    ],
)
def test_images_for_validation_are_not_trained_on(tmp_path, train, held_out):
    for i in range(12):
        flat(tmp_path / train / "a" / f"{i}.png", i)
        flat(tmp_path / held_out / "a" / f"{i}.png", 100 + i)
    images = data.load("image-folder", data_dir=tmp_path, size=4)
    assert sorted(greys(images.train)) == list(range(12))
    assert sorted(greys(images.held_out)) == list(range(100, 112))


def test_where_there_is_a_test_set_validation_is_left_alone(tmp_path):
    for i, name in enumerate(("train", "val", "test")):
        flat(tmp_path / name / "a" / "x.png", i)
    images = data.load("image-folder", data_dir=tmp_path, size=4)
    assert greys(images.train) == [0] and greys(images.held_out) == [2]


def test_sets_that_are_not_understood_are_refused(tmp_path):
    def refusal(*names: str) -> str:
        root = tmp_path / "-".join(names).replace("/", "+")
        for name in names:
            flat(root / name / "x.png", 0)
        with pytest.raises(ValueError) as error:
            data.load("image-folder", data_dir=root)
        return one_line(error).replace(str(root), "ROOT")

    assert refusal("val/a", "a/a") == (
        "ROOT holds val/ but no train/: name the folder to train on train/, "
        "or pass --data-dir ROOT/val to train on that"
    )
    assert refusal("train/a", "val/a", "valid/a") == "ROOT holds val/ and valid/: expected one of them"
    assert refusal("train/a", "training/a", "val/a") == "ROOT holds train/ and training/: expected one of them"
    below = "ROOT/set holds train/ and val/, which would be read as one: pass --data-dir ROOT/set, or put them above"
    assert refusal("set/train/a", "set/val/a").startswith(below)
    assert refusal("set/train", "set/val").startswith(below)  # each class in two sets


def test_a_class_may_be_called_train(tmp_path):
    for i, name in enumerate(("bus", "train", "bullet_train", "test_tube")):
        flat(tmp_path / name / "x.png", i)
    images = data.load("image-folder", data_dir=tmp_path, size=4)
    assert sorted(greys(images.train) + greys(images.held_out)) == [0, 1, 2, 3]


def test_an_image_in_both_sets_is_refused(tmp_path):
    flat(tmp_path / "train" / "a" / "x.png", 0)
    flat(tmp_path / "train" / "a" / "y.png", 1)
    flat(tmp_path / "test" / "a" / "z.png", 2)
    os.link(tmp_path / "train" / "a" / "y.png", tmp_path / "test" / "a" / "y.png")
    with pytest.raises(ValueError, match=r"1 image is in both .*train and .*test, by a link: .*train.a.y\.png"):
        data.load("image-folder", data_dir=tmp_path)
    (tmp_path / "val").symlink_to("train")  # for want of another set
    (tmp_path / "test").rename(tmp_path / "other")
    with pytest.raises(ValueError, match=r"2 images are in both .*train and .*val"):
        data.load("image-folder", data_dir=tmp_path)


def test_copies_of_an_image_stay_together(tmp_path):
    for i in range(21):
        kind = "b" if i == 20 else "a"
        flat(tmp_path / kind / f"{i:02d}.png", 13 if i == 10 else i)  # the eleventh, to be held out, is as one after it
    with pytest.warns(
        UserWarning, match="not held out: 1 of the images, which have copies, pixel by pixel, in training"
    ):
        images = data.load("image-folder", data_dir=tmp_path, size=4)
    assert greys(images.held_out) == [0, 20]
    assert sorted(greys(images.train)) == sorted([*range(1, 10), *range(11, 20), 13])
    assert images.held_out_labels.tolist() == [0, 1] and images.train_labels.tolist() == [0] * 19


def test_copies_that_are_held_out_are_told(tmp_path):
    for i in range(4):
        flat(tmp_path / "same" / "a" / f"{i}.png", 7)
        flat(tmp_path / "sets" / "train" / "a" / f"{i}.png", i)
        flat(tmp_path / "sets" / "test" / "a" / f"{i}.png", i + 3)
    with pytest.warns(UserWarning, match="all 1 held-out images equal a training image, pixel by pixel"):
        assert len(data.load("image-folder", data_dir=tmp_path / "same", size=4).held_out) == 1
    with pytest.warns(UserWarning, match="1 of 4 held-out images equal a training image, pixel by pixel"):
        assert greys(data.load("image-folder", data_dir=tmp_path / "sets", size=4).held_out) == [3, 4, 5, 6]


def test_a_fingerprint_tells_images_apart():
    images = make_images()
    same = make_images()
    assert images.fingerprint == same.fingerprint and images_data.changes(images.fingerprint, same.fingerprint) == []
    assert json.loads(json.dumps(images.fingerprint)) == images.fingerprint
    more, other = make_images(held_out=8), make_images()
    other.train[3, 1, 1, 4] += 1
    assert images_data.changes(images.fingerprint, more.fingerprint) == ["7 held-out images then, 8 now"]
    assert images_data.changes(images.fingerprint, other.fingerprint) == ["as many training images, but not the same"]
    assert (
        images_data.changes(None, images.fingerprint) == images_data.changes(None, data.load("rings").fingerprint) == []
    )


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_missing_folder_names_the_flag(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        data.load("image-folder", data_dir=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in one_line(error) and "--data-dir" in one_line(error)
    with pytest.raises(ValueError, match="--data-dir"):
        data.load("image-folder")


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'spiral'") as error:
        data.load("spiral")
    assert all(name in one_line(error) for name in data.NAMES)
    for options in ({"size": 0}, {"channels": 2}):
        with pytest.raises(ValueError, match="size must be at least 1 and channels 1 or 3"):
            data.load("image-folder", data_dir=tmp_path, **options)
    with pytest.raises(ValueError, match="cifar10 has size 32"):
        data.load("cifar10", size=64)


# ----------------------------------------------------------------------------------------------------------------------
# torchvision's data sets, from small fixtures in their formats on disk; checksums are the fixtures' and stay checked


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def offline(monkeypatch):
    """Fails the test at the first attempt to download."""

    def refuse(*args, **options):
        raise AssertionError(f"downloads {args}")

    for module in ("cifar", "flowers102", "utils"):
        for function in ("download_and_extract_archive", "download_url"):
            monkeypatch.setattr(f"torchvision.datasets.{module}.{function}", refuse, raising=False)
    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture
def photographs():
    """56 crops, 32 x 32, of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    return np.stack(
        [
            photo[64 * i : 64 * i + 32, 64 * j : 64 * j + 32]
            for photo in load_sample_images().images
            for i in range(4)
            for j in range(7)
        ]
    )


@pytest.fixture
def cifar10(tmp_path, monkeypatch, offline, photographs):
    """A CIFAR-10 of eight images a batch file; gives its pixels, (48, 32, 32, 3)."""
    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        rows = photographs[8 * i : 8 * i + 8].transpose(0, 3, 1, 2).reshape(8, 3072)
        entry = {"batch_label": name, "labels": [j % 10 for j in range(8)], "data": rows, "filenames": ["x.png"] * 8}
        (base / name).write_bytes(pickle.dumps(entry, protocol=2))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5(base / name)] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [[names[5], md5(base / names[5])]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(base / "batches.meta")})
    return photographs[:48]


def test_cifar10_reads_its_files(tmp_path, cifar10):
    images = data.load("cifar10", data_dir=tmp_path)
    expected = torch.from_numpy(cifar10).permute(0, 3, 1, 2)
    assert images.shape == (3, 32, 32)
    assert torch.equal(images.train, expected[:40]) and torch.equal(images.held_out, expected[40:])
    assert images.train.is_contiguous()
    assert images.train_labels.tolist() == [*range(8)] * 5 and images.held_out_labels.tolist() == [*range(8)]


@pytest.mark.parametrize("name", ("data_batch_2", "test_batch", "batches.meta"))
def test_cifar10_does_not_unpickle_a_file_whose_checksum_is_wrong(tmp_path, cifar10, name, monkeypatch):
    path = tmp_path / "cifar-10-batches-py" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    loaded = []
    original = pickle.load
    monkeypatch.setattr(pickle, "load", lambda file, **options: loaded.append(file.name) or original(file, **options))
    with pytest.raises(ValueError, match="missing or damaged") as error:
        data.load("cifar10", data_dir=tmp_path)
    assert "cifar-10-batches-py" in one_line(error) and "--download" in one_line(error)
    assert str(path) not in loaded
    path.unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        data.load("cifar10", data_dir=tmp_path)


@pytest.fixture
def flowers102(tmp_path, monkeypatch, offline, photographs):
    """A Flowers-102 of twelve pictures of odd sizes: 4 for training, 3 for validation, 5 for testing."""
    from torchvision.datasets import Flowers102

    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for i in range(12):
        picture = np.concatenate(photographs[3 * i : 3 * i + 3], axis=i % 2)
        Image.fromarray(picture).save(base / "jpg" / f"image_{i + 1:05d}.jpg")
    savemat(base / "imagelabels.mat", {"labels": np.arange(1, 13)[None]})
    splits = {"trnid": [[2, 1, 5, 6]], "valid": [[3, 9, 4]], "tstid": [[7, 8, 12, 11, 10]]}
    savemat(base / "setid.mat", {key: np.array(ids) for key, ids in splits.items()})
    table = {
        "image": Flowers102._file_dict["image"],
        "label": ("imagelabels.mat", md5(base / "imagelabels.mat")),
        "setid": ("setid.mat", md5(base / "setid.mat")),
    }
    monkeypatch.setattr(Flowers102, "_file_dict", table)
    return base


def test_flowers102_reads_its_files(tmp_path, flowers102):
    images = data.load("flowers102", data_dir=tmp_path, size=24)
    expected = [reference_pixels(flowers102 / "jpg" / f"image_{i:05d}.jpg", 24) for i in range(1, 13)]
    assert torch.equal(images.train, torch.stack([expected[i - 1] for i in (2, 1, 5, 6, 3, 9, 4)]))
    assert torch.equal(images.held_out, torch.stack([expected[i - 1] for i in (7, 8, 12, 11, 10)]))
    assert images.train_labels.tolist() == [1, 0, 4, 5, 2, 8, 3]  # the file counts classes from 1
    assert images.held_out_labels.tolist() == [6, 7, 11, 10, 9]


def test_flowers102_refuses_damaged_files(tmp_path, flowers102):
    picture = flowers102 / "jpg" / "image_00008.jpg"
    picture.write_bytes(picture.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"cannot read the image .*image_00008.jpg"):
        data.load("flowers102", data_dir=tmp_path)
    splits = flowers102 / "setid.mat"
    splits.write_bytes(splits.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="missing or damaged") as error:
        data.load("flowers102", data_dir=tmp_path)
    assert "flowers-102" in one_line(error)


@pytest.mark.parametrize("name, folder", (("cifar10", "cifar-10-batches-py"), ("flowers102", "flowers-102")))
def test_missing_data_say_where_they_were_looked_for(name, folder, tmp_path, offline, monkeypatch):
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, data_dir=tmp_path)
    message = one_line(error)
    assert str(tmp_path / folder) in message and "--download" in message and "--data-dir" in message
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        data.load(name)
    assert os.path.join("data", folder) in one_line(error)


@pytest.mark.parametrize("name", ("cifar10", "flowers102"))
def test_download_is_asked_for_only_by_the_flag(name, tmp_path, offline):
    with pytest.raises(AssertionError, match="downloads"):
        data.load(name, data_dir=tmp_path, download=True)


# ----------------------------------------------------------------------------------------------------------------------
# Real images


def real(name: str) -> Path:
    folder = os.environ.get("FASTANILA_TEST_IMAGES")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"FASTANILA_TEST_IMAGES names no folder that holds {name}")
    return Path(folder) / name


def test_real_cifar10():
    images = data.load("image-folder", data_dir=real("cifar10-jpeg"))
    assert images.train.shape == (50_000, 3, 32, 32) and images.held_out.shape == (10_000, 3, 32, 32)
    mean = images.train.double().mean(dim=(0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465], dtype=F64), rtol=0, atol=2e-3)


def test_real_flowers():
    images = data.load("image-folder", data_dir=real("flowers12-64px"), size=32)
    assert images.train.shape == (720, 3, 32, 32) and images.held_out.shape == (240, 3, 32, 32)
    assert images.train.double().std() > 30
