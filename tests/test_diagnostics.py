"""Chain diagnostics against their definitions in numpy float64 and chains whose autocorrelation is known.

Statistical bounds are 4.9 standard errors: a false alarm once in 1e6 seeds. Seeds are fixed.
"""

import importlib.util
import json
import math
import sys

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from PIL import Image

from fastanila import evaluate, noise, train
from fastanila.evaluation import diagnostics
from fastanila.models import energies
from fastanila.samplers import metropolis
from fastanila.training import run as run_training

needs_arviz = pytest.mark.skipif(importlib.util.find_spec("arviz") is None, reason="arviz is not installed")


def autoregressive(phi, draws, chains, seed=0):
    """(draws, chains, 1) float64: x' = phi x + sqrt(1 - phi**2) xi from its law N(0, 1); rho_k = phi**k."""
    xi = np.random.default_rng(seed).standard_normal((draws, chains))
    x = xi.copy()
    for t in range(1, draws):
        x[t] = phi * x[t - 1] + math.sqrt(1 - phi**2) * xi[t]
    return torch.from_numpy(x)[..., None]


def relative_error(phi, count):
    """4.9 standard errors of tau's estimate from ``count`` states, relative: sqrt(2 (2 W + 1) / count) with W the lags
    that are summed (Sokal 1989), which are those whose rho stands out of its own noise, and twice as many to be safe.
    """
    lags = 1 if phi == 0 else math.ceil(math.log(1 / math.sqrt(count)) / math.log(abs(phi)))
    return 4.9 * math.sqrt(2 * (4 * lags + 1) / count)


def test_autocorrelation_by_its_definition():
    x = np.random.default_rng(0).standard_normal((13, 3, 2)).cumsum(0)
    expected = np.empty((13, 2))
    for s in range(2):
        mean = x[:, :, s].mean()
        for lag in range(13):
            products = [(x[t, c, s] - mean) * (x[t + lag, c, s] - mean) for c in range(3) for t in range(13 - lag)]
            expected[lag, s] = sum(products)
    found = diagnostics.autocorrelation(torch.from_numpy(x))
    assert found.dtype == torch.float64
    assert np.abs(found.numpy() - expected / expected[0]).max() < 1e-12


def test_autocorrelation_time_by_its_definition():
    states = autoregressive(0.6, 40, 3)
    rho = diagnostics.autocorrelation(states)[:, 0].tolist()
    total, least = 0.0, math.inf
    for t in range(20):
        pair = rho[2 * t] + rho[2 * t + 1]
        if pair <= 0:
            break
        least = min(least, pair)
        total += least
    assert t > 2 and total != sum(rho[: 2 * t])  # some pairs count, and the sequence is made monotone
    assert diagnostics.autocorrelation_time(states).item() == pytest.approx(2 * total - 1, rel=1e-12)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, -0.5])
def test_the_autocorrelation_time_of_an_autoregression(phi):
    states = autoregressive(phi, 4000, 64)
    tau = diagnostics.autocorrelation_time(states).item()
    bound = relative_error(phi, 4000 * 64)
    assert bound < 0.25 and tau == pytest.approx((1 + phi) / (1 - phi), rel=bound)


def test_chains_that_stay_apart_are_correlated_at_every_lag():
    states = autoregressive(0.5, 400, 20) + 3 * torch.arange(20.0)[:, None]
    assert diagnostics.autocorrelation(states)[100].item() > 0.7
    assert diagnostics.autocorrelation_time(states).item() > 100


def ranks(x):
    """Normal scores of the ranks of an array, of all chains together."""
    return scipy.stats.norm.ppf((scipy.stats.rankdata(x).reshape(x.shape) - 3 / 8) / (x.size + 1 / 4))


