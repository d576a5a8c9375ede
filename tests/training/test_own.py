"""An energy and data of the user's own: trained, sampled, evaluated, loaded, resumed; and what is refused."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastanila
from fastanila import evaluate, generate, sample
from fastanila import train as command
from fastanila.data import samples
from fastanila.data.densities import Density
from fastanila.training import build, config, learner, own
from fastanila.training import run as run_training
from fastanila.training.loop import train
from fastanila.training.settings import Settings
from run_files import final, numbers, rows

SMALL = dict(iterations=6, steps=2, batch_size=32, chains=32, log_every=1, sample_every=0, fused=False)

MODULE = """
import torch
from torch import nn
from own_parts import Net

called = []

def points():
    called.append("points")
    return torch.linspace(-1, 1, 80).reshape(40, 2).sin()

def energy(shape):
    called.append(tuple(shape))
    return Net(shape[0])

def plain():
    return Net(2)

def broken():
    raise RuntimeError("no such\\nthing")

def column(shape):
    return nn.Linear(2, 1)

def wrong(shape):
    return Net(3)

def nothing():
    return None

def empty():
    return torch.empty(0, 2)

def with_nan():
    x = torch.zeros(4, 2); x[2, 1] = float("nan")
    return x

number = 3
"""


class Net(nn.Module):
    """U(x) = w(x) + |x|^2 / 2, with a batch norm, whose statistics are buffers, and a parameter that is frozen."""

    def __init__(self, dim):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1))
        self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, x):
        return self.layers(x).squeeze(-1) + self.scale * x.square().sum(-1)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The name of a module of the user's own, that can be imported."""
    (tmp_path / "own_module.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "own_parts", sys.modules[__name__])
    yield "own_module"
    for name in ("own_module", "own_broken"):
        sys.modules.pop(name, None)


def points(count=50):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(1))


def quietly(settings, **options):
    return train(settings, say=lambda line: None, **options)


# --------------------------------------------------------------------------------------------------------- end to end


def test_an_energy_and_data_given_from_python(tmp_path):
    out, net = tmp_path / "run", Net(2)
    before = {name: p.clone() for name, p in net.named_parameters()}
    run = quietly(Settings(**SMALL | dict(sample_every=3), out=str(out)), energy=net, data=points())
    saved = config.read(out / "config.json")
    assert (saved["energy"], saved["data"]) == ("given: Net", "given: Tensor")
    moved = [name for name, p in net.named_parameters() if not torch.equal(p, before[name])]
    assert "scale" not in moved and "layers.0.weight" in moved  # trained in place, the frozen parameter left
    assert run.energy is not net and isinstance(run.energy, Net)
    trained = final(out)
    for name, tensor in run.energy.state_dict().items():  # the average, whose buffers are those of the energy itself
        assert torch.equal(tensor, trained[f"ema.{name}"])
    assert torch.equal(run.energy.layers[1].running_mean, net.layers[1].running_mean)
    assert not torch.equal(net.layers[1].running_mean, torch.zeros(8))
    assert all(np.isfinite(row["nll"]) for row in rows(out) if "nll" in row) and "nll" in rows(out)[-1]
    assert {"nll", "sw_chains", "mmd_chains_floor"} <= evaluate.evaluate(run, fused=False).keys()
    assert generate.sample(run, 5, fused=False).shape == (5, 2)

    with pytest.raises(ValueError, match=r"the energy of .*run was given from Python \(Net\).*energy=module"):
        fastanila.load(out)
    fresh = Net(2)
    start = fresh.layers[0].weight.clone()
    again = fastanila.load(out, energy=fresh)
    assert torch.equal(fresh.layers[0].weight, start)  # a copy gets the parameters
    x = points(5)
    assert torch.equal(again.energy(x), run.energy(x)) and again.box == run.box
    with pytest.raises(ValueError, match=r"the data of .* given from Python \(Tensor\).*data="):
        evaluate.evaluate(again, fused=False)
    with pytest.raises(fastanila.training.checkpoint.CheckpointError, match="does not fit"):
        fastanila.load(out, energy=Net(3))


class Branching(Net):
    """Does not compile as one graph: which way it goes depends on a value."""

    def forward(self, x):
        return super().forward(x) * (2.0 if x.sum().item() > 1e9 else 1.0)


