"""The study of acceptance: crossings, the collapse of a gain per element, walls, and a run measured whole."""

import json

import pytest
import torch

from bench.studies import acceptance
from fastanila import AniLA
from fastanila.models import ConvNet
from fastanila.training import run as run_training
from fastanila.training.config import resolve
from fastanila.training.settings import Settings


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
    assert acceptance.report(found).count("\n| ") == 2 + 5
