"""Laws in the plane, on the densities that runs are trained on. Statistical false alarms: 1e-6 in all."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch

from fastanila import HMC, MALA, AdjustedAniLA, AniLA, Langevin, TamedLangevin, data, exact, markov, reference, targets

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
PLANES = ("rings", "8gaussians")


def p_value(z, box, masses):
    """Of a chi-squared test of the chains' histogram against the masses of the bins, what is outside being one more."""
    seen = exact.histogram(z, box, BINS).numpy().ravel() * len(z)
    expected = masses.numpy().ravel() * len(z)
    seen, expected = np.append(seen, len(z) - seen.sum()), np.append(expected, len(z) - expected.sum())
    rare = expected < 10  # joined into one
    seen, expected = np.append(seen[~rare], seen[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    return scipy.stats.chi2.sf(((seen - expected) ** 2 / np.maximum(expected, 1)).sum(), len(seen) - 1)


def drawn(name):
    density = data.load(name)
    return density, density.draw(CHAINS, seed=5, step=0, purpose="held-out").float()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("name", PLANES)
def test_an_exact_sampler_keeps_the_target(name, sampler, monkeypatch):
    density, z = drawn(name)
    fine = exact.grid(density.box, 400)
    truth = exact.bin_masses(exact.data_log_density(density, fine), fine, density.box, BINS)
    seen = []
    energy = targets.density(name).energy
    after = sampler.run(energy, z, steps=60, seed=1, compile=False, callback=seen.append)
    assert 0.4 < seen[-1].acceptance.mean() < 0.99
    assert not torch.isclose(after, z).all(1).any()
    assert p_value(after, density.box, truth) > FALSE_ALARM / 8
    # teeth: one that accepts everything is refused at this number of chains
    judge = reference.judge
    monkeypatch.setattr(reference, "judge", lambda log_alpha, uniform: judge(0 * log_alpha, 0.5 + 0 * uniform))
    wrong = dataclasses.replace(sampler).run(energy, z, steps=60, seed=1, compile=False)
    assert p_value(wrong, density.box, truth) < FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize("sampler", UNADJUSTED.values(), ids=UNADJUSTED)
@pytest.mark.parametrize("name", PLANES)
def test_an_unadjusted_sampler_comes_to_its_own_computed_law(name, sampler):
    density, z = drawn(name)
    target = targets.density(name)
    cells = markov.cells(target.box, 120)
    kernel = markov.transition_kernel(sampler, target, cells)
    law = markov.stationary(kernel.matrix)
    (low, high), _ = target.box
    fine = exact.grid((low, high), 120)
    log_law = torch.from_numpy(np.log(np.maximum(law, 1e-300)) - np.log(cells.volume))
    own = exact.bin_masses(log_law, fine, density.box, BINS)
    rate = markov.geometric_rate(kernel.matrix)
    steps = int(np.ceil(np.log(1e-3) / np.log(rate)))
    after = sampler.run(target.energy, z, steps=steps, seed=2, compile=False)
    assert p_value(after, density.box, own) > FALSE_ALARM / 6, (rate, steps)
    # teeth: neither the target nor another step's law is taken for it
    truth = exact.bin_masses(exact.data_log_density(density, fine), fine, density.box, BINS)
    assert p_value(after, density.box, truth) < FALSE_ALARM
