"""Laws in the plane, on the densities that runs are trained on. Statistical false alarms: 1e-6 in all."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch

from fastanila import HMC, MALA, AdjustedAniLA, AniLA, Langevin, TamedLangevin, data
from fastanila.evaluation import plane, quadrature
from fastanila.ops import reference
from fastanila.theory import conditions, markov, targets

FALSE_ALARM = 1e-6
CHAINS = 20_000
BINS = 16

EXACT = {
    "mala": MALA(0.04),
    "element": AdjustedAniLA(4.0, 0.06),
    "chain": AdjustedAniLA(4.0, 0.06, norm="chain"),
    "hmc": HMC(0.02, 5),
}
UNADJUSTED = {"langevin": Langevin(0.05), "anila": AniLA(4.0, 0.05), "tamed": TamedLangevin(1.0, 0.05)}
PLANES = {"rings": 1.0, "8gaussians": 3.0}  #: by how much the steps are longer


def longer(sampler, times):
    return dataclasses.replace(sampler, step_size=times * sampler.step_size)


def p_value(z, box, masses):
    """Of a chi-squared test of the chains' histogram against the masses of the bins, what is outside being one more."""
    seen = plane.histogram(z, box, BINS).numpy().ravel() * len(z)
    expected = masses.numpy().ravel() * len(z)
    seen, expected = np.append(seen, len(z) - seen.sum()), np.append(expected, len(z) - expected.sum())
    rare = expected < 10  # joined into one
    seen, expected = np.append(seen[~rare], seen[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    return scipy.stats.chi2.sf(((seen - expected) ** 2 / np.maximum(expected, 1)).sum(), len(seen) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("name", PLANES)
def test_an_exact_sampler_keeps_the_target(name, sampler, monkeypatch):
    density, sampler = data.load(name), longer(sampler, PLANES[name])
    z = density.draw(CHAINS, seed=5, step=0, purpose="held-out").float()
    fine = quadrature.grid(density.box, 400)
    truth = plane.bin_masses(quadrature.data_log_density(density, fine), fine, density.box, BINS)
    seen = []
    energy = targets.density(name).energy
    after = sampler.run(energy, z, steps=60, seed=1, compile=False, callback=seen.append)
    assert 0.4 < seen[-1].acceptance.mean() < 0.99
    assert not torch.isclose(after, z).all(1).any()
    assert p_value(after, density.box, truth) > FALSE_ALARM / 8
    # teeth: one that accepts everything is refused at this number of chains
    judge = reference.judge
    monkeypatch.setattr(reference, "judge", lambda log_alpha, uniform: judge(0 * log_alpha, 0.5 + 0 * uniform))
    wrong = sampler.run(energy, z, steps=60, seed=1, compile=False)
    assert p_value(wrong, density.box, truth) < FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize("sampler", UNADJUSTED.values(), ids=UNADJUSTED)
@pytest.mark.parametrize("name", PLANES)
def test_an_unadjusted_sampler_keeps_its_own_computed_law(name, sampler):
    """From draws of it, because a chain takes thousands of transitions from one mode to the next."""
    density, target, sampler = data.load(name), targets.density(name), longer(sampler, PLANES[name])
    cells, fine = markov.cells(target.box, 80), quadrature.grid(target.box[0], 80)
    law = conditions.stationary(markov.transition_kernel(sampler, target, cells).matrix)
    log_law = torch.from_numpy(np.log(np.maximum(law, 1e-300)) - np.log(cells.volume))
    own = plane.bin_masses(log_law, fine, density.box, BINS)
    z = quadrature.draw(log_law, fine, CHAINS, seed=3, step=0)
    after = sampler.run(target.energy, z, steps=300, seed=2, compile=False)
    assert not torch.isclose(after, z).all(1).any()
    assert p_value(after, density.box, own) > FALSE_ALARM / 6
    # teeth: chains that go over to the target's law are refused, as is half the step
    truth = plane.bin_masses(quadrature.data_log_density(density, fine), fine, density.box, BINS)
    assert p_value(after, density.box, truth) < FALSE_ALARM
    assert (
        p_value(longer(sampler, 0.5).run(target.energy, z, steps=300, seed=2, compile=False), density.box, own)
        < FALSE_ALARM
    )
