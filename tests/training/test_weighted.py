"""Training with weighted walkers: gradients and normalising constants against quadrature, files, resuming, refusals."""

import copy
import json
import math
import shutil

import pytest
import scipy.stats
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import fastanila
from fastanila.evaluation import quadrature
from fastanila.models.wrappers import Tempered
from fastanila.samplers import weighted
from fastanila.training import config, live, losses
from fastanila.training import job as job_training
from fastanila.training import update as update_training
from fastanila.training.settings import Settings
from known import FALSE_ALARM
from run_files import final, numbers, quiet, rows

SMALL = dict(
    init="weighted", iterations=6, steps=3, batch_size=48, witnesses=32, width=16, features=8, lr=2e-2, log_every=1,
    sample_every=0, save_every=4, fused=False,
)  # fmt: skip


def made(count, **settings):
    """A job after some updates, and the last one's."""
    job = job_training.prepare(Settings(**SMALL | settings))
    update = update_training.build_update(job)
    for _ in range(count):
        last = update()
    assert not job.broken
    return job, last


# ------------------------------------------------------------------------------------------------ against quadrature


def gradients(network, states):
    """dU(z)/dtheta of each state, (n, all parameters) float64."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def of_one(parameters, z):
        return functional_call(network, parameters, (z[None],))[0]

    found = vmap(grad(of_one), (None, 0))(parameters, states)
    return torch.cat([found[name].flatten(1) for name in parameters], 1).double()


def truths(network):
    """The model's mean of dU/dtheta, and its log Z, by quadrature."""
    grid = quadrature.grid((-16.0, 16.0), 300, "cpu")
    law = quadrature.model_log_density(network, grid).exp() * grid.cell_area
    parts = zip(law.split(6000), grid.points.float().split(6000), strict=True)
    return sum(w @ gradients(network, z) for w, z in parts), quadrature.log_normalizer(network, grid)


def out(each, log_weights, truth):
    """By how many standard errors the weighted walkers' mean of dU/dtheta, and their log Z, are out: the worst."""
    of_gradient, log_z = truth
    w = (log_weights - log_z).exp()  # of mean 1, and independent, for none was resampled
    each = w[:, None] * (each - of_gradient)
    z = (each.sum(0) / each.square().sum(0).sqrt())[each.abs().sum(0) > 1e-4]
    return z.abs().max().item(), ((w.mean() - 1) / (w.std() / math.sqrt(len(w)))).abs().item()


@pytest.fixture(scope="module")
def moved():
    """Witnesses of 18 updates with few transitions, which the parameters have not seen."""
    job, _ = made(18, batch_size=256, witnesses=16 * 256, steps=2, iterations=20, ema=0.5)
    witnesses, network = job.start.witnesses, job.ebm.average
    assert 0.6 < weighted.ess(witnesses.log_weights) < 0.95  # weights matter, and nobody was resampled
    return gradients(network, witnesses.states), witnesses.log_weights, truths(network)


@pytest.mark.parametrize(
    ("mutant", "right"),
    [(lambda a: a, True), (torch.zeros_like, False), (torch.neg, False)],
    ids=["as it is", "no weights", "the sign flipped"],
)
def test_the_weighted_gradient_is_the_models(moved, mutant, right):
    each, log_weights, truth = moved
    middle = log_weights.mean()  # a mutant's weights keep their level, for the gradient to tell
    of_gradient, of_log_z = out(each, middle + mutant(log_weights - middle), truth)
    assert (of_gradient < scipy.stats.norm.isf(FALSE_ALARM / each.shape[1] / 2)) == right, of_gradient
    if right:
        assert of_log_z < scipy.stats.norm.isf(FALSE_ALARM / 2), of_log_z