def split_rhat(x):
    """Of (draws, chains), an even number of draws: Vehtari et al. 2021, equation 3, after the split."""
    half = np.concatenate([x[: len(x) // 2], x[len(x) // 2 :]], axis=1)
    within = half.var(0, ddof=1).mean()
    between = half.mean(0).var(ddof=1)
    return math.sqrt((len(half) - 1) / len(half) + between / within)


@needs_arviz
@pytest.mark.parametrize("phi", [0.0, 0.9])
def test_rhat_by_its_definition(phi):
    x = torch.cat([autoregressive(phi, 100, 5), autoregressive(phi, 100, 5, seed=1).exp()], 2)
    found = diagnostics.rhat(x)
    for column, value in zip(x.numpy().transpose(2, 0, 1), found.tolist(), strict=True):
        folded = np.abs(column - np.median(column))
        assert value == pytest.approx(max(split_rhat(ranks(column)), split_rhat(ranks(folded))), rel=1e-9)


@needs_arviz
def test_rhat_sees_a_shifted_a_wider_and_a_drifting_chain():
    settled = autoregressive(0.0, 1000, 8)
    assert diagnostics.rhat(settled).item() < 1.01
    shifted, wider = settled.clone(), settled.clone()
    shifted[:, 3] += 1
    wider[:, 3] *= 3
    drifting = settled + torch.linspace(-1, 1, 1000)[:, None, None]  # all alike, so only their halves differ
    for states in (shifted, wider, drifting):
        assert diagnostics.rhat(states).item() > 1.05
    stuck = torch.arange(8.0)[:, None].expand(100, 8, 1)
    assert diagnostics.rhat(stuck).item() > 1e6 and diagnostics.ess_bulk(stuck).item() < 10


@needs_arviz
@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, -0.5])
def test_the_effective_sample_sizes_of_an_autoregression(phi):
    count = 4000 * 64
    states = autoregressive(phi, 4000, 64)
    bound = relative_error(phi, count)
    # of all monotone functions of the state the bulk is the same
    for x in (states, states.exp()):
        assert count / diagnostics.ess_bulk(x).item() == pytest.approx((1 + phi) / (1 - phi), rel=bound)

    def covariance(r):  # of 1(X <= q), 1(Y <= q), bivariate normal: Plackett's identity, the integral of the density
        q = scipy.stats.norm.ppf(0.05)
        density = lambda s: math.exp(-(q**2) / (1 + s)) / (2 * math.pi * math.sqrt(1 - s**2))  # noqa: E731
        return scipy.integrate.quad(density, 0, r)[0]

    variance = 0.05 * 0.95
    tail = 1 + 2 * sum(covariance(phi**k) / variance for k in range(1, 200)) if phi else 1.0
    # the smaller of two estimates
    assert count / diagnostics.ess_tail(states).item() == pytest.approx(tail, rel=bound + 0.01)


@needs_arviz
def test_what_is_not_finite_or_never_varies_is_nan_and_leaves_the_rest():
    x = autoregressive(0.0, 50, 4).expand(-1, -1, 4).clone()
    x[7, 1, 0], x[7, 1, 1], x[:, :, 2] = math.nan, math.inf, 0.1
    for statistic in (
        diagnostics.rhat, diagnostics.ess_bulk, diagnostics.ess_tail, diagnostics.autocorrelation_time
    ):  # fmt: skip
        found = statistic(x)
        assert found.shape == (4,) and found[:3].isnan().all() and found[3].isfinite(), statistic
    assert math.isnan(diagnostics.diagnose(x).rhat) and math.isnan(diagnostics.diagnose(x).ess_bulk)


@needs_arviz
def test_diagnose_takes_the_worst_and_counts_gradients():
    states = torch.cat([autoregressive(phi, 500, 6, seed=i) for i, phi in enumerate((0.0, 0.9, 0.3))], 2)
    found = diagnostics.diagnose(states, gradients=3, acceptance=0.5)
    assert (found.draws, found.chains, found.acceptance) == (500, 6, 0.5)
    assert found.rhat == diagnostics.rhat(states).max() and found.ess_bulk == diagnostics.ess_bulk(states).min()
    assert found.ess_tail == diagnostics.ess_tail(states).min()
    assert found.autocorrelation_time == diagnostics.autocorrelation_time(states)[1]
    assert found.ess_per_gradient == found.ess_bulk / (500 * 6 * 3)
    assert json.loads(json.dumps(found._asdict())) == found._asdict()


def test_bad_states_are_refused():
    for shape in ((3, 4, 1), (10, 1, 1), (10, 4), (10, 4, 0)):
        with pytest.raises(ValueError, match=r"states must be \(draws, chains, summaries\)"):
            diagnostics.autocorrelation(torch.zeros(shape))
    with pytest.raises(TypeError, match="states must be a tensor, got ndarray"):
        diagnostics.autocorrelation(np.zeros((10, 4, 1)))
    with pytest.raises(ValueError, match="gradients must be"):
        diagnostics.diagnose(torch.zeros(10, 4, 1), gradients=0)


def test_without_arviz_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ModuleNotFoundError, match=r"arviz is not installed: pip install fastanila\[diagnostics\]"):
        diagnostics.rhat(autoregressive(0.0, 10, 4))
    assert diagnostics.autocorrelation_time(autoregressive(0.0, 10, 4)).isfinite()


def test_small_states_are_summarised_by_their_elements():
    energy = energies.GaussianMixture(torch.zeros(1, 2))
    states = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    values, names = diagnostics.summarise(energy, states)
    assert names == ("energy", "element 0", "element 1") and values.shape == (5, 3, 3)
    expected = 0.5 * states.double().square().sum(2) + math.log(2 * math.pi)
    assert torch.allclose(values[..., 0], expected, atol=1e-6) and torch.equal(values[..., 1:], states.double())