def test_an_energy_that_does_not_compile_runs_eagerly_and_says_so(tmp_path):
    settings = Settings(**SMALL | dict(iterations=2, fused=True), out=str(tmp_path / "run"))
    with pytest.warns(UserWarning, match="does not compile as one graph and runs eagerly"):
        run = quietly(settings, energy=Branching(2), data=points())
    assert run.iteration == 2


def test_references_on_the_command_line(tmp_path, mine, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = f"--energy {mine}:energy --data {mine}:points --no-fused --iterations 3 --steps 2".split()
    assert command.main([*flags, "--log-every", "1"]) == 0
    module = sys.modules[mine]
    assert module.called[0] == "points" and module.called.count("points") == 1  # read once
    assert (2,) in module.called
    saved = config.read("runs/points/config.json")
    assert (saved["energy"], saved["data"], saved["sampler"]) == (f"{mine}:energy", f"{mine}:points", "anila-mh")

    module.called.clear()
    run = fastanila.load("runs/points")
    assert module.called == [(2,)]  # the data are not read
    assert isinstance(run.energy, Net)
    assert sample.main(["runs/points", "--no-fused", "--count", "4", "--out", "z.png"]) == 0
    assert sample.main(["runs/points", "--no-fused", "--count", "4", "--out", "z.npz"]) == 0
    assert np.load("z.npz")["samples"].shape == (4, 2)
    capsys.readouterr()
    assert evaluate.main(["runs/points", "--no-fused"]) == 0
    assert '"nll"' in capsys.readouterr().out
    assert command.main(["--resume", "runs/points", "--iterations", "5"]) == 0
    assert rows(tmp_path / "runs" / "points")[-1]["iteration"] == 5


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--energy nowhere_at_all.x:f", "energy: there is no module nowhere_at_all, got nowhere_at_all.x:f"),
        ("--energy own_broken:f", "energy: there is no module nowhere_at_all|energy: importing own_broken failed"),
        ("--energy own_module:missing", "energy: own_module has no missing"),
        ("--energy own_module:number", "energy: own_module:number must be a function that returns an nn.Module"),
        ("--energy own_module:nothing", "energy must be an nn.Module, or a function that returns one, got NoneType"),
        ("--energy own_module:broken", r"energy: own_module:broken\(\) failed: RuntimeError: no such thing"),
        ("--energy own_module:column", r"energy must map \(B, ...\) to \(B,\) = \(3,\), got \(3, 1\)"),
        ("--energy own_module:wrong", r"energy: Net cannot take a batch of the data, \(3, 2\)"),
        ("--energy mpl", "energy must be one of mlp, convnet, unet, or package.module:function"),
        ("--energy convnet", r"energy must be mlp for data of shape \(2,\), got convnet"),
        ("--energy own_module:plain --width 3", "width has no effect with energy=own_module:plain"),
        ("--data own_module:empty", r"data must have at least 2 rows"),
        ("--data own_module:with_nan", "data must be finite, but 1 of 4 rows hold NaN or infinity"),
        ("--data own_module:nothing", "data must be a tensor"),
        ("--data own_module:missing", "data: own_module has no missing"),
    ],
)
def test_one_line_for_what_cannot_be(mine, capsys, flags, line):
    flags = flags.split()
    if "--data" not in flags:
        flags += ["--data", f"{mine}:points"]
    assert command.main([*flags, "--no-fused", "--dry-run"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    with pytest.raises(ValueError, match=line):
        raise ValueError(told[0])


def test_given_energies_that_cannot_be_trained():
    batch = points(3)
    frozen = Net(2).requires_grad_(False)
    with pytest.raises(ValueError, match="must have parameters to learn"):
        build.check_energy(frozen, batch)
    unused = Net(2)
    unused.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="does not use its parameter extra"):
        build.check_energy(unused, batch)
    with pytest.raises(ValueError, match="float32"):
        build.check_energy(Net(2).double(), batch)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        build.build_energy(Settings(), (2,), lambda x: x.sum(-1))
    with pytest.raises(ValueError, match="energy is given twice"):
        quietly(Settings(**SMALL, energy="mlp"), energy=Net(2))


# ------------------------------------------------------------------------------------------------------------ resuming


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path):
    common = dict(energy=Net(2), data=points())
    state = {name: x.clone() for name, x in common["energy"].state_dict().items()}
    settings = Settings(**SMALL | dict(lr_decay="none"), out=str(tmp_path / "whole"))
    quietly(settings, **common)
    common["energy"].load_state_dict(state)
    half = Settings(**SMALL | dict(lr_decay="none", iterations=3), out=str(tmp_path / "half"))
    quietly(half, **common)
    resumed = run_training.read_settings(tmp_path / "half")
    resumed = config.dataclasses.replace(resumed, iterations=6)
    with pytest.raises(ValueError, match=r"energy.*was given from Python"):
        quietly(resumed, resume=tmp_path / "half", data=points())
    with pytest.raises(ValueError, match=r"data.*was given from Python"):
        quietly(resumed, resume=tmp_path / "half", energy=Net(2))
    with pytest.raises(ValueError, match=r"data are not what .* was trained on"):
        quietly(resumed, resume=tmp_path / "half", energy=Net(2), data=points() + 1)
    quietly(resumed, resume=tmp_path / "half", energy=Net(2), data=points())
    assert numbers(tmp_path / "half") == numbers(tmp_path / "whole")
    a, b = final(tmp_path / "half"), final(tmp_path / "whole")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_nothing_of_ones_own_can_be_given_to_a_run_of_named_data(tmp_path):
    quietly(Settings(**SMALL | dict(iterations=1), width=4, features=0, out=str(tmp_path / "run")))
    with pytest.raises(ValueError, match=r"data cannot be given for .*, which has data=rings"):
        fastanila.load(tmp_path / "run", data=points())


