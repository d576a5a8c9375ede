"""Missing regions: what they are, states that carry their condition, and chains that move nothing else."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastanila import AdjustedAniLA, AniLA, data, evaluate, generate, sample
from fastanila import train as command
from fastanila.data import completion
from fastanila.evaluation import distances
from fastanila.models import ConvNet, wrappers
from fastanila.ops import reference
from fastanila.training import build
from fastanila.training import run as run_training
from fastanila.training.loop import train
from fastanila.training.settings import Settings


def test_regions():
    centre = completion.region("centre", 2, 8, seed=0, step=0)
    assert centre.shape == (2, 1, 8, 8) and centre.dtype == torch.bool
    assert centre[0, 0, 2:6, 2:6].all() and centre.sum() == 2 * 16
    half = completion.region("half", 2, 9, seed=0, step=0)
    assert half[:, :, :, 4:].all() and not half[:, :, :, :4].any()
    for size in (8, 11, 28):
        blocks = completion.region("blocks", 50, size, seed=0, step=3)
        assert blocks.shape == (50, 1, size, size)
        cells = blocks[:, 0][:, [0, size // 4 + 1, size // 2 + 1, size - 1]][
            :, :, [0, size // 4 + 1, size // 2 + 1, size - 1]
        ]
        assert (cells.flatten(1).sum(1) == 8).all() and len(cells.flatten(1).unique(dim=0)) > 40
    again = completion.region("blocks", 10, 28, seed=0, step=3, offset=40)
    assert torch.equal(again, blocks[40:])  # a slice draws what the whole would
    with pytest.raises(ValueError, match="mask must be one of centre, half, blocks, got 'left'"):
        completion.region("left", 1, 8, seed=0, step=0)


def test_states_hold_their_condition():
    x = torch.rand(3, 2, 8, 8)
    z = completion.state(x, completion.region("half", 3, 8, seed=0, step=0))
    assert z.shape == (3, 3, 8, 8) and torch.equal(completion.images(z), x)
    free = completion.free(z)
    assert free[:, :2, :, 4:].all() and not free[:, :, :, :4].any() and not free[:, 2].any()
    filled = completion.fill(z, torch.full_like(x, 7.0))
    assert (filled[free] == 7).all() and torch.equal(filled[~free], z[~free])
    assert (completion.hidden(z)[free] == 0).all()


def test_a_conditional_energy_has_a_score_where_chains_may_move():
    network = ConvNet(3, 8, 4)
    z = completion.state(torch.rand(3, 2, 8, 8), completion.region("blocks", 3, 8, seed=0, step=0))
    energy = wrappers.ConditionalEnergy(network)
    free = completion.free(z)
    assert torch.equal(energy(z), network(z))
    score, whole = (torch.func.grad(lambda x, f=f: f(x).sum())(z) for f in (energy, network))
    assert (score[~free] == 0).all() and torch.equal(score[free], whole[free]) and (whole[~free] != 0).any()
    assert (energy(z) != energy(torch.where(free, z, z + 0.1))).all()  # of the known pixels too it is a function


@pytest.mark.parametrize("sampler", [AniLA(0.5, 0.1), AniLA(0.5, 0.1, norm="chain"), AdjustedAniLA(0.5, 0.1)])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_known_pixels_never_move(sampler, compile):
    z = completion.state(torch.rand(3, 1, 8, 8), completion.region("blocks", 3, 8, seed=0, step=0))
    free = completion.free(z)
    energy = wrappers.ConditionalEnergy(ConvNet(2, 8, 4))
    out = sampler.run(energy, z, steps=5, seed=0, mask=free, compile=compile)
    assert torch.equal(out[~free], z[~free]) and not (out[free] == z[free]).all()


def test_completions_are_a_data_set():
    images = data.load("digits")
    states = completion.Completions(images, "blocks")
    assert states.shape == (2, 8, 8) and states.box == images.box and states.name == "digits"
    drawn = states.draw(6, seed=3, step=5)
    assert torch.equal(completion.images(drawn), images.draw(6, seed=3, step=5))
    assert torch.equal(states.draw(2, seed=3, step=5, offset=4), drawn[4:])
    with pytest.raises(ValueError, match="mask must be one of"):
        completion.Completions(images, "top")


def test_errors_are_those_of_the_region():
    rng = np.random.default_rng(0)
    truth, done = rng.uniform(-1, 1, (3, 2, 4, 4)), rng.uniform(-1, 1, (3, 5, 2, 4, 4))
    missing = rng.uniform(size=(3, 1, 4, 4)) < 0.5
    squares = [((d - t)[:, m[0]] ** 2).mean() for t, m, ds in zip(truth, missing, done, strict=True) for d in ds]
    mse, psnr = distances.errors(torch.tensor(truth), torch.tensor(missing), torch.tensor(done), (-1.0, 1.0))
    assert mse == pytest.approx(np.mean(squares))
    assert psnr == pytest.approx(np.mean([10 * math.log10(4 / s) for s in squares]))


@pytest.mark.parametrize("norm", ["element", "channel", "chain"])
@pytest.mark.parametrize("kind", ["centre", "blocks"])
def test_statistics_are_of_what_may_move(norm, kind):
    """A threshold below every score that there is, and one above: all clipped, none clipped."""
    z = completion.state(torch.rand(3, 2, 8, 8), completion.region(kind, 3, 8, seed=0, step=0))
    free, score = completion.free(z), torch.zeros(3, 3, 8, 8)
    score[free] = 2.0
    for threshold, clipped in ((1e-3, 1.0), (1e3, 0.0)):
        gain = reference.gain(score, threshold, norm).expand_as(score)
        share = (gain < 1).float().mean() / completion.share(z, norm)
        assert share == pytest.approx(clipped)
    rms = (score.square().mean() / completion.share(z, "element")).sqrt()
    assert rms == pytest.approx(2.0)


SMALL = dict(
    data="digits", width=4, vae_width=4, latent=3, steps=3, batch_size=16, iterations=4, log_every=2, sample_every=2,
    fused=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def completing(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "completing"
    train(
        Settings(**SMALL, task="completion", mask="blocks", data_noise=0.1, out=str(directory)), say=lambda line: None
    )
    return directory


@pytest.fixture(scope="module")
def generating(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "generating"
    train(Settings(**SMALL, out=str(directory)), say=lambda line: None)
    return directory


def test_completion_trains_evaluates_and_samples(completing, tmp_path, capsys):
    rows = [json.loads(line) for line in (completing / "metrics.jsonl").read_text().splitlines()]
    assert {"reconstruction", "kl", "energy_proposals", "moved"} <= set(rows[-1])
    assert Image.open(completing / "figure.png").size[0] > 300
    run = run_training.load(completing)
    assert run.vae.conditional and run.chains.shape == (16, 2, 8, 8)
    assert set(run.chains[:, 1].unique().tolist()) == {0.0, 1.0}  # regions carry no data noise
    known = ~completion.free(run.chains)[:, :1]
    levels = ((run.chains[:, :1][known] + 1) * 127.5).double()
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)  # nor do known pixels
    assert evaluate.main([str(completing), "--no-fused"]) == 0
    report = json.loads(capsys.readouterr().out)
    for name in ("vae", "revised", "mean", "vae_average", "revised_average"):
        assert report[f"psnr_{name}"] > 0 and report[f"mse_{name}"] > 0
    assert report["mse_vae_average"] < report["mse_vae"]  # which any average of different completions has
    found = generate.completions(run, build.load_data(run.settings, "cpu"), 200, each=8, fused=False)
    inside = found.missing.expand_as(found.truth)
    for name, sets in (("vae", found.proposals), ("revised", found.completions)):
        spread = np.sqrt((sets.numpy().var(1, ddof=1)[inside.numpy()]).mean())
        assert report[f"diversity_{name}"] == pytest.approx(spread, rel=1e-4)
    assert report["diversity_revised"] > report["diversity_vae"]
    out = tmp_path / "c.npz"
    flags = ["--count", "3", "--completions", "2", "--no-fused"]
    assert sample.main([str(completing), *flags, "--out", str(out)]) == 0
    found = np.load(out)
    assert found["samples"].shape == (3, 2, 1, 8, 8) and found["missing"].shape == (3, 1, 8, 8)
    kept = np.broadcast_to(~found["missing"][:, None], found["samples"].shape)
    for name in ("samples", "proposals"):
        assert (found[name] == found["truth"][:, None])[kept].all()
    assert not np.isclose(found["samples"][:, 0], found["samples"][:, 1])[~kept[:, 0]].all()
    assert sample.main([str(completing), *flags, "--out", str(tmp_path / "c.png")]) == 0
    capsys.readouterr()
    assert sample.main([str(completing), "--inpaint", "half", "--out", str(out)]) == 2
    assert capsys.readouterr().err == "error: mask must be blocks, which the run has learned to complete, got half\n"
    with pytest.raises(ValueError, match="draws no images but completes them"):
        generate.sample(run, 4)
    with pytest.raises(ValueError, match="chains of completions have no common law"):
        evaluate.mixing(run)
    assert sample.main([str(completing), "--reconstruct", "--out", str(out)]) == 2
    assert "reconstruct needs a run with init=vae and task=generation" in capsys.readouterr().err


@pytest.mark.parametrize("region", completion.REGIONS)
def test_an_unconditional_run_inpaints(generating, tmp_path, region, capsys):
    out = tmp_path / "i.npz"
    flags = f"--inpaint {region} --count 2 --completions 3 --steps 4 --no-fused --out {out}"
    assert sample.main([str(generating), *flags.split()]) == 0
    found = np.load(out)
    kept = np.broadcast_to(~found["missing"][:, None], found["samples"].shape)
    assert (found["samples"] == found["truth"][:, None])[kept].all()
    assert not (found["samples"] == found["truth"][:, None])[~kept].any()
    assert "2 images, each completed 3 times (mse" in capsys.readouterr().out
    assert sample.main([str(generating), *flags.split(), "--out", str(tmp_path / "i.png")]) == 0
    assert Image.open(tmp_path / "i.png").size[0] > 100


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--task completion", "data must be images with task=completion"),
        ("--task completion --data digits --init noise", "init must be vae with task=completion, got noise"),
        ("--init vae --latent 0", "latent must be an integer of at least 1, got 0"),
        ("--init vae --kl-weight -1", "kl_weight must be at least 0 and finite, got -1.0"),
        ("--init vae --vae-lr 0", "vae_lr must be positive and finite, got 0.0"),
        ("--init vae --vae-warm-up 4000", "vae_warm_up must be below iterations (4000), or the energy never learns"),
        ("--reference-sd 0", "reference_sd must be positive or inf, got 0.0"),
        ("--init vae --chains 128 --batch-size 64", "chains must be with init=vae equal to batch_size (64), got 128"),
    ],
)
def test_bad_flags(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
