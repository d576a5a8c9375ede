"""The bench of chain starts: how many transitions a start needs, its tables, and the whole of it on small runs."""

import json

import pytest
import torch

from bench.studies import starts
from fastanila import MALA, GradientDescent, data
from fastanila.evaluation import plane as plane_evaluation
from fastanila.models import GaussianMixture
from fastanila.training import config
from fastanila.training import run as run_training
from fastanila.training.settings import Settings

ENERGY = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), sd=0.7)


def run_of(chains, sampler, init="persistent"):
    return run_training.Run(ENERGY, sampler, chains, config.resolve(Settings(init=init, fused=False)), 10)


def test_transitions_needed(monkeypatch):
    monkeypatch.setattr(starts, "LOOKS", (0, 5, 50, 200))
    monkeypatch.setattr(starts, "_CHAINS", 4096)
    exactly = ENERGY.sample(4096, seed=0)
    mala = MALA(0.3)
    assert starts.needed(run_of(exactly, mala)) == 0
    assert starts.needed(run_of(exactly[:64], mala)) in (0, 5)  # few chains, compared with as few
    assert starts.needed(run_of(exactly * 0.1, mala)) in (50, 200)  # from about the middle
    one_side = torch.where(exactly[:, :1] > 0, exactly * torch.tensor([-1.0, 1.0]), exactly)
    assert starts.needed(run_of(one_side, GradientDescent(0.01))) is None
    assert starts.needed(run_of(exactly, mala, init="noise")) in (5, 50)


def test_spread_and_tables():
    lines = [dict(x=x) for x in (3.0, None, 1.0)]
    assert starts.spread(lines, "x", "{:.0f}") == f"3 (1 to > {starts.LOOKS[-1]})"
    assert starts.spread([], "x", "{:.0f}") == "-"
    plane = dict(
        data="25gaussians", init="vae", diverged=False, gap=0.5, tv=0.25, modes=25, modes_covered_model=24,
        modes_covered_chains=25, transitions=20,
    )  # fmt: skip
    text = starts.plane_table([plane, plane | dict(diverged=True)])
    assert "| 25gaussians | vae | 0.500 (0.500 to 0.500) | 0.250 (0.250 to 0.250) | 24 (24 to 24) of 25 |" in text
    assert text.endswith("| 20 (20 to 20) | 1 of 2 |")
    image = dict(
        data="digits", diverged=False, energy_proposals=1.0, energy_revised=0.5, frechet_start=0.4, frechet=0.1,
        kid_start=9.0, kid=2.0, moved=0.3, baselines={"training": {"kid": -0.5, "frechet": 0.03}},
    )  # fmt: skip
    text = starts.image_table([image, image | dict(frechet=0.2)])
    cells = "0.4000 +- 0.0000 | 0.1500 +- 0.0707 | 0.2500 +- 0.0707 | 0.0300 |"
    assert f"| digits | Frechet distance | {cells}" in text
    assert "| digits | KID | 9.0000 +- 0.0000 | 2.0000 +- 0.0000 | 7.0000 +- 0.0000 | -0.5000 |" in text


@pytest.mark.parametrize(
    ("data_set", "inits", "seeds"),
    [
        pytest.param("rings", ["vae"], ["1"], marks=pytest.mark.slow),
        pytest.param("rings", ["noise", "vae"], ["0", "1"], marks=pytest.mark.slow),
        pytest.param("digits", ["vae"], ["0", "1"], marks=pytest.mark.slow),
    ],
)
def test_the_whole_of_it(data_set, inits, seeds, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(starts, "LOOKS", (0, 1))
    monkeypatch.setattr(starts, "_CHAINS", 1024)
    small = "fused=false width=4 vae_width=4 latent=2 batch_size=16 log_every=2".split()
    arguments = ["--data", data_set, "--inits", *inits, "--seeds", *seeds, "--steps", "2", "--iterations", "3"]
    assert starts.main([*arguments, "--settings", *small, "--out", str(tmp_path / "out"), "--jobs", "2"]) == 0
    text = capsys.readouterr().out
    assert f"| {data_set} |" in text and "3 updates of 2 transitions each" in text
    found = json.loads((tmp_path / "out" / "starts.json").read_text())
    assert [(line["init"], str(line["seed"])) for line in found] == [(init, seed) for init in inits for seed in seeds]
    if data_set == "rings":
        run = run_training.load(tmp_path / "out" / "rings-vae-1", "cpu")
        assert found[-1]["gap"] == pytest.approx(plane_evaluation.evaluate(run.energy, data.load("rings"))["gap"])
