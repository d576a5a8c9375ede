"""Runs with classes: trained, resumed, evaluated and drawn from."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastanila import data, evaluate, generate, sample
from fastanila import train as command
from fastanila.data import classes
from fastanila.data.images import from_pixels
from fastanila.models.wrappers import energies_by_class
from fastanila.training import run as run_training
from fastanila.training.loop import train
from fastanila.training.settings import Settings
from run_files import final, numbers, quiet

SMALL = dict(
    data="digits", classes=True, width=4, steps=2, batch_size=16, chains=32, iterations=4, log_every=1, sample_every=2,
    save_every=2, reinit=0.3, data_noise=0.1, lr_decay="none", fused=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "classes"
    quiet(Settings(**SMALL, out=str(directory)))
    return directory


@pytest.fixture(scope="module")
def run(directory):
    return run_training.load(directory)


def test_a_run_learns_and_logs(directory, run):
    rows = numbers(directory)
    assert all(0 <= row["accuracy"] <= 1 and row["cross_entropy"] > 0 for row in rows)
    assert run.classes == 10 and run.chains.shape == (32, 2, 8, 8)
    labels = run.chains[:, 1]
    assert (labels == labels[:, :1, :1]).all() and set(labels.unique().tolist()) <= set(range(10))
    assert run.chains[:, 0].abs().max() <= 1  # clamped to the images' box, which classes are not
    assert run.energy(run.chains).shape == (32,)
    assert Image.open(directory / "figure.png").size == Image.open(directory / "samples" / "00000004.png").size


@pytest.mark.parametrize("init", ["persistent", "data", "noise"])
def test_a_resumed_run_is_the_uninterrupted_one(init, tmp_path):
    settings = SMALL | dict(init=init, chains=32 if init == "persistent" else 16)
    whole, half = (Settings(**settings | dict(out=str(tmp_path / name))) for name in ("whole", "half"))
    quiet(whole)
    quiet(dataclasses.replace(half, iterations=2))
    quiet(half, resume=tmp_path / "half")
    a, b = final(tmp_path / "whole"), final(tmp_path / "half")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "half")


@pytest.mark.usefixtures("graphs")
def test_a_traced_run_is_the_plain_one(tmp_path, directory):
    quiet(Settings(**SMALL | dict(fused=True), out=str(tmp_path / "traced")))
    a, b = final(directory), final(tmp_path / "traced")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)
    assert torch.equal(a["start.population"][:, 1], b["start.population"][:, 1])


def test_the_weight_is_the_cross_entropys(tmp_path):
    """Without it the classifier learns nothing but what chains teach: its own gradient is gone."""
    found = {}
    for weight in (0.0, 100.0):
        name = f"w{weight:g}"
        quiet(
            Settings(
                **SMALL | dict(class_weight=weight, iterations=40, lr=3e-3, log_every=40), out=str(tmp_path / name)
            )
        )
        found[weight] = numbers(tmp_path / name)[-1]
    assert found[100.0]["cross_entropy"] < 1.5 < 2 < found[0.0]["cross_entropy"]


def test_a_temperature_divides_the_energies_of_every_class(tmp_path):
    quiet(Settings(**SMALL | dict(sampler="mala", temperature=0.25, iterations=2), out=str(tmp_path / "cold")))
    run = run_training.load(tmp_path / "cold")
    x = run.chains[:5, :1]
    with torch.no_grad():
        each = run.energy.energy.network(x)
        torch.testing.assert_close(energies_by_class(run.energy, x), each / 0.25, rtol=0, atol=0)
        own = each[torch.arange(5), run.chains[:5, 1, 0, 0].long()]
        torch.testing.assert_close(run.energy(run.chains[:5]), own / 0.25, rtol=0, atol=0)


def test_evaluation_has_the_accuracy_and_outliers(directory, run, capsys):
    assert evaluate.main([str(directory), "--no-fused", "--ood", "digits"]) == 0
    report = json.loads(capsys.readouterr().out)
    images = data.load("digits")
    with torch.no_grad():
        each = run.energy.network(from_pixels(images.held_out)).double().numpy()
    truth = images.held_out_labels.numpy()
    assert report["class_accuracy"] == pytest.approx((each.argmin(1) == truth).mean())
    logs = -each[np.arange(len(truth)), truth] - np.log(np.exp(-each).sum(1))
    assert report["class_cross_entropy"] == pytest.approx(-logs.mean(), rel=1e-5)
    with torch.no_grad():
        own = run.energy.network(from_pixels(images.train)).double().numpy()
    means = [own[images.train_labels.numpy() == i, i].mean() for i in range(10)]
    assert report["class_accuracy_centred"] == pytest.approx(((each - means).argmin(1) == truth).mean())
    assert report["auroc_ood"] == 0.5  # the same images
    assert all(0 <= report[f"auroc_{name}"] <= 1 for name in ("uniform", "constant", "gaussian"))
    marginal = -np.log(np.exp(-each).sum(1))
    constant = evaluate.ood.outliers(from_pixels(images.train), 360, seed=0)["constant"]
    with torch.no_grad():
        outside = -np.log(np.exp(-run.energy.network(constant).double().numpy()).sum(1))
    wins = (outside[None] > marginal[:, None]).mean() + 0.5 * (outside[None] == marginal[:, None]).mean()
    assert report["auroc_constant"] == pytest.approx(wins, abs=1e-4)
    with pytest.raises(ValueError, match="those of a run with classes have one for each class"):
        evaluate.mixing(run)


def test_samples_by_class(directory, run, tmp_path, capsys):
    out = tmp_path / "s.npz"
    assert (
        sample.main(
            [str(directory), "--no-fused", "--classes", "3", "7", "--count", "5", "--start", "noise", "--out", str(out)]
        )
        == 0
    )
    assert "3 samples of each of 2 classes" in capsys.readouterr().out
    found = np.load(out)
    assert found["samples"].shape == (6, 1, 8, 8) and found["labels"].tolist() == [3, 3, 3, 7, 7, 7]
    labels = torch.tensor([7, 3, 3, 7])
    for start in ("chains", "noise"):
        z = generate.sample(run, 4, start=start, steps=1, labels=labels, fused=False)
        assert torch.equal(classes.labels(z), labels)
    own = classes.labels(run.chains)
    y = int(own.mode().values)
    z = generate.sample(run, 40, steps=0, labels=torch.full((40,), y))
    having = run.chains[own == y]
    assert torch.equal(z, having[torch.arange(40) % len(having)])  # over again where more are wanted
    assert torch.equal(generate.sample(run, 40, steps=0), run.chains[torch.arange(40) % 32])
    assert classes.labels(generate.sample(run, 12, steps=0, start="noise")).tolist() == [*range(10), 0, 1]
    assert (
        sample.main(
            [
                str(directory),
                "--no-fused",
                "--start",
                "noise",
                "--steps",
                "1",
                "--count",
                "20",
                "--out",
                str(tmp_path / "s.png"),
            ]
        )
        == 0
    )
    assert Image.open(tmp_path / "s.png").size == (2 * (96 + 2) + 2, 10 * (96 + 2) + 2)  # a row a class


def test_inpainting_is_given_the_class(directory, run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(type(run.sampler), "run", lambda s, energy, z, **how: seen.append((z, how["mask"])) or z)
    found = generate.completions(run, run_training.data_of(run), 3, region="half", each=2, fused=False)
    ((z, mask),) = seen
    drawn = run_training.data_of(run).draw(3, seed=0, step=run_training.updates_past(run), purpose="held-out")
    assert torch.equal(classes.labels(z), classes.labels(drawn).repeat_interleave(2))
    assert torch.equal(found.truth, classes.images(drawn)) and found.completions.shape == (3, 2, 1, 8, 8)
    assert mask[:, 0, :, 4:].all() and not mask[:, 0, :, :4].any() and not mask[:, 1].any()


class Net(nn.Module):
    def __init__(self, outputs=10):
        super().__init__()
        self.layer = nn.Linear(64, outputs)

    def forward(self, x):
        return self.layer(x.flatten(1))


def test_an_energy_and_data_of_ones_own(tmp_path):
    settings = Settings(**{k: v for k, v in SMALL.items() if k not in ("data", "width")}, out=str(tmp_path / "own"))
    run = train(settings, energy=Net(), data=data.load("digits"), say=lambda line: None)
    assert run.classes == 10 and torch.isfinite(run.energy(run.chains)).all()
    with pytest.raises(ValueError, match=r"an energy for each of 10 classes, \(3, 10\), got \(3, 4\)"):
        train(dataclasses.replace(settings, out=str(tmp_path / "x")), energy=Net(4), data=data.load("digits"))
    pixels = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="classes need images with labels"):
        train(dataclasses.replace(settings, out=str(tmp_path / "x")), energy=Net(), data=pixels)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--classes", "data must be images with classes (digits, "),
        ("--classes --data digits --init vae", "init must be persistent, data or noise with classes, got vae"),
        ("--classes --data digits --task completion", "task must be generation with classes, got completion"),
        ("--classes --data digits --class-weight -1", "class_weight must be at least 0 and finite, got -1.0"),
    ],
)
def test_bad_flags(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_bad_requests_of_a_run(directory, tmp_path, capsys):
    plain, out = tmp_path / "plain", ["--no-fused", "--out", str(tmp_path / "s.png")]
    quiet(Settings(**SMALL | dict(classes=False, iterations=2), out=str(plain)))
    vectors = tmp_path / "rings"
    quiet(
        Settings(
            iterations=1,
            steps=1,
            batch_size=8,
            chains=8,
            width=4,
            features=2,
            sample_every=0,
            fused=False,
            out=str(vectors),
        )
    )
    for main, flags, message in (
        (sample.main, [str(plain), "--classes", "3", *out], "classes has no effect where no classes are drawn"),
        (sample.main, [str(directory), "--classes", "10", *out], "classes must be from 0 to 9, got 10"),
        (sample.main, [str(directory), "--classes", "1", "--inpaint", "half", *out], "classes has no effect where no"),
        (evaluate.main, [str(vectors), "--ood", "digits"], "ood needs a run that generates images, got data=rings"),
        (evaluate.main, [str(plain), "--ood", "nowhere"], "ood must be digits, cifar10, flowers102 or a folder"),
    ):
        assert main(flags) == 2, message
        err = capsys.readouterr().err
        assert err.startswith(f"error: {message}") and err.count("\n") == 1, err
    run = run_training.load(plain)
    with pytest.raises(ValueError, match="labels can be given for a run with classes"):
        generate.sample(run, 2, labels=torch.zeros(2, dtype=torch.int64))
    assert json.loads((plain / "config.json").read_text())["classes"] is False
    few = run_training.load(directory)
    few = few._replace(chains=few.chains[classes.labels(few.chains) != 3])
    with pytest.raises(ValueError, match="no chain of the run is of class 3; start=noise draws of every class"):
        generate.sample(few, 1, labels=torch.tensor([3]), steps=0)
    with pytest.raises(ValueError, match=r"labels must be one for each of the 2 states, got shape \(1,\)"):
        generate.sample(few, 2, labels=torch.tensor([1]), steps=0)