# ------------------------------------------------------------------------------------------------------------ callbacks


def test_callbacks_see_rows_pictures_and_checkpoints(tmp_path):
    seen, pictures, checkpoints = [], [], []
    settings = Settings(**SMALL | dict(sample_every=3, save_every=2), width=4, features=0, out=str(tmp_path / "run"))
    quietly(settings, on_log=seen.append, on_picture=pictures.append, on_checkpoint=checkpoints.append)
    assert seen == rows(tmp_path / "run")
    assert [p.name for p in pictures] == ["00000003.png", "00000006.png", "figure.png"]
    assert [p.name for p in checkpoints] == [f"{i:08d}.safetensors" for i in (2, 4, 6)]
    assert all(p.is_file() for p in pictures) and checkpoints[-1].is_file()


@pytest.mark.parametrize("error", [RuntimeError("pruned"), ConnectionError(111, "refused")])
def test_what_a_callback_raises_ends_the_run_with_its_state_saved(tmp_path, error):
    def stop(row):
        if row["iteration"] == 4:
            raise error

    settings = Settings(**SMALL, width=4, features=0, out=str(tmp_path / "run"))
    with pytest.raises(type(error)) as caught:
        quietly(settings, on_log=stop)
    assert caught.value is error
    assert fastanila.load(tmp_path / "run").iteration == 4
    quietly(run_training.read_settings(tmp_path / "run"), resume=tmp_path / "run")
    quietly(config.dataclasses.replace(settings, out=str(tmp_path / "whole")))
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


# -------------------------------------------------------------------------------------------------------- kinds of data


