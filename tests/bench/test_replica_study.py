"""The study of replicas: the mixture, and how its modes' shares are measured."""

import pytest
import torch

from bench.studies import replicas


def test_shares_are_those_of_the_nearest_modes():
    energy = replicas.mixture()
    weights = energy.log_weights.exp()
    assert weights.max() / weights.min() == pytest.approx(5) and len(weights) == 25
    drawn = energy.means.repeat_interleave((75 * weights).round().long(), 0) + 0.4
    assert replicas.shares(energy, drawn) == pytest.approx((25, 0.0), abs=1e-6)
    stayed = replicas.shares(energy, replicas.start(energy, 50, seed=1))
    assert stayed.modes == 1 and stayed.tv == pytest.approx(1 - weights[12].item())


def test_a_row_has_the_mean_and_how_far_seeds_are_apart():
    found = [replicas.Shares(25, 0.1), replicas.Shares(24, 0.2)]
    assert replicas.row("name", 4000, found) == ["name", "4,000", "24 to 25", "0.150 ± 0.071"]
    assert replicas.row("name", 0, found[:1]) == ["name", "0", "25", "0.100"]
    assert torch.equal(replicas.start(replicas.mixture(), 5, 1), replicas.start(replicas.mixture(), 5, 1))