def test_images_are_summarised_by_fixed_projections():
    def energy(x):
        return x.square().flatten(1).sum(1)

    states = torch.randn(6, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    values, names = diagnostics.summarise(energy, states)
    assert names == ("energy", *(f"projection {i}" for i in range(4))) and values.shape == (6, 2, 5)
    # linear, in directions of length 1: the basis vectors' projections are the directions
    basis = torch.eye(16).view(16, 1, 1, 4, 4)
    directions = diagnostics.summarise(energy, basis).values[:, 0, 1:]
    assert torch.allclose(directions.norm(dim=0), torch.ones(4, dtype=torch.float64))
    assert torch.linalg.matrix_rank(directions) == 4
    assert torch.allclose(states.flatten(2).double() @ directions, values[..., 1:], atol=1e-12)
    used = noise.normal((4, 16), seed=0, step=0, stream=noise.Stream.BASELINE).double().T  # by sliced distances
    assert not torch.allclose(directions, used / used.norm(dim=0))


def test_a_trace_in_blocks_is_the_run():
    energy, sampler = energies.GaussianMixture(torch.zeros(1, 2)), metropolis.MALA(step_size=1.5)
    z = energy.sample(6, seed=1)
    accepted = []
    states = sampler.run(
        energy, z, steps=20, seed=3, step=100, keep_every=1, compile=False,
        callback=lambda info: accepted.append(info.acceptance),
    )  # fmt: skip
    found = diagnostics.trace(sampler, energy, z, draws=20, seed=3, step=100, block=7, compile=False)
    assert torch.equal(found.values, diagnostics.summarise(energy, states).values)
    assert found.names == ("energy", "element 0", "element 1")
    assert 0.3 < found.acceptance < 0.99
    assert found.acceptance == pytest.approx(torch.stack(accepted).mean().item(), rel=1e-2)
    for name in ("draws", "block"):
        with pytest.raises(ValueError, match=name):
            diagnostics.trace(sampler, energy, z, **{"draws": 4, "block": 2, name: 0}, seed=0)


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "rings"
    flags = "--sampler anila --iterations 3 --steps 5 --chains 320 --batch-size 32 --sample-every 0 --width 8"
    assert train.main([*flags.split(), "--no-fused", "--out", str(out)]) == 0
    return out


@needs_arviz
def test_evaluate_chains(run_directory, capsys):
    command = [str(run_directory), "--chains", "--draws", "23", "--no-fused"]
    assert evaluate.main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nll"] > report["entropy"] and "tv_chains_model" in report
    chains = report["chains"]
    assert list(chains) == list(diagnostics.Diagnostics._fields)
    assert (chains["draws"], chains["chains"], chains["acceptance"]) == (23, 256, 1.0)
    assert chains["rhat"] > 1.05  # three updates in, from noise: far from settled
    assert Image.open(run_directory / "chains.png").size[0] > 800
    # 256 of the 320 chains, from where training left them, with noise that training has not used
    run = run_training.load(run_directory)
    z = run.chains[torch.arange(256) * 320 // 256]
    states = run.sampler.run(run.energy, z, steps=23, seed=0, step=15, keep_every=1, compile=False)
    expected = diagnostics.diagnose(diagnostics.summarise(run.energy, states).values)
    assert chains == pytest.approx(expected._asdict(), rel=1e-6)
    assert evaluate.main([*command, "--seed", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["chains"] != chains


@needs_arviz
def test_evaluate_chains_of_images(tmp_path, capsys):
    out = tmp_path / "digits"
    flags = "--data digits --iterations 1 --steps 2 --chains 8 --batch-size 8 --width 2 --sample-every 0 --no-fused"
    assert train.main([*flags.split(), "--no-fused", "--out", str(out)]) == 0
    capsys.readouterr()
    assert evaluate.main([str(out), "--chains", "--draws", "5", "--no-fused"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["frechet"] > 0 and report["chains"]["chains"] == 8 and (out / "chains.png").is_file()


def test_evaluate_chains_refuses_in_one_line(run_directory, monkeypatch, capsys):
    assert evaluate.main([str(run_directory), "--chains", "--draws", "3"]) == 2
    assert capsys.readouterr().err == "error: draws must be an integer of at least 4, got 3\n"
    monkeypatch.setitem(sys.modules, "arviz", None)
    assert evaluate.main([str(run_directory), "--chains"]) == 2
    assert "pip install fastanila[diagnostics]" in capsys.readouterr().err
    assert evaluate.main([str(run_directory)]) == 0  # which needs no extra


@needs_arviz
def test_a_single_chain_is_refused(run_directory):
    run = run_training.load(run_directory)
    with pytest.raises(ValueError, match="at least 2 chains, and the run has 1"):
        evaluate.mixing(run._replace(chains=run.chains[:1]))


@needs_arviz
def test_chains_that_diverged_are_reported_as_null(run_directory, capsys, monkeypatch):
    load = run_training.load

    def broken(*arguments):
        run = load(*arguments)
        return run._replace(chains=torch.full_like(run.chains, math.nan))

    monkeypatch.setattr(run_training, "load", broken)
    assert evaluate.main([str(run_directory), "--chains", "--draws", "6", "--no-fused"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chains"]["rhat"] is None and report["sw_chains"] is None and report["nll"] > 0
    assert report["sw_chains_floor"] > 0  # exact draws are as they were