class Pictures:
    """As torchvision's data sets: (image, label)."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], i % 3


def test_images_by_whatever_way_they_come():
    pixels = torch.randint(0, 256, (21, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    pillow = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels]
    with pytest.warns(UserWarning, match=r"in \[0, 1\]"):
        unit = samples.of(Pictures(list(pixels.float() / 255)), "unit")
    for found in (
        samples.of(pixels, "uint8"),
        samples.of(pixels.numpy(), "array"),
        samples.of(pixels.float() / 127.5 - 1, "floats"),
        samples.of(Pictures(pillow), "pillow"),
        samples.of(Pictures(list(pixels)), "tensors"),
        unit,
    ):
        held_out = torch.arange(21) % 10 == 0
        assert torch.equal(found.train, pixels[~held_out]) and torch.equal(found.held_out, pixels[held_out])
        assert found.shape == (3, 8, 8) and found.box == (-1.0, 1.0)
    grey = samples.of([Image.new("L", (8, 9), 7), Image.new("L", (8, 9), 8)], "grey")
    assert grey.shape == (1, 9, 8) and grey.held_out.unique().tolist() == [7]


def test_vectors_are_drawn_from_training_or_held_out_rows():
    rows_ = torch.randn(35, 3, dtype=torch.float64)
    data = samples.of(rows_, "x")
    assert data.train.dtype == torch.float32 and (len(data.train), len(data.held_out)) == (31, 4)
    assert data.box[0] < rows_.min() and data.box[1] > rows_.max()
    for purpose, allowed in (("train", data.train), ("start", data.train), ("held-out", data.held_out)):
        drawn = data.draw(200, seed=1, step=2, purpose=purpose)
        assert (drawn[:, None] == allowed).all(-1).any(1).all() and len(drawn.unique(dim=0)) == len(allowed)
        assert torch.equal(data.draw(50, seed=1, step=2, purpose=purpose, offset=7), drawn[7:57])
    assert data.fingerprint != samples.of(rows_ + 1e-3, "x").fingerprint


@pytest.mark.parametrize(
    "value, line",
    [
        (torch.zeros(5), r"\(N, D\) or \(N, C, H, W\), got shape \(5,\)"),
        (torch.zeros(5, 8, 8), r"images without a channel are x\[:, None\]"),
        (torch.zeros(5, 2), "must vary"),
        (torch.zeros(5, 2, dtype=torch.int64), "must be floats, got torch.int64"),
        (torch.full((5, 1, 8, 8), 3.0), r"in \[-1, 1\] or uint8, got floats from 3 to 3"),
        (torch.zeros(5, 2, 8, 8), "1 or 3 channels"),
        ([torch.zeros(2), torch.zeros(3)], "item 1 is torch.float32"),
        ([], "at least 2 rows"),
        (Density("mine", (1.0, -1.0), lambda u, n: n), "low < high"),
        (Density("mine", (-1.0, 1.0), lambda u, n: n[:, :1]), "must be \\(5, 2\\)"),
    ],
)
def test_data_that_cannot_be(value, line):
    with pytest.raises(ValueError, match=line):
        samples.of(value, "x")


@pytest.mark.parametrize("value", [3, "text", {"a": 1}, iter([])])
def test_data_of_other_types(value):
    with pytest.raises(TypeError, match="data must be a tensor"):
        samples.of(value, "x")


def test_a_density_images_and_vectors_train_with_a_vae_too(tmp_path):
    images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    of = {
        "density": (Density("mine", (-4.0, 4.0), lambda u, n: n), dict(width=4, features=0)),
        "vectors": (torch.randn(30, 5), dict(width=4, init="vae", vae_width=4)),
        "images": (images, dict(width=2, init="vae", vae_width=2)),
        "completion": (images, dict(width=2, task="completion", vae_width=2)),
    }
    for name, (data, options) in of.items():
        run = quietly(Settings(**SMALL | dict(chains=None) | options, out=str(tmp_path / name)), data=data)
        assert (run.vae is not None) == ("vae_width" in options)
        report = evaluate.evaluate(run, fused=False, count=8)
        judged = {k: v for k, v in report.items() if k in ("kid", "frechet") or "features" not in report}
        assert judged and all(np.isfinite(v) for v in judged.values()), (name, report)
        assert fastanila.load(tmp_path / name).chains.shape == run.chains.shape


# ---------------------------------------------------------------------------------------------------------------- parts


def test_references_are_told_from_names():
    assert own.is_reference("a.b:c") and own.is_reference("a:b.c")
    assert not any(map(own.is_reference, ("rings", "a/b:c", "a:", ":b", "given: Net", "C:\\x", None)))
    assert own.folder("a.b:c") == "c" and own.folder("given: Tensor") == "Tensor" and own.folder("rings") == "rings"


def test_a_moving_average_leaves_frozen_parameters_alone():
    net = Net(2)
    job = learner.build(net, config.resolve(Settings()), 1e-3, "none", torch.device("cpu"))
    averages, parameters = learner.averaged_parameters([job])
    assert len(averages[0]) == len(parameters[0]) == len([p for p in net.parameters() if p.requires_grad])
    learner.follow(averages, [[p + 1 for p in parameters[0]]], [torch.tensor(0.5)])
    assert torch.equal(job.average.scale, net.scale)
    assert torch.allclose(job.average.layers[0].weight, net.layers[0].weight + 0.5)