def test_an_update_learns_by_the_weighted_walkers_alone():
    """Its gradient is that of mean U(data) less the weighted mean over the walkers, whatever the witnesses are."""
    found = []
    for witnesses in (0, 32):
        job, _ = made(3, witnesses=witnesses, energy_l2=0.1)
        network, a = copy.deepcopy(job.ebm.module), job.start.walkers.log_weights.clone()
        last = update_training.build_update(job)()
        batch, _ = update_training.draw_data(job, 3, job.seed)
        u, p = network(job.chains).double(), a.softmax(0)
        loss = network(batch).double().mean() - p @ u + 0.1 * (network(batch).double().square().mean() + p @ u.square())
        wanted = torch.autograd.grad(loss, list(network.parameters()))
        assert a.std() > 0.01 and weighted.ess(a) > 0.5  # so that job.chains are the walkers as they were moved
        assert last.energy_chains.item() == pytest.approx((p @ u).item(), rel=1e-5)
        for parameter, w in zip(job.ebm.module.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, w, rtol=1e-3, atol=2e-6)
        found.append(torch.cat([x.flatten() for x in wanted]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)  # with witnesses beside them the same walkers


def test_weights_follow_the_parameters():
    job, _ = made(2)
    networks = (job.ebm.module, job.ebm.average)
    populations = (job.start.walkers, job.start.witnesses)
    before, old = copy.deepcopy(networks), [x.log_weights.clone() for x in populations]
    update_training.build_update(job)()
    for was, now, population, a in zip(before, networks, populations, old, strict=True):
        z, change = population.states, population.log_weights - a
        torch.testing.assert_close(change, (was(z) - now(z)).double().detach(), rtol=1e-4, atol=1e-5)
        assert change.std() > 1e-3


def test_poor_walkers_are_resampled_and_log_z_stays():
    job, _ = made(2)
    walkers = job.start.walkers
    walkers.log_weights.copy_(torch.linspace(-9, 9, 48, dtype=torch.float64))
    log_z = weighted.log_mean(walkers.log_weights)
    job.lr_factor.fill_(0.0)  # and so no weight changes in the update
    update_training.build_update(job)()
    assert weighted.ess(walkers.log_weights).item() == pytest.approx(1)
    assert weighted.log_mean(walkers.log_weights).item() == pytest.approx(log_z.item(), rel=1e-12)
    assert len(walkers.states.unique(dim=0)) < 30


# ------------------------------------------------------------------------------------------------------ where it starts


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(data="25gaussians", sampler="mala", reference_sd=2.0),
        dict(confinement=0.3, temperature=0.5),
        dict(temperature=0.25, data_noise=0.5),
        dict(data="digits", energy=None, width=4, features=0, sampler="mala", step_size=0.01, batch_size=8),
        dict(data="digits", energy="unet", width=4, features=0, sampler="mala", step_size=0.01, batch_size=8),
    ],
    ids=str,
)
def test_it_starts_at_the_gaussian_whose_normalising_constant_is_known(options):
    job = job_training.prepare(Settings(**SMALL | options))
    start, s = job.start, job.settings
    for population in (start.walkers, start.witnesses):
        z, a = population.states, population.log_weights
        wanted = z[0].numel() * math.log(start.sd * math.sqrt(2 * math.pi))
        torch.testing.assert_close(a, torch.full_like(a, wanted), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(job.ebm.module(z).detach(), z.square().flatten(1).sum(1) / (2 * start.sd**2))
    if options.get("reference_sd") or options.get("confinement"):
        assert start.sd == pytest.approx(2.0 if "reference_sd" in options else math.sqrt(0.5 / 0.3))
    else:
        data = job.data.draw(20_000, seed=7, step=5).double()
        assert start.sd == pytest.approx(math.sqrt(data.square().mean().item() + s.data_noise**2), rel=0.05)
    assert json.loads(config.dump(s))["reference_sd"] == (s.reference_sd if math.isfinite(s.reference_sd) else "inf")


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.2))

    def forward(self, x):
        return self.scale * x.square().sum(1)


def test_an_energy_of_ones_own_starts_with_weights_of_importance(tmp_path):
    run = fastanila.training.loop.train(
        Settings(**SMALL | dict(out=str(tmp_path / "run"))), energy=Own(), say=lambda line: None
    )
    assert run.chains.isfinite().all() and rows(tmp_path / "run")[0]["ess"] < 0.999


# -------------------------------------------------------------------------------------------------- runs and their rows


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "weighted"
    quiet(Settings(**SMALL | dict(sample_every=3, out=str(directory))))
    return directory


