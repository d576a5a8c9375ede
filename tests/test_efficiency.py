"""The measurements of samplers measure what they say: effective samples, errors, acceptance, a correction's cost."""

import dataclasses
import json
import math

import pytest
import scipy.stats
import torch

from bench import acceptance, chain_rows, efficiency, workloads
from bench.row import OURS
from fastanila import MALA, AniLA, Langevin
from fastanila.models import ConvNet
from fastanila.training import run as run_training
from fastanila.training.config import resolve
from fastanila.training.settings import Settings

CPU = torch.device("cpu")


def quick_target():
    return efficiency.gaussian(4.0, dim=2)


# ------------------------------------------------------------------------------------------------------- efficiency


def off_by(energy, draws) -> torch.Tensor:
    """By how many standard errors the draws contradict E[dU/dx_i] = 0 and E[x_i dU/dx_i] = 1 (Stein), at the most."""
    z = draws[:50_000].double().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(z).sum(), z)
    seen = torch.cat((gradient, z.detach() * gradient - 1), 1)
    return (seen.mean(0).abs() / seen.std(0) * math.sqrt(len(z))).max()


@pytest.mark.parametrize(
    "target",
    [efficiency.gaussian(100.0, dim=5), efficiency.funnel(4), efficiency.eight_gaussians()],
    ids=lambda t: t.name,
)
def test_the_draws_are_of_the_targets_energy(target):
    assert off_by(target.energy, target.draws) < 6  # a false alarm in 1e-7 or less


def test_a_funnel_without_its_volume_and_a_gaussian_of_a_twentieth_more_variance_would_show():
    funnel, gaussian = efficiency.funnel(4), efficiency.gaussian(100.0, dim=5)
    assert off_by(lambda x: funnel.energy(x) - 1.5 * x[:, 0], funnel.draws) > 6
    assert off_by(lambda x: gaussian.energy(x) / 1.05, gaussian.draws) > 6


def test_the_errors_of_rows_of_known_law():
    steps = torch.arange(1000.0)[:, None]
    assert efficiency.ks(steps, steps) == 0
    assert efficiency.ks(steps, steps + 250) == pytest.approx(0.25)
    assert efficiency.ks(torch.cat((steps, steps), 1), torch.cat((steps, steps + 500), 1)) == pytest.approx(0.5)
    both = torch.rand(300, 1, generator=torch.Generator().manual_seed(0)), torch.randn(200, 1).round(decimals=1)
    assert efficiency.ks(*both) == pytest.approx(scipy.stats.ks_2samp(*(x[:, 0].numpy() for x in both)).statistic)
    assert efficiency.ks(*both[::-1]) == pytest.approx(efficiency.ks(*both))
    assert math.isnan(efficiency.ks(torch.full((10, 1), math.nan), steps))
    rows = torch.tensor([[-1.0, -2.0], [1.0, 2.0]])  # variances 2 and 8
    assert efficiency.variance_error(rows, torch.tensor([2.0, 5.0])) == pytest.approx(0.6)
    assert efficiency.variance_error(rows, torch.tensor([4.0, math.nan])) == pytest.approx(0.5)


def test_independent_draws_have_a_thousand_effective_ones_and_diverged_chains_none():
    class Independent(Langevin):
        def run(self, energy, z, *, steps, callback, **options):
            return torch.randn(steps, *z.shape, generator=torch.Generator().manual_seed(1)) * target.variance.sqrt()

    target = quick_target()
    found = efficiency.result(target, "independent", Independent(), chains=8, gradients=1000)
    assert found.ess == pytest.approx(1000, rel=0.15) and found.variance < 0.1 and found.ks < 0.05
    diverged = efficiency.result(target, "langevin", Langevin(step_size=1e3), chains=4, gradients=60)
    assert math.isnan(diverged.ess) and "diverged" in efficiency.row(diverged)


def test_a_law_that_is_wrong_shows_beside_its_effective_size():
    target = (
        quick_target()
    )  # variances 1/4 and 1: at step 0.5 Langevin's are 1 / (1 - 0.5) and 1 / (1 - 1/8) times these
    wrong = efficiency.result(target, "langevin", Langevin(step_size=0.5), chains=64, gradients=500)
    right = efficiency.result(target, "mala", MALA(step_size=0.5), chains=64, gradients=500)
    assert wrong.variance == pytest.approx(1.0, abs=0.1) and wrong.ks > 0.1
    assert right.variance < 0.1 and right.ks < 0.05 and 0 < right.acceptance < 1
    assert wrong.ess > 100 and right.ess > 100


