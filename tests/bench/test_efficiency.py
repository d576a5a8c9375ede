"""The study of effective samples measures what it says: draws of the targets, errors, sample sizes."""

import math

import pytest
import torch

from bench.studies import efficiency
from fastanila import MALA, Langevin, Preconditioned


def quick_target():
    return efficiency.gaussian(4.0, dim=2)


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
    assert math.isnan(diverged.ess) and "diverged" in efficiency.cells(diverged)


def test_a_law_that_is_wrong_shows_beside_its_effective_size():
    target = quick_target()  # variances 1/4 and 1: at step 0.5 Langevin's are 2 and 8/7 times these
    wrong = efficiency.result(target, "langevin", Langevin(step_size=0.5), chains=64, gradients=500)
    right = efficiency.result(target, "mala", MALA(step_size=0.5), chains=64, gradients=500)
    assert wrong.variance == pytest.approx(1.0, abs=0.1) and wrong.ks > 0.1
    assert right.variance < 0.1 and right.ks < 0.05 and 0 < right.acceptance < 1
    assert wrong.ess > 100 and right.ess > 100


def test_every_sampler_has_a_row_and_hmc_counts_its_leapfrog_steps():
    target = quick_target()
    chosen = dict(efficiency.samplers(target, chains=16, adapting=20))
    exact = ["mala", "anila-mh, element", "anila-mh, chain"]
    assert len(chosen) == 16 and [name for name, s in chosen.items() if s.is_exact] == [
        *exact, "hmc", *(f"{name}, metric" for name in exact), "hmc, metric",
    ]  # fmt: skip
    metrics = dict(efficiency.samplers(target, chains=16, adapting=20, kinds=["metric"]))
    assert [*metrics] == [*chosen][12:] and metrics["hmc, metric"].step_size == chosen["hmc, metric"].step_size
    assert isinstance(chosen["hmc, metric"], Preconditioned) and chosen["hmc, metric"].scale.shape == (2,)
    hmc = chosen["hmc"]
    reach = hmc.leapfrog_steps * math.sqrt(hmc.step_size)
    assert 1 <= hmc.leapfrog_steps <= efficiency.LONGEST and 0.3 < reach < 5
    results = [efficiency.result(target, name, s, chains=16, gradients=40) for name, s in chosen.items()]
    text = efficiency.report(results, chains=16, gradients=40)
    assert all(f"| {target.name} | {name}" in text for name in chosen)
    assert f"hmc, {hmc.leapfrog_steps} leapfrog steps" in text
