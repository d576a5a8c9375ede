"""Training with a VAE as amortized sampler, as its users run it: numbers, files, resuming, sampling, warnings."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

import fastanila
from fastanila import data, evaluate, generate, sample
from fastanila.evaluation import plane as plane_evaluation
from fastanila.samplers import starts
from fastanila.training import checkpoint, loop
from fastanila.training import job as job_training
from fastanila.training import run as run_training
from fastanila.training import update as update_training
from fastanila.training.metrics import Watch
from fastanila.training.settings import Settings
from run_files import final, numbers, quiet, rows

SMALL = dict(
    init="vae", vae_warm_up=3, iterations=12, steps=4, batch_size=64, width=16, features=8, vae_width=16, latent=3,
    log_every=1, sample_every=6, save_every=5,
)  # fmt: skip
IMAGES = SMALL | dict(data="digits", width=4, vae_width=4, features=0, batch_size=16)


@pytest.fixture(scope="module", params=["rings", "digits"])
def run_directory(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / request.param
    quiet(Settings(**(SMALL if request.param == "rings" else IMAGES), fused=False, out=str(directory)))
    return directory


def test_fused_and_plain_give_the_same_numbers_without_a_graph_break(tmp_path, compiler):
    torch._dynamo.reset()
    counters.clear()
    for fused in (True, False):
        quiet(
            Settings(
                init="vae",
                iterations=12,
                steps=10,
                log_every=1,
                sample_every=0,
                fused=fused,
                out=str(tmp_path / str(fused)),
            )
        )
        if fused:
            assert not counters["graph_break"]
            # the transition: what runs once an update is not compiled on a CPU
            assert counters["stats"]["unique_graphs"] == 1
    for a, b in zip(rows(tmp_path / "True"), rows(tmp_path / "False"), strict=True):
        for key in a.keys() - {"seconds"}:
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-3), (a["iteration"], key)


@pytest.mark.parametrize(
    "options",
    [
        dict(sampler="anila"),
        dict(sampler="mala", reference_sd=2.0),
        dict(sampler="hmc", leapfrog_steps=2),
        dict(sampler="anila", refresh="update", clip_grad=0.1, ema=0.0, vae_lr_decay="none", data_noise=0.1),
        dict(data="digits", features=0, width=4, vae_width=4, precision="bf16"),
        dict(data="digits", features=0, width=4, vae_width=4, task="completion", mask="half", sampler="anila-mh"),
    ],
    ids=str,
)
def test_every_option_trains(tmp_path, options):
    run = quiet(
        Settings(
            **SMALL | dict(iterations=3, vae_warm_up=1, sample_every=0) | options,
            fused=False,
            out=str(tmp_path / "run"),
        )
    )
    assert run.chains.isfinite().all() and run.iteration == 3 and run.vae is not None
    assert all(math.isfinite(value) for row in rows(tmp_path / "run") for value in row.values())


def test_what_is_watched(run_directory):
    row = rows(run_directory)[-1]
    wanted = "energy_proposals moved spread reconstruction kl vae_grad_norm vae_lr".split()
    assert set(wanted) <= set(row) and all(row[name] > 0 for name in wanted[1:])
    plane = run_directory.name == "rings"
    assert ("tv_proposals" in row) == plane
    wide, high = Image.open(run_directory / "figure.png").size
    assert (wide > 1500) if plane else high == 2 * 98 + 2  # proposals above the revised


def test_what_the_metrics_say(run_directory):
    """Of the last update, from the states that the run saved."""
    row, tensors = rows(run_directory)[-1], final(run_directory)
    before = run_training.read_settings(run_directory).iterations
    moved = (tensors["chains"] - tensors["proposals"]).double().square().mean().sqrt()
    assert row["moved"] == pytest.approx(moved.item(), rel=1e-5) and row["iteration"] == before
    spread = (
        tensors["proposals"].double().var(0, False).mean() / tensors["chains"].double().var(0, False).mean()
    ).sqrt()
    assert row["spread"] == pytest.approx(spread.item(), rel=1e-4)


def test_the_energies_are_those_of_what_they_are_called():
    job = job_training.prepare(Settings(**SMALL | dict(vae_warm_up=5), fused=False))  # in which the energy stands still
    made = update_training.build_update(job)()
    batch, _ = update_training.draw_data(job, 0, 0)
    found = (made.energy_data, made.energy_chains, torch.tensor(update_training.revision(job)["energy_proposals"]))
    for got, states in zip(found, (batch, job.chains, job.proposals), strict=True):
        assert got.item() == pytest.approx(job.ebm.module(states).mean().item(), rel=1e-5)
    assert len({round(x.item(), 4) for x in found}) == 3


def test_each_average_counts_from_where_its_network_begins_to_learn():
    job = job_training.prepare(Settings(**SMALL | dict(vae_warm_up=3, ema=0.999), fused=False))
    update = update_training.build_update(job)
    for _ in range(4):
        before = [[p.clone() for p in learner.average.parameters()] for learner in job.learners]
        update()
    for old, learner, made in zip(before, job.learners, (0, 3), strict=True):
        decay = (1 + made) / (10 + made)
        for was, average, p in zip(old, learner.average.parameters(), learner.module.parameters(), strict=True):
            torch.testing.assert_close(average, decay * was + (1 - decay) * p.detach())


def test_the_networks_of_a_pair_begin_apart():
    job = job_training.prepare(Settings(data="digits", init="vae", fused=False, vae_width=32, width=32))
    ours = {p.flatten()[0].item() for p in job.ebm.module.parameters() if p.dim() > 1}
    assert not ours & {p.flatten()[0].item() for p in job.vae.module.parameters() if p.dim() > 1}


def test_a_longer_run_keeps_its_warm_up(tmp_path):
    options = SMALL | dict(vae_warm_up=None, sample_every=0)
    quiet(Settings(**options | dict(iterations=8), fused=False, out=str(tmp_path / "run")))
    run = quiet(Settings(**options | dict(iterations=16), fused=False), resume=tmp_path / "run")
    assert run.settings.vae_warm_up == 2 and run.iteration == 16


def test_resume_gives_the_numbers_of_an_uninterrupted_run(run_directory, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(run_directory, half)
    (half / "checkpoints" / "00000012.safetensors").unlink()  # leaves update 10's
    quiet(run_training.read_settings(half), resume=half)
    assert numbers(half) == numbers(run_directory)
    a, b = final(run_directory), final(half)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(k.startswith("amortized.vae.") for k in a) and any(k.startswith("amortized.ema.") for k in a)
    # teeth: without the VAE's moments, its average or itself the numbers differ
    bias = "decoder.up.0.bias" if run_directory.name == "digits" else "decoder.1.bias"
    for name in (f"amortized.optimizer.exp_avg.{bias}", f"amortized.ema.{bias}", f"amortized.vae.{bias}"):
        twin = tmp_path / name
        shutil.copytree(half, twin)
        (twin / "checkpoints" / "00000012.safetensors").unlink()
        tensors, state = checkpoint.load_latest(twin / "checkpoints")
        tensors[name] = tensors[name] + 1
        checkpoint.save(twin / "checkpoints" / "00000010.safetensors", tensors, state)
        quiet(run_training.read_settings(twin), resume=twin)
        assert not all(torch.equal(v, a[k]) for k, v in final(twin).items())


def test_a_checkpoint_without_its_vae(run_directory, tmp_path):
    twin = tmp_path / "twin"
    shutil.copytree(run_directory, twin)
    for path in (twin / "checkpoints").iterdir():
        tensors, state = checkpoint.load(path)
        checkpoint.save(path, {k: v for k, v in tensors.items() if not k.startswith("amortized.")}, state)
    with pytest.raises(checkpoint.CheckpointError, match="does not fit the settings' network"):
        fastanila.load(twin)


def test_what_is_not_finite_never_reaches_either_network():
    for where in ("proposals", "teaching"):
        job = job_training.prepare(Settings(**SMALL, fused=False))
        update = update_training.build_update(job)
        update()
        if where == "proposals":
            job.start.draw = lambda update, batch: torch.full((64, 2), math.nan)
        else:  # only the VAE's own loss is broken
            job.vae.module.encoder.register_forward_hook(lambda module, inputs, out: out * math.inf)
        before = [p.detach().clone() for learner in job.learners for p in learner.module.parameters()]
        averages = [p.clone() for learner in job.learners for p in learner.average.parameters()]
        for _ in range(2):
            update()
        assert job.broken and job.made == 1
        after = [p for learner in job.learners for p in learner.module.parameters()]
        assert all(map(torch.equal, before, after))
        assert all(map(torch.equal, averages, [p for learner in job.learners for p in learner.average.parameters()]))


def test_the_warm_up(tmp_path):
    """The energy stands still, and the VAE learns from data, with a weight of KL that falls to its own."""
    settings = run_training.config.resolve(Settings(**SMALL | dict(vae_warm_up=4, iterations=8, kl_weight=0.2)))
    warm_up = torch.tensor(settings.vae_warm_up)
    weights = [float(update_training.kl_weight(settings.kl_weight, warm_up, torch.tensor(i))) for i in (0, 2, 4, 7)]
    assert weights == pytest.approx([2.0, 0.2 * 10**0.5, 0.2, 0.2])
    assert update_training.kl_weight(0.1, None, torch.tensor(0)) == 0.1
    job = job_training.prepare(Settings(**SMALL | dict(vae_warm_up=4), fused=False))
    update = update_training.build_update(job)
    before = [p.detach().clone() for p in job.ebm.module.parameters()]
    taught = []
    encode = job.vae.module.encode
    job.vae.module.encode = lambda x: (taught.append(x.clone()), encode(x))[1]
    for i in range(6):
        update()
        still = all(map(torch.equal, before, job.ebm.module.parameters()))
        assert still == (i < 4)
        data_seen, _ = update_training.draw_data(job, i, 0)
        assert torch.equal(taught[-1], data_seen if i < 4 else job.chains)


# ------------------------------------------------------------------------------------------------------------ sampling


def test_sampling_from_the_pair(run_directory, tmp_path, capsys):
    run = fastanila.load(run_directory)
    proposals = generate.sample(run, 9, steps=0)
    update = run_training.updates_past(run)
    assert torch.equal(proposals, starts.proposals(run.vae, 9, seed=0, update=update))
    with pytest.raises(ValueError, match="start must be one of chains, noise, vae, got 'data'"):
        generate.sample(run, 9, start="data")
    with pytest.raises(ValueError, match="warm_up must be 0 with no steps to follow, got 3"):
        generate.sample(run, 9, steps=0, warm_up=3)
    assert sample.main([str(run_directory), "--reconstruct", "--start", "noise", "--out", str(tmp_path / "x.npz")]) == 2
    assert capsys.readouterr().err == "error: start is for plain samples, and none are drawn here; got noise\n"
    pairs = generate.pairs(run, 9, fused=False)
    assert torch.equal(pairs.proposals, proposals) and not torch.equal(pairs.revised, proposals)
    assert torch.equal(pairs.revised, generate.sample(run, 9, fused=False))
    again = run.sampler.run(
        run.energy, proposals, steps=run.settings.steps, seed=0, step=update * run.settings.steps, compile=False
    )
    assert torch.equal(pairs.revised, again)
    for flags in ("", "--steps 0", "--interpolate", "--reconstruct", "--start noise --steps 2", "--start chains"):
        for suffix in ("png", "npz"):
            out = tmp_path / f"s.{suffix}"
            assert (
                sample.main([str(run_directory), "--count", "9", "--no-fused", *flags.split(), "--out", str(out)]) == 0
            )
            assert f"in {out}" in capsys.readouterr().out
    sample.main([str(run_directory), "--count", "9", "--no-fused", "--out", str(out)])
    found = np.load(out)
    assert np.array_equal(found["samples"], pairs.revised) and np.array_equal(found["proposals"], proposals)


def test_what_needs_a_vae(tmp_path, capsys):
    directory = tmp_path / "run"
    quiet(Settings(**SMALL | dict(init="noise", iterations=1, sample_every=0), fused=False, out=str(directory)))
    pair = "needs a run with init=vae and task=generation, got one with init=noise and task=generation"
    for flags, message in (
        ("--start noise --interpolate", f"interpolate {pair}"),
        ("--start vae", "start can be vae for a run with init=vae, got a run with init=noise"),
        ("--interpolate", f"interpolate {pair}"),
        ("--reconstruct", f"reconstruct {pair}"),
        ("--inpaint half", "run must be of images to complete them, got one of rings"),
    ):
        assert sample.main([str(directory), *flags.split(), "--no-fused", "--out", str(tmp_path / "x.png")]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"


def test_evaluation_is_of_fresh_pairs(run_directory, capsys):
    assert evaluate.main([str(run_directory), "--no-fused"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"energy_proposals", "energy_revised", "moved"} <= set(report)
    run = fastanila.load(run_directory)
    if run_directory.name == "rings":
        pairs = generate.pairs(run, 10_000, fused=False)
        density = data.load("rings")
        assert report["tv_proposals_model"] == pytest.approx(
            plane_evaluation.law_tv(run.energy, density, pairs.proposals)
        )
        assert report["tv_chains"] > 0
    else:
        assert report["kid_start"] > 0 and report["frechet_start"] > 0
        pairs = generate.pairs(run, 1024, fused=False)
    energies = [run.energy(z).mean().item() for z in pairs]
    assert [report["energy_proposals"], report["energy_revised"]] == pytest.approx(energies, rel=1e-4, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ warnings

LONG = SMALL | dict(
    vae_warm_up=60, iterations=180, steps=4, vae_lr=0.02, log_every=2, sample_every=0, save_every=1000, ema=0.0
)


def warnings_of(tmp_path, change=None, **options):
    lines = []
    job = job_training.prepare(Settings(**LONG | options, fused=False, out=str(tmp_path / "run")))
    if change is not None:
        with torch.no_grad():
            change(job)
    loop.run(job, say=lines.append)
    return [line for line in lines if line.startswith("warning: ")]


def test_a_run_that_is_well_warns_of_nothing(tmp_path):
    assert warnings_of(tmp_path) == []


def test_posterior_collapse_is_told_once(tmp_path):
    (line,) = warnings_of(tmp_path, kl_weight=1e3)
    assert "posterior collapse (kl" in line and "lower --kl-weight (now 1000)" in line and "3 latents" in line


def test_a_dead_vae_is_told_once(tmp_path):
    def kill(job):
        job.vae.module.decoder[-2].weight.zero_()  # whatever the latents, and however much the encoder has to say
        job.vae.module.encoder[-1].bias[:3] += 2

    (line,) = warnings_of(tmp_path, kill, vae_lr=1e-9)
    assert "the VAE is dead" in line and "raise --vae-lr (now 1e-09)" in line


def test_exploding_energies_are_told_once(tmp_path):
    def inflate(job):
        job.ebm.module.head.bias += 1e5

    (line,) = warnings_of(tmp_path, inflate)
    assert "the energies explode (mean energy 1e+05)" in line and "lower --lr (now 0.0005)" in line


def test_one_bad_row_is_no_warning():
    watch = Watch(run_training.config.resolve(Settings(init="vae", vae_warm_up=0)))
    well = dict(
        iteration=500, energy_data=0.0, energy_chains=1.0, energy_proposals=1.0, kl=3.0, spread=1.0, vae_grad_norm=1.0
    )
    for _ in range(20):
        assert watch.see(well | dict(kl=0.0)) == [] and watch.see(well) == []
    told = [watch.see(row) for row in [well | dict(kl=0.0)] * 10 + [well] + [well | dict(kl=0.0)] * 9]
    assert [len(lines) for lines in told] == [0] * 4 + [1] + [0] * 15