def test_every_sampler_has_a_row_and_hmc_counts_its_leapfrog_steps():
    target = quick_target()
    chosen = dict(efficiency.samplers(target, chains=16, adapting=20))
    assert len(chosen) == 12 and [name for name, s in chosen.items() if s.is_exact] == [
        "mala", "anila-mh, element", "anila-mh, chain", "hmc",
    ]  # fmt: skip
    hmc = chosen["hmc"]
    reach = hmc.leapfrog_steps * math.sqrt(hmc.step_size)
    assert 1 <= hmc.leapfrog_steps <= efficiency.LONGEST and 0.3 < reach < 5
    results = [efficiency.result(target, name, s, chains=16, gradients=40) for name, s in chosen.items()]
    text = efficiency.markdown(results, chains=16, gradients=40)
    assert all(f"| {target.name} | {name}" in text for name in chosen)
    assert f"hmc, {hmc.leapfrog_steps} leapfrog steps" in text


# ------------------------------------------------------------------------------------------------------- acceptance


def test_the_crossing_is_interpolated_in_the_logarithm_and_absent_where_there_is_none():
    assert acceptance.crossing([0.01, 1.0, 100.0], [1.0, 0.75, 0.25], target=0.5) == pytest.approx(10.0)
    assert acceptance.crossing([1.0, 10.0], [0.9, 0.8], target=0.5) is None
    assert acceptance.crossing([1.0, 10.0, 100.0], [0.1, 0.6, 0.4], target=0.5) == pytest.approx(10**1.5)


def test_on_a_product_gaussian_the_gain_per_element_collapses_and_the_one_per_chain_does_not():
    z = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    steps = acceptance.around(1.0, per_decade=2)
    found = {(c.sampler, c.fraction): c.at_target for c in acceptance.curves("g", acceptance.half_square, z, steps, 2)}
    mala = found["mala", None]
    assert 0.2 < mala < 0.5  # Roberts and Rosenthal's scaling: some 0.34 at D = 768
    for fraction in acceptance.FRACTIONS:
        assert 0.7 < found["chain", fraction] / mala < 1.5
        assert found["element", fraction] / mala < 0.15


def test_the_wall_is_a_normal_beyond_the_box_and_nothing_within():
    energy = acceptance.Walled(lambda x: x.flatten(1).sum(1), temperature=0.5, box=(-1.0, 1.0), wall=0.1)
    x = torch.tensor([[1.0, -1.0, 0.5], [1.3, -1.1, 0.0]])
    torch.testing.assert_close(energy(x), torch.tensor([1.0, 0.4 + 4.5 + 0.5]))


def test_a_run_is_measured_at_its_temperature(tmp_path):
    torch.manual_seed(0)
    energy, settings = ConvNet(1, 8, 4).eval(), resolve(Settings(data="digits"))
    chains = torch.rand(8, 1, 8, 8) * 2 - 1
    run = run_training.Run(energy, AniLA(), chains, settings, iteration=3)
    found = acceptance.measured(run, chains=8, settling=4, transitions=1, per_decade=1)
    assert found["temperature"] == settings.noise_scale**2
    with torch.no_grad():
        cold = energy(chains).mean().item() / settings.noise_scale**2
    assert found["mean_energy"][0] == pytest.approx(cold)  # these chains are within the box
    on_network = [c for c in found["curves"] if c["on"] == "network"]
    assert [(c["sampler"], c["fraction"]) for c in on_network] == [
        ("mala", None), ("element", 0.1), ("chain", 0.1), ("element", 0.5), ("chain", 0.5),
    ]  # fmt: skip
    assert all(len(c["acceptance"]) == len(c["step_sizes"]) == 6 for c in found["curves"])
    acceptance.save(tmp_path / "a.png", found)
    assert json.loads((tmp_path / "a.json").read_text())["shape"] == [8, 1, 8, 8]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert acceptance.markdown(found).count("\n| ") == 1 + 1 + 5


# ------------------------------------------------------------------------------------- what the correction costs


def test_timed_transitions_take_a_gradient_each_and_go_on_where_they_were(monkeypatch):
    calls = []

    class Counting(torch.nn.Module):
        def forward(self, x):
            calls.append(x.clone())
            return 0.5 * x.square().flatten(1).sum(1)

    monkeypatch.setattr(workloads.Chains, "energy", lambda self, device: Counting())
    chains = workloads.Chains("convnet-32", (4, 3, 8, 8), 5)
    for adjusted in (True, False):
        way = chains.transitions(chains.with_norm("chain", adjusted), CPU, compile=False)
        way()
        calls.clear()
        first = way()
        assert len(calls) == 5
        assert not torch.equal(way(), first) and len(calls) == 10


def test_the_adjusted_row_has_one_law_at_one_step_and_a_goal_of_a_tenth_more():
    chains = chain_rows.IMAGES["float32"]
    exact, other = chains.with_norm("element", True), chains.with_norm("element", False)
    score = torch.linspace(-3 * other.threshold, 3 * other.threshold, 12).view(1, 12)
    z, heat = torch.zeros(1, 12), other.noise_scale**2
    for mine, theirs in zip(exact.proposal(z, score / heat), other.proposal(z, score), strict=True):
        torch.testing.assert_close(mine, theirs)
    row = chain_rows.adjusted_row(dataclasses.replace(chains, steps=10), "chain")
    assert row.at_least == {OURS: {chain_rows.UNADJUSTED: pytest.approx(1 / 1.1)}}