def test_rows_say_what_the_witnesses_say(run_directory):
    row, tensors = rows(run_directory)[-1], final(run_directory)
    assert {"ess", "ess_witnesses", "log_z", "log_z_error", "nll_live", "nll"} <= set(row)
    assert row["log_z"] == pytest.approx(weighted.log_mean(tensors["start.witness_log_weights"]).item(), rel=1e-9)
    assert row["ess"] == pytest.approx(weighted.ess(tensors["start.log_weights"]).item(), rel=1e-9)
    job = job_training.prepare(fastanila.load(run_directory).settings, run_directory)
    x = live.held_out(job)
    density = job.data.draw(4096, seed=0, step=0, purpose="held-out")
    assert torch.equal(x, density)
    assert row["nll_live"] == pytest.approx(job.ebm.average(x).double().mean().item() + row["log_z"], rel=1e-6)


def test_the_likelihood_is_that_of_quadrature(run_directory):
    """Of a short run whose witnesses are few: within their error, which is known to a fifth."""
    row = rows(run_directory)[-1]
    assert abs(row["nll_live"] - row["nll"]) < 6 * row["log_z_error"] + 0.1 and row["log_z_error"] < 0.2


def test_without_witnesses_there_is_no_likelihood(tmp_path):
    quiet(Settings(**SMALL | dict(witnesses=0, iterations=2, out=str(tmp_path / "run"))))
    assert "ess" in rows(tmp_path / "run")[-1] and "nll_live" not in rows(tmp_path / "run")[-1]


def test_resume_gives_the_numbers_of_an_uninterrupted_run(run_directory, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(run_directory, half)
    (half / "checkpoints" / "00000006.safetensors").unlink()  # leaves update 4's
    quiet(Settings(**SMALL | dict(sample_every=3)), resume=half)
    assert numbers(half) == numbers(run_directory)
    a, b = final(half), final(run_directory)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_loaded_runs_chains_are_resampled(tmp_path):
    job, _ = made(1, out=str(tmp_path / "run"))
    job.start.walkers.log_weights[:40] = -math.inf
    with job_training.run_directory_of(job):
        job_training.begin(job)
    run, walkers = fastanila.load(tmp_path / "run"), job.start.walkers
    assert len(run.chains) == 48 and len(run.chains.unique(dim=0)) == 8
    assert torch.equal(run.chains, weighted.evenly(walkers.states, walkers.log_weights, seed=0, step=0))


def test_an_update_that_is_not_finite_leaves_weights_and_walkers(tmp_path):
    job, _ = made(2)
    update = update_training.build_update(job)
    before = {name: x.clone() for name, x in job.start.tensors().items()}
    job.broken.fill_(True)
    update()
    assert all(torch.equal(x, before[name]) for name, x in job.start.tensors().items())
    job.broken.fill_(False)
    job.start.walkers.log_weights[3] = math.nan
    update()
    assert job.broken and job.made == 2


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sampler="langevin"), "sampler must be one of mala, anila-mh, hmc with init=weighted, got langevin"),
        (dict(data="digits", width=4, features=0), "sampler must be one of mala, anila-mh, hmc .* got anila"),
        (dict(chains=96), "chains must be with init=weighted equal to batch_size"),
        (dict(witnesses=40), "witnesses must be a multiple of 16, got 40"),
        (dict(witnesses=-16), "witnesses must be an integer of at least 0, got -16"),
        (dict(matching=2), "matching and matching_weight must be 0 with init=weighted"),
        (
            dict(data="digits", width=4, features=0, sampler="mala", classes=True),
            "init must be persistent, data or noise with classes, got weighted",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        job_training.prepare(Settings(**SMALL | options))


def test_there_are_as_many_witnesses_as_walkers_rounded_up():
    def witnesses(**settings):
        return config.resolve(Settings(**settings)).witnesses

    assert witnesses() == 0 and witnesses(init="weighted") == 512
    assert witnesses(init="weighted", batch_size=40) == 48 and witnesses(init="weighted", witnesses=0) == 0


def test_the_loss_weighs_chains_as_told():
    energy = Tempered(Own(), 0.5)
    data, chains = torch.randn(5, 2), torch.randn(7, 2)
    log_weights = torch.randn(7, dtype=torch.float64)
    found = losses.likelihood(energy, data, chains, log_weights=log_weights)
    wanted = energy(data).mean() - (log_weights.softmax(0) * energy(chains)).sum()
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert found.energy_chains.item() == pytest.approx(energy(data).mean().item() - wanted.item(), rel=1e-5)
    even = losses.likelihood(energy, data, chains, log_weights=torch.full((7,), 3.0))
    assert even.loss.item() == pytest.approx(losses.likelihood(energy, data, chains).loss.item(), rel=1e-5)
